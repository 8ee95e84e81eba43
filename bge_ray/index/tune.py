"""Measure recall, and find the smallest effort that reaches a target."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from bge_ray.errors import IndexBuildError
from bge_ray.index.topk import NO_RESULT
from bge_ray.records.ids import IdArray
from bge_ray.records.index import Recall

RECALL_DEPTHS = (1, 10, 100)
_Z_95 = 1.959964

# effort (nprobe or efSearch) -> (n_queries, at least k) int64 ids, best first.
SearchAt: TypeAlias = Callable[[int], IdArray]


@dataclass(frozen=True)
class Measurement:
    """Recalls at one effort, by k in rising order."""

    effort: int
    recalls: tuple[Recall, ...]

    def at(self, k: int) -> Recall:
        """Return the recall at k, which must have been measured."""
        return next(recall for recall in self.recalls if recall.k == k)


@dataclass(frozen=True)
class Tuning:
    """What was found.

    ``chosen`` is the smallest effort that reaches the target, or the largest if none does
    (``reached`` false). ``ceiling`` is the recall that the code allows at most, at the largest
    effort; None if it was not measured. ``curve`` holds every measurement, effort rising.
    """

    target: float
    reached: bool
    chosen: Measurement
    ceiling: Measurement | None
    curve: tuple[Measurement, ...]


def measure_recall(found: IdArray, truth: IdArray, k: int) -> Recall:
    """Compare results with the truth.

    Args:
        found: (n_queries, at least k) ids, best first; NO_RESULT is never right.
        truth: (n_queries, at least k) ids from exact search; holes where fewer exist. Queries
            without any true result do not count.
        k: depth on both sides.

    Raises:
        IndexBuildError: no queries with a result, other numbers of queries, or too few columns.
    """
    if len(found) != len(truth) or min(found.shape[1], truth.shape[1]) < k:
        raise IndexBuildError(f"recall@{k} needs {k} columns: found {found.shape}, truth {truth.shape}")
    wanted = truth[:, :k]
    real = wanted != NO_RESULT
    hits = among(wanted, found[:, :k]) & real
    counted = real.any(axis=1)
    n_queries = int(counted.sum())
    if not n_queries:
        raise IndexBuildError("recall needs at least one query with a true result")
    value = float((hits.sum(axis=1)[counted] / real.sum(axis=1)[counted]).mean())
    low, high = wilson(value, n_queries)
    return Recall(k, value, low, high)


def among(wanted: IdArray, found: IdArray) -> npt.NDArray[np.bool_]:
    """Tell which of (n, k) ids are in the same row of (n, m) ids."""
    rows = [np.isin(some, there) for some, there in zip(wanted, found, strict=True)]
    return np.stack(rows) if rows else np.empty(wanted.shape, np.bool_)


def rescored(candidates: IdArray, truth: IdArray) -> IdArray:
    """Return what is found once candidates are scored again exactly, up to the depth of the truth.

    The truth is in the order of exact scores, so its ids that are among the candidates come first, in its
    order: place p of the truth is at p or before. Places of others are holes here, which are never right.

    Args:
        candidates: (n, m) ids.
        truth: (n, k) ids from exact search.

    Returns:
        (n, k) ids of the truth, NO_RESULT where one is not among the candidates.
    """
    found: IdArray = np.where(among(truth, candidates), truth, NO_RESULT)
    return found


def wilson(share: float, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share seen in ``trials`` independent trials."""
    squared = _Z_95**2 / trials
    centre = (share + squared / 2) / (1 + squared)
    half = _Z_95 / (1 + squared) * math.sqrt(share * (1 - share) / trials + squared / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def measure(found: IdArray, truth: IdArray, effort: int, k: int) -> Measurement:
    """Measure the recall at k, and at every depth of RECALL_DEPTHS that both sides are wide enough for."""
    width = min(found.shape[1], truth.shape[1])
    depths = sorted(depth for depth in {*RECALL_DEPTHS, k} if depth <= width)
    return Measurement(effort, tuple(measure_recall(found, truth, depth) for depth in depths))


def tune_effort(
    search_at: SearchAt,
    truth: IdArray,
    target: float,
    largest: int,
    *,
    k: int = 10,
    smallest: int = 1,
    measure_ceiling: bool = True,
) -> Tuning:
    """Find the smallest effort with recall@k at or above a target, by doubling and bisecting.

    Recall is taken to grow with effort. A target that cannot be reached is a result, not an error.

    Args:
        search_at: searches the held-out queries with an effort.
        truth: (n_queries, at least k) ids from `topk.exact_topk`.
        target: in (0, 1].
        largest: the most that makes sense, nlist for an IVF index.
        k: depth of the recall that is to reach the target.
        smallest: the least effort that differs from none; HNSW widens its walk to what is asked for.
        measure_ceiling: also search with ``largest``, which scans everything.

    Raises:
        IndexBuildError: target, k or largest out of range, or results too narrow for k.
    """
    if not 0 < target <= 1 or k < 1 or not 1 <= smallest <= largest:
        raise IndexBuildError(f"cannot tune recall@{k} to {target} with an effort up to {largest}")
    curve: dict[int, Measurement] = {}

    def reaches(effort: int) -> bool:
        if effort not in curve:
            curve[effort] = measure(search_at(effort), truth, effort, k)
            if all(recall.k != k for recall in curve[effort].recalls):
                raise IndexBuildError(f"results have fewer than {k} columns")
        return curve[effort].at(k).value >= target

    low, high = smallest - 1, smallest
    while not reaches(high) and high < largest:
        low, high = high, min(2 * high, largest)
    reached = reaches(high)
    while reached and high - low > 1:
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle
    if measure_ceiling:
        reaches(largest)
    return Tuning(
        target=target,
        reached=reached,
        chosen=curve[high],
        ceiling=curve.get(largest),
        curve=tuple(curve[effort] for effort in sorted(curve)),
    )
