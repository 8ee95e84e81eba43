"""How good an index is: recall against exact search, and the smallest effort that reaches a target."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import ray

from bge_ray.dataset.commit import ROW_GROUP_ROWS
from bge_ray.errors import IndexBuildError
from bge_ray.index.factory import Kind
from bge_ray.index.topk import NO_RESULT, Results, merge_topk
from bge_ray.index.tune import Measurement, Tuning, measure, measure_recall, tune_effort
from bge_ray.pipeline.engine.tasks import run_tasks
from bge_ray.pipeline.index.searchers import IndexSource, search_all, start_searchers
from bge_ray.pipeline.index.steps import SEED, TASK_BYTES, Build
from bge_ray.pipeline.index.tasks import exact_task, sample_task
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import FloatArray, IdArray
from bge_ray.records.index import Recall

TUNED_K = 10
MEASURED_K = 100
MAX_EF_SEARCH = 512
# The ceiling scans every vector for each query; this many say it within a per cent.
CEILING_QUERIES = 200
# Exact searches of one CPU; each returns (queries, k) results to the driver.
EXACT_TASKS_PER_CPU = 4


@dataclass(frozen=True)
class HeldOut:
    """Queries with their exact results.

    ``queries`` are (n, dim) float32, ``truth`` (n, up to MEASURED_K) int64. ``own`` are the (n,) int64
    ids of queries that are rows of the data set, which count neither as results nor as truth; None
    for queries of the user.
    """

    queries: FloatArray
    own: IdArray | None
    truth: IdArray

    def results(self, ids: IdArray) -> IdArray:
        """Return (n, k - 1) results without each query's own row, or (n, k) where there is none."""
        return ids if self.own is None else drop_own(ids, self.own)

    @property
    def fetched_k(self) -> int:
        """Results to ask for, so that ``results`` is as wide as ``truth``."""
        return int(self.truth.shape[1]) + (self.own is not None)


@dataclass(frozen=True)
class Quality:
    """What was measured.

    ``rescored`` is the recall after the candidates were scored again exactly, ``ceiling_queries`` how
    many queries the ceiling in ``tuning`` was measured with.
    """

    tuning: Tuning
    rescored: Recall
    ceiling_queries: int


def hold_out(build: Build, given: FloatArray | None) -> HeldOut:
    """Search all shards exactly, side by side, for the given (n, dim) queries or for rows drawn as such."""
    rows = sum(fact.rows for fact in build.shards)
    queries, own = (given, None) if given is not None else _draw(build)
    if rows == 1:
        own = None  # beside its own row there is nothing to find
    k = min(MEASURED_K, rows) + (own is not None)
    shared = ray.put(queries)
    groups = _even_groups(build.shards, EXACT_TASKS_PER_CPU * build.at_once)
    arguments = ((build.storage, build.root, group, shared, k) for group in groups)
    best: Results | None = None
    with build.step("searching exactly", "groups of shards", len(groups)) as step:
        for _, found in run_tasks(
            exact_task, arguments, at_once=build.at_once, watch=build.watch, memory_bytes=TASK_BYTES
        ):
            best = found if best is None else merge_topk([best, found], k)
            step.advance()
    if best is None:
        raise IndexBuildError("the data set has no vectors")
    truth = best[1] if own is None else drop_own(best[1], own)
    return HeldOut(queries, own, truth[:, : min(MEASURED_K, rows)])


def tune(build: Build, sources: Sequence[IndexSource], held_out: HeldOut) -> Quality:
    """Find the effort, and measure what it gives.

    Args:
        build: names target and kind.
        sources: files or pieces that together are the index.
        held_out: queries and truth.
    """
    spec = build.spec
    largest = {Kind.IVF: spec.nlist, Kind.FLAT: 1, Kind.SHARDS: MAX_EF_SEARCH}[spec.kind]
    searchers = start_searchers(build.storage, sources, build.at_once)
    step = build.step("tuning", "searches", None)
    last: dict[int, IdArray] = {}

    def search_at(effort: int, n_queries: int | None = None) -> IdArray:
        some = dataclasses.replace(
            held_out,
            queries=held_out.queries[:n_queries],
            own=None if held_out.own is None else held_out.own[:n_queries],
        )
        _, ids = search_all(searchers, some.queries, held_out.fetched_k, effort, build.watch)
        step.advance()
        return some.results(ids)

    def remembered(effort: int) -> IdArray:
        last.clear()  # the chosen effort is searched last, or once more
        last[effort] = search_at(effort)
        return last[effort]

    depth = min(TUNED_K, held_out.truth.shape[1])
    try:
        with step:
            tuning = tune_effort(
                remembered,
                held_out.truth,
                build.settings.recall_target,
                largest,
                k=TUNED_K if depth == TUNED_K else 1,
                measure_ceiling=False,
            )
            chosen = tuning.chosen.effort
            candidates = last[chosen] if chosen in last else search_at(chosen)
            asked = len(held_out.queries)
            if tuning.ceiling is None:
                asked = min(asked, CEILING_QUERIES)
                ceiling = measure(search_at(largest, asked), held_out.truth[:asked], largest)
                tuning = dataclasses.replace(tuning, ceiling=ceiling)
    finally:
        for searcher in searchers:
            ray.kill(searcher)
    # Exact scores order the candidates as the truth does, so re-ranked recall@10 is the share of the
    # true 10 best that are among the candidates at all.
    in_reach = held_out.truth[:, :depth]
    hits = np.where((in_reach[:, :, None] == candidates[:, None, :]).any(axis=2), in_reach, NO_RESULT)
    return Quality(tuning, measure_recall(hits, in_reach, depth), asked)


def tuned_recall(measurement: Measurement) -> Recall:
    """Return the recall that the target is about: at TUNED_K, or at what a tiny data set allows."""
    return next((r for r in measurement.recalls if r.k == TUNED_K), measurement.recalls[0])


def drop_own(ids: IdArray, own: IdArray) -> IdArray:
    """Return (n, k - 1) results without each query's own row, from (n, k) results."""
    keep: npt.NDArray[np.bool_] = ids != own[:, None]
    # Where a query did not find itself, its last result goes instead.
    keep[keep.all(axis=1), -1] = False
    rest: IdArray = ids[keep].reshape(len(ids), -1)
    return rest


def _even_groups(facts: Sequence[FileFact], count: int) -> list[tuple[FileFact, ...]]:
    """Deal shards to at most ``count`` groups of near-equal rows, in order."""
    ends = np.cumsum([fact.rows for fact in facts])
    numbers = (ends - 1) * min(count, len(facts)) // ends[-1]
    return [
        tuple(fact for fact, at in zip(facts, numbers, strict=True) if at == number)
        for number in np.unique(numbers)
    ]


def _draw(build: Build) -> tuple[FloatArray, IdArray]:
    rng = np.random.default_rng(SEED + 1)
    rows = np.array([fact.rows for fact in build.shards])
    places = np.sort(
        rng.choice(int(rows.sum()), min(build.settings.num_queries, int(rows.sum())), replace=False)
    )
    starts = np.cumsum(rows) - rows
    tasks = []
    for fact, start in zip(build.shards, starts.tolist(), strict=True):
        groups: dict[int, list[int]] = {}
        for row in (places[(places >= start) & (places < start + fact.rows)] - start).tolist():
            groups.setdefault(row // ROW_GROUP_ROWS, []).append(row % ROW_GROUP_ROWS)
        if groups:
            tasks.append((build.storage, build.root, fact, groups))
    found = build.run(sample_task, tasks, step="drawing queries", things="shards", memory_bytes=TASK_BYTES)
    vectors = np.concatenate([vectors for vectors, _ in found]).astype(np.float32)
    return vectors, np.concatenate([ids for _, ids in found])
