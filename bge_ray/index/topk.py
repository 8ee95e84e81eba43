"""The best k of several result lists, of all vectors, and of candidates scored again.

Results are a pair: scores (n_queries, k) float32, best first, and ids (n_queries, k) int64. Ties are
ordered by id. Where there are fewer than k results, the end holds NO_RESULT with score -inf.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bge_ray.errors import IndexBuildError
from bge_ray.index.package import faiss
from bge_ray.index.vectors import check_rows, check_vectors, normalise
from bge_ray.records.ids import FloatArray, IdArray, first_ids

NO_RESULT = -1
# Candidates beyond k that are scored exactly, so that rounding decides nothing at place k.
_MARGIN = 16
_SCORE_BYTES = 64 << 20
# Float32 inner products of unit vectors are off by less than this.
_ROUNDING = np.float32(1e-4)

Results: TypeAlias = tuple[FloatArray, IdArray]
# (p,) numbers of queries and (p,) vector ids -> (p,) scores of these pairs.
ScorePairs: TypeAlias = Callable[[IdArray, IdArray], FloatArray]


def best(scores: FloatArray, ids: IdArray, k: int) -> Results:
    """Sort each row by falling score, then rising id, holes last, and keep k columns.

    Args:
        scores: (n_queries, m) float32.
        ids: (n_queries, m) int64; NO_RESULT marks a hole, whatever its score.
        k: results to keep; rows are filled with holes if m < k.
    """
    if k < 1 or scores.shape != ids.shape:
        raise IndexBuildError(f"k is {k}, scores are {scores.shape} for ids {ids.shape}")
    if short := k - scores.shape[1]:
        pad = ((0, 0), (0, max(short, 0)))
        scores = np.pad(scores, pad)
        ids = np.pad(ids, pad, constant_values=NO_RESULT)
    holes = ids == NO_RESULT
    scores = np.where(holes, np.float32(-np.inf), scores)
    order = np.lexsort((ids, -scores, holes), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def merge_topk(results: Sequence[Results], k: int) -> Results:
    """Merge the results of several indexes for the same queries.

    Args:
        results: at least one; each with any number of columns, and holes.
        k: results to keep.

    Returns:
        k columns, or as many as all results together have, if these are fewer.

    Raises:
        IndexBuildError: nothing to merge, or the numbers of queries differ.
    """
    if len({len(ids) for _, ids in results}) != 1:
        raise IndexBuildError(f"cannot merge results of {[len(ids) for _, ids in results]} queries")
    scores = np.concatenate([scores for scores, _ in results], axis=1)
    return best(scores, np.concatenate([ids for _, ids in results], axis=1), min(k, max(1, scores.shape[1])))


def best_rows(results: Results, k: int) -> Results:
    """Keep of each corpus row its best chunk, and of these the best k, as `best` does.

    Args:
        results: any number of columns, in any order, and holes.
        k: rows to keep; the ends of those that have fewer are holes.
    """
    scores, ids = best(*results, max(1, results[1].shape[1]))
    rows = first_ids(ids)
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    again = np.zeros(ids.shape, np.bool_)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    repeated = np.empty_like(again)
    np.put_along_axis(repeated, order, again, axis=1)
    return best(scores, np.where(repeated, NO_RESULT, ids), k)


def exact_topk(
    queries: npt.NDArray[Any],
    blocks: Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]],
    k: int,
    *,
    per_row: bool = False,
) -> Results:
    """Search all vectors exactly, block by block; the truth that recall is measured against.

    Equal vectors get equal scores wherever they stand, so results do not depend on how vectors are
    dealt to blocks. Memory: one block and the results, which are no wider than there are vectors.

    Args:
        queries: (n_queries, dim) float16 or float32, unit norm.
        blocks: (vectors, ids) as `check_vectors` takes them; for instance one embedding shard each.
        k: results a query.
        per_row: of the chunks of a corpus row only the best counts, so that k results are k rows.

    Raises:
        IndexBuildError: `check_vectors` refuses queries or a block.
    """
    dim = queries.shape[-1]
    check_rows(queries, dim, "queries")
    rows = normalise(queries)
    found = np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int64)
    for vectors, block_ids in blocks:
        unit, ids = check_vectors(vectors, block_ids, dim)
        if not len(ids) or not len(rows):
            continue
        if per_row:
            found = _merge_rows([found, _best_chunks(rows, unit, ids, found[0], k)], k)
            continue
        rough, places = faiss.knn(rows, unit, min(k + _MARGIN, len(ids)), metric=faiss.METRIC_INNER_PRODUCT)
        # Most of a later block is worse than the k best so far by more than rounding: not worth scoring.
        full = found[0].shape[1] == k
        hopeful = rough >= found[0][:, -1:] - _ROUNDING if full else np.ones(rough.shape, np.bool_)
        found = merge_topk([found, _score_some(rows, unit, ids, places, hopeful)], k)
    return found


def rescore(candidates: IdArray, score: ScorePairs) -> Results:
    """Score candidates again and sort each row by what they score, ties by id, holes last.

    From their original vectors this restores almost all the recall that a small code costs.

    Args:
        candidates: (n_queries, depth) int64 vector ids, NO_RESULT where there is none.
        score: gives the scores of pairs, as `pair_scores` does.
    """
    numbers, columns = np.nonzero(candidates != NO_RESULT)
    scores = np.empty(candidates.shape, np.float32)
    scores[numbers, columns] = score(numbers, candidates[numbers, columns])
    return best(scores, candidates, max(1, candidates.shape[1]))


def pair_scores(
    queries: npt.NDArray[Any], vectors: npt.NDArray[Any], numbers: IdArray, places: IdArray
) -> FloatArray:
    """Return the inner products of (p,) pairs, as an exact search has them.

    Args:
        queries: (n, dim) float16 or float32, unit norm.
        vectors: (m, dim) float16 or float32, unit norm.
        numbers: (p,) of the queries.
        places: (p,) of the vectors.

    Raises:
        IndexBuildError: a bad query or vector.
    """
    dim = queries.shape[-1]
    check_rows(queries, dim, "queries")
    check_rows(vectors, dim, "candidate vectors")
    return _scores(normalise(queries), normalise(vectors), numbers, places)


def _merge_rows(results: Sequence[Results], k: int) -> Results:
    scores, ids = (np.concatenate(parts, axis=1) for parts in zip(*results, strict=True))
    return best_rows((scores, ids), min(k, max(1, ids.shape[1])))


def _best_chunks(
    queries: FloatArray, vectors: FloatArray, ids: IdArray, so_far: FloatArray, k: int
) -> Results:
    """Return the best chunk of each of the k best rows among (m, dim) vectors, exactly scored.

    Every chunk within rounding of its row's best, in every row within rounding of the k best, is scored, so
    that nothing depends on the order of vectors, however many are equal.

    Args:
        queries: (n, dim) of unit norm.
        vectors: of unit norm.
        ids: (m,) of the vectors.
        so_far: (n, w) falling scores of other rows; with k of them, what is worse than the last is left out.
        k: rows to keep.
    """
    order = np.argsort(ids)
    vectors, ids = vectors[order], ids[order]
    starts = np.flatnonzero(np.diff(first_ids(ids), prepend=-1))
    row_of = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(ids)))
    parts = []
    step = max(1, _SCORE_BYTES // (16 * len(ids)))
    for start in range(0, len(queries), step):
        some, last = queries[start : start + step], so_far[start : start + step]
        rough = some @ vectors.T
        tops = np.maximum.reduceat(rough, starts, axis=1)  # (step, rows)
        least = np.full((len(some), 1), -np.inf, np.float32)
        if len(starts) > k:
            least = np.partition(tops, -k, axis=1)[:, -k, None] - 2 * _ROUNDING
        if last.shape[1] == k:
            least = np.maximum(least, last[:, -1:] - _ROUNDING)
        wanted = rough >= np.maximum(least, tops[:, row_of] - 2 * _ROUNDING)
        which, places = np.nonzero(wanted)
        scores = _scores(some, vectors, which, places)
        # The best chunk of each row, then the rows of each query in order.
        chosen = np.lexsort((places, -scores, row_of[places], which))
        pair = which[chosen] * len(starts) + row_of[places[chosen]]
        chosen = chosen[np.flatnonzero(np.diff(pair, prepend=-1))]
        chosen = chosen[np.lexsort((places[chosen], -scores[chosen], which[chosen]))]
        rank = np.arange(len(chosen)) - np.searchsorted(which[chosen], which[chosen])
        chosen, rank = chosen[rank < k], rank[rank < k]
        found = np.full((len(some), min(k, len(starts))), NO_RESULT, np.int64)
        found[which[chosen], rank] = ids[places[chosen]]
        there = np.full(found.shape, -np.inf, np.float32)
        there[which[chosen], rank] = scores[chosen]
        parts.append((there, found))
    return np.concatenate([s for s, _ in parts]), np.concatenate([i for _, i in parts])


def _score_some(
    queries: FloatArray, vectors: FloatArray, ids: IdArray, places: IdArray, wanted: npt.NDArray[np.bool_]
) -> Results:
    """Score the ``wanted`` of (n_queries, m) places; returns as many columns as one query wants at most."""
    width = max(1, int(wanted.sum(axis=1).max()))
    # The wanted ones of each row come first, in their order.
    order = np.argsort(~wanted, axis=1, kind="stable")[:, :width]
    places, wanted = np.take_along_axis(places, order, axis=1), np.take_along_axis(wanted, order, axis=1)
    scores = np.full(places.shape, -np.inf, np.float32)
    rows, columns = np.nonzero(wanted)
    scores[rows, columns] = _scores(queries, vectors, rows, places[rows, columns])
    return scores, np.where(wanted, ids[places], NO_RESULT)


def _scores(queries: FloatArray, vectors: FloatArray, rows: IdArray, places: IdArray) -> FloatArray:
    """Inner products (m,) of the queries at (m,) rows with the vectors at (m,) places.

    Summed in float64, one pair at a time: a matrix product may round equal rows differently.
    """
    scores = np.empty(len(rows), np.float32)
    step = max(1, _SCORE_BYTES // (16 * queries.shape[1]))
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        scores[some] = np.einsum(
            "pd,pd->p", queries[rows[some]].astype(np.float64), vectors[places[some]].astype(np.float64)
        )
    return scores
