"""How good an index is: recall against exact search, and the smallest effort that reaches a target."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray

from bge_ray.dataset.commit import ROW_GROUP_ROWS
from bge_ray.errors import IndexBuildError
from bge_ray.index.factory import Kind
from bge_ray.index.topk import Results, merge_topk
from bge_ray.index.tune import Measurement, Tuning, measure, measure_recall, tune_effort
from bge_ray.pipeline.engine.tasks import run_tasks
from bge_ray.pipeline.index.candidates import (
    Asked,
    Candidates,
    HeldOut,
    all_at,
    drop_own,
    first_chunks,
    passages_at,
)
from bge_ray.pipeline.index.heldout import held_rows
from bge_ray.pipeline.index.searchers import IndexSource, search_all, start_searchers
from bge_ray.pipeline.index.steps import SEED, TASK_BYTES, Build
from bge_ray.pipeline.index.tasks import exact_task, sample_task
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import FloatArray, IdArray
from bge_ray.records.index import Recall

# What is measured beside the k that is tuned for, and the least that index.json says.
MEASURED_K = 100
# A graph is searched as widely as asked, and at least this wide where the target is hard to reach.
MAX_EF_SEARCH = 512
# The ceiling scans every vector for each query; this many say it within a per cent.
CEILING_QUERIES = 200
# Candidates for each result in the recall that exact scores would give.
RERANKED_PER_RESULT = 10
# Exact searches of one CPU; each returns (queries, k) results to the driver.
EXACT_TASKS_PER_CPU = 4


@dataclass(frozen=True)
class Quality:
    """What was measured.

    ``k`` is what was tuned for, ``tuning`` what such searches find, ``of_codes`` what they find at the chosen
    effort without scoring again, ``rescored`` the recall at k of ``reranked_candidates`` that are scored
    again exactly, ``ceiling_queries`` how many queries the ceiling was measured with.
    """

    k: int
    tuning: Tuning
    of_codes: Measurement
    rescored: Recall
    reranked_candidates: int
    ceiling_queries: int


def hold_out(build: Build, given: FloatArray | None) -> HeldOut:
    """Search all shards exactly, side by side, for the given (n, dim) queries or for rows drawn as such.

    A graph lacks some rows as yet (see `heldout`): they are its queries, and no part of the truth.
    """
    graphs = build.spec.kind is Kind.SHARDS
    groups = build.graph_groups() if graphs else [(fact,) for fact in build.shards]
    rows = build.manifest.vectors
    passages = build.manifest.rows_out if build.per_row else None
    source = build.settings.queries or ""
    own: IdArray | None = None
    if graphs:
        left_out = [held_rows(group) for group in groups]
        rows -= sum(map(len, itertools.chain.from_iterable(left_out)))
    if given is not None:
        queries = given
    elif rows < build.manifest.vectors:
        queries, own = _draw(build, [r for some in left_out for r in some])
        own = own if build.per_row else None  # its passage may have chunks in the graph
        source = "rows of the data set that were not in the graphs when they were asked"
    else:
        queries, own = _draw(build, None)
        source = "rows of the data set, their own row left out"
    rows = rows if passages is None else min(rows, passages)
    if rows == 1:
        own = None  # beside its own row there is nothing to find
    depth = min(max(MEASURED_K, build.k), rows)
    k = depth + (own is not None)
    shared = ray.put(queries)
    dealt = _even_groups(groups, EXACT_TASKS_PER_CPU * build.at_once)
    kept = "others" if graphs else "all"
    arguments = ((build.storage, build.root, some, shared, k, kept, build.results) for some in dealt)
    best: Results | None = None
    with build.step("searching exactly", "groups of shards", len(dealt)) as step:
        for _, found in run_tasks(
            exact_task, arguments, at_once=build.at_once, watch=build.watch, memory_bytes=TASK_BYTES
        ):
            best = found if best is None else merge_topk([best, found], k)
            step.advance()
    if best is None:
        raise IndexBuildError("the data set has no vectors")
    truth = best[1] if own is None else drop_own(best[1], own, per_row=build.per_row)
    return HeldOut(queries, own, truth[:, :depth], source, build.per_row)


def tune(build: Build, sources: Sequence[IndexSource], held_out: HeldOut) -> Quality:
    """Find the effort with which searches for k results, as they will be made, reach the target.

    Args:
        build: names target, kind, k, and the candidates that are scored again.
        sources: files or pieces that together are the index.
        held_out: queries and truth.
    """
    spec, k = build.spec, min(build.k, held_out.truth.shape[1])
    truth = first_chunks(held_out.truth) if held_out.per_row else held_out.truth
    graphs = spec.kind is Kind.SHARDS
    # The width decides how far a graph is walked, and how hard passages that lack are looked for, so these
    # are searched for what will be asked and no more.
    width = build.rescore or (k if graphs or held_out.per_row else max(k, MEASURED_K))
    smallest = width if graphs else 1
    largest = {Kind.IVF: spec.nlist, Kind.FLAT: 1, Kind.SHARDS: max(MAX_EF_SEARCH, 4 * width)}[spec.kind]
    searchers = start_searchers(build.storage, sources, build.at_once)
    chooser = searchers[0] if spec.kind is Kind.IVF else None
    step = build.step("tuning", "searches", None)

    asked = Asked(
        results=k,
        vectors=build.manifest.vectors,
        passages=build.manifest.rows_out,
        largest_effort=largest,
    )

    def candidates_at(effort: int, width: int, some: HeldOut) -> Candidates:
        def search(numbers: IdArray, fetched: int, effort: int | None) -> IdArray:
            rows = some.queries[numbers]
            return search_all(searchers, rows, fetched, effort, build.watch, chooser=chooser)[1]

        found = (
            passages_at(search, effort, width, some, asked)
            if some.per_row
            else all_at(search, effort, width, some)
        )
        step.advance()
        return found

    def as_searched(candidates: Candidates) -> IdArray:
        return candidates.reached if build.rescore else candidates.listed

    last: dict[int, Candidates] = {}

    def remembered(effort: int) -> IdArray:
        last.clear()  # the chosen effort is searched last, or once more
        last[effort] = candidates_at(effort, width, held_out)
        return as_searched(last[effort])

    try:
        with step:
            tuning = tune_effort(
                remembered,
                truth,
                build.settings.recall_target,
                largest,
                k=k,
                smallest=smallest,
                measure_ceiling=False,
            )
            chosen = tuning.chosen.effort
            candidates = last[chosen] if chosen in last else candidates_at(chosen, width, held_out)
            deeper = max(width, RERANKED_PER_RESULT * k)
            reranked = candidates if deeper == width else candidates_at(chosen, deeper, held_out)
            few = held_out.first(None if tuning.ceiling else CEILING_QUERIES)
            if tuning.ceiling is None:
                found = as_searched(candidates_at(largest, width, few))
                tuning = dataclasses.replace(
                    tuning, ceiling=measure(found, truth[: len(few.queries)], largest, k)
                )
    finally:
        for searcher in searchers:
            ray.kill(searcher)
    return Quality(
        k=k,
        tuning=tuning,
        of_codes=measure(candidates.listed, truth, chosen, k),
        rescored=measure_recall(reranked.reached, truth, k),
        reranked_candidates=min(deeper, build.manifest.vectors),
        ceiling_queries=len(few.queries),
    )


def _even_groups(
    groups: Sequence[tuple[FileFact, ...]], count: int
) -> list[tuple[tuple[FileFact, ...], ...]]:
    """Deal groups of shards to at most ``count`` tasks of near-equal rows, in order."""
    ends = np.cumsum([sum(fact.rows for fact in group) for group in groups])
    numbers = (ends - 1) * min(count, len(groups)) // ends[-1]
    return [
        tuple(group for group, at in zip(groups, numbers, strict=True) if at == number)
        for number in np.unique(numbers)
    ]


def _draw(build: Build, among: Sequence[IdArray] | None) -> tuple[FloatArray, IdArray]:
    """Draw index.num_queries rows at most, of all or of those given for each shard; with their ids."""
    rng = np.random.default_rng(SEED + 1)
    rows = np.array([fact.rows for fact in build.shards] if among is None else [len(some) for some in among])
    total = int(rows.sum())
    places = np.sort(rng.choice(total, min(build.settings.num_queries, total), replace=False))
    starts = np.cumsum(rows) - rows
    tasks = []
    for number, (fact, start, count) in enumerate(
        zip(build.shards, starts.tolist(), rows.tolist(), strict=True)
    ):
        drawn = places[(places >= start) & (places < start + count)] - start
        groups: dict[int, list[int]] = {}
        for row in (drawn if among is None else among[number][drawn]).tolist():
            groups.setdefault(row // ROW_GROUP_ROWS, []).append(row % ROW_GROUP_ROWS)
        if groups:
            tasks.append((build.storage, build.root, fact, groups))
    found = build.run(sample_task, tasks, step="drawing queries", things="shards", memory_bytes=TASK_BYTES)
    vectors = np.concatenate([vectors for vectors, _ in found]).astype(np.float32)
    return vectors, np.concatenate([ids for _, ids in found])
