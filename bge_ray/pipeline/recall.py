"""How good an index is: recall against exact search, and the smallest effort that reaches a target."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import ray

from bge_ray.index.factory import Kind
from bge_ray.index.topk import NO_RESULT, Results, merge_topk
from bge_ray.index.tune import Recall, Tuning, measure_recall, tune_effort
from bge_ray.io.shards import ROW_GROUP_ROWS
from bge_ray.pipeline.index_steps import SEED, Build
from bge_ray.pipeline.index_tasks import exact_task, sample_task
from bge_ray.pipeline.searchers import IndexSource, search_all, start_searchers
from bge_ray.pipeline.tasks import run_tasks
from bge_ray.schema import FloatArray, IdArray

TUNED_K = 10
MEASURED_K = 100
MAX_EF_SEARCH = 512


@dataclass(frozen=True)
class HeldOut:
    """Queries with their exact results.

    ``queries`` are (n, dim) float32 rows of the data set, ``own`` their (n,) int64 ids, which count
    neither as results nor as truth; ``truth`` is (n, MEASURED_K) int64.
    """

    queries: FloatArray
    own: IdArray
    truth: IdArray


def hold_out(build: Build) -> HeldOut:
    """Draw rows as queries, and search all shards exactly for them, side by side."""
    queries, own = _draw(build)
    k = min(MEASURED_K, sum(fact.rows for fact in build.facts)) + 1
    shared = ray.put(queries)
    arguments = ((build.storage, build.root, fact, shared, k) for fact in build.facts)
    best: Results | None = None
    for _, found in run_tasks(exact_task, arguments, at_once=build.at_once, watch=build.watch):
        best = found if best is None else merge_topk([best, found], k)
    if best is None:
        raise AssertionError("a data set with vectors has shards")
    return HeldOut(queries, own, drop_own(best[1], own))


def tune(build: Build, sources: Sequence[IndexSource], held_out: HeldOut) -> tuple[Tuning, Recall]:
    """Find the effort; returns the tuning, and recall@10 after exact re-ranking at that effort."""
    spec = build.spec
    largest = {Kind.IVF: spec.nlist, Kind.FLAT: 1, Kind.SHARDS: MAX_EF_SEARCH}[spec.kind]
    searchers = start_searchers(build.storage, sources, build.at_once, num_cpus=0.5)
    k = held_out.truth.shape[1] + 1

    def search_at(effort: int) -> IdArray:
        build.watch()
        _, ids = search_all(searchers, held_out.queries, k, effort)
        return drop_own(ids, held_out.own)

    try:
        depth = min(TUNED_K, held_out.truth.shape[1])
        tuning = tune_effort(
            search_at,
            held_out.truth,
            build.settings.recall_target,
            largest,
            k=TUNED_K if depth == TUNED_K else 1,
            measure_ceiling=True,
        )
        candidates = search_at(tuning.chosen.effort)
    finally:
        for searcher in searchers:
            ray.kill(searcher)
    # Exact scores order the candidates as the truth does, so re-ranked recall@10 is the share of the
    # true 10 best that are among the candidates at all.
    in_reach = held_out.truth[:, :depth]
    hits = np.where((in_reach[:, :, None] == candidates[:, None, :]).any(axis=2), in_reach, NO_RESULT)
    return tuning, measure_recall(hits, in_reach, depth)


def drop_own(ids: IdArray, own: IdArray) -> IdArray:
    """Return (n, k - 1) results without each query's own row, from (n, k) results."""
    keep: npt.NDArray[np.bool_] = ids != own[:, None]
    # Where a query did not find itself, its last result goes instead.
    keep[keep.all(axis=1), -1] = False
    rest: IdArray = ids[keep].reshape(len(ids), -1)
    return rest


def _draw(build: Build) -> tuple[FloatArray, IdArray]:
    rng = np.random.default_rng(SEED + 1)
    rows = np.array([fact.rows for fact in build.facts])
    places = np.sort(
        rng.choice(int(rows.sum()), min(build.settings.num_queries, int(rows.sum())), replace=False)
    )
    starts = np.cumsum(rows) - rows
    tasks = []
    for fact, start in zip(build.facts, starts.tolist(), strict=True):
        groups: dict[int, list[int]] = {}
        for row in (places[(places >= start) & (places < start + fact.rows)] - start).tolist():
            groups.setdefault(row // ROW_GROUP_ROWS, []).append(row % ROW_GROUP_ROWS)
        if groups:
            tasks.append((build.storage, build.root, fact, groups))
    found = build.run(sample_task, tasks)
    return np.concatenate([vectors for vectors, _ in found]), np.concatenate([ids for _, ids in found])
