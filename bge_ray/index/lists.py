"""Inverted lists of sparse vectors, and the best k by them, exactly.

Results are those of `topk`: a tie is ordered by id, and a vector that shares no token with a query is none.
"""

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bge_ray.errors import IndexBuildError
from bge_ray.index.bm25 import Saturation, TermStats
from bge_ray.index.selectors import Membership
from bge_ray.index.topk import NO_RESULT, Results, best_rows, merge_topk
from bge_ray.records.arrays import SparseRows, ranges
from bge_ray.records.ids import FloatArray, IdArray, first_ids

# Of one block of lists: what its building holds a few times, and what a query has one sum for.
BLOCK_ENTRIES, BLOCK_VECTORS = 4_000_000, 400_000


@dataclass(frozen=True)
class Lists:
    """The entries of (n,) vectors, token by token.

    Of token ``tokens[t]``, (t,) int32 ascending, they lie from ``offsets[t]`` to ``offsets[t + 1]``, (t + 1,)
    int64: the numbers of the vectors, ``vectors`` (total,) int32, ascending, and their ``weights`` (total,)
    float32. ``ids`` is (n,) int64, ascending, ``sums`` (n,) float64, all weights of a vector together.
    """

    tokens: npt.NDArray[np.int32]
    offsets: IdArray
    vectors: npt.NDArray[np.int32]
    weights: FloatArray
    ids: IdArray
    sums: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    def terms(self) -> TermStats:
        """Return what BM25 must know of these vectors, whose weights are counts."""
        return TermStats(len(self), float(self.sums.sum()), self.tokens, np.diff(self.offsets))


def invert(rows: SparseRows, ids: IdArray) -> Lists:
    """Return the lists of n vectors.

    Args:
        rows: n of them.
        ids: (n,) int64.

    Raises:
        IndexBuildError: the ids are not ascending, or a weight is no finite number.
    """
    if len(ids) != len(rows) or (np.diff(ids) <= 0).any():
        raise IndexBuildError(f"{len(rows)} sparse vectors have {len(ids)} ids that are not ascending")
    weights = rows.values.astype(np.float32)
    if not np.isfinite(weights).all():
        raise IndexBuildError("a sparse vector has a weight that is no finite number")
    vectors = rows.row_numbers
    order = np.argsort(rows.indices, kind="stable")
    indices = rows.indices[order]
    starts = np.flatnonzero(np.diff(indices, prepend=-1))
    return Lists(
        tokens=indices[starts],
        offsets=np.append(starts, len(indices)).astype(np.int64),
        vectors=vectors[order].astype(np.int32),
        weights=weights[order],
        ids=ids,
        sums=np.bincount(vectors, weights, minlength=len(ids)).astype(np.float64),
    )


def blocks_of(parts: Iterable[tuple[SparseRows, IdArray]]) -> Iterator[Lists]:
    """Yield the lists of vectors that come in parts, by ascending ids, as blocks of bounded size.

    Raises:
        IndexBuildError: see `invert`.
    """
    held: list[tuple[SparseRows, IdArray]] = []
    entries = vectors = 0
    for rows, ids in parts:
        if held and (entries + len(rows.indices) > BLOCK_ENTRIES or vectors + len(ids) > BLOCK_VECTORS):
            yield invert(*_joined(held))
            held, entries, vectors = [], 0, 0
        held.append((rows, ids))
        entries += len(rows.indices)
        vectors += len(ids)
    if held:
        yield invert(*_joined(held))


def on_disk(lists: Lists) -> Lists:
    """Return the same lists as views of files that have no name any more and go with this process."""
    return Lists(**{field.name: _on_disk(getattr(lists, field.name)) for field in dataclasses.fields(lists)})


def search_lists(
    queries: SparseRows,
    blocks: Iterable[Lists],
    k: int,
    *,
    saturation: Saturation | None = None,
    per_row: bool = False,
    passes: Membership | None = None,
) -> Results:
    """Find the k vectors with the largest sums of products of weights, block by block.

    Each sum is in float64, token by token, so that it does not depend on how vectors are dealt to blocks.
    Memory: one sum a vector of a block, and the results.

    Args:
        queries: n of them.
        blocks: of different vectors.
        k: results a query.
        saturation: what becomes of the weights, which are counts then; None: they are as they are.
        per_row: of the chunks of a corpus row only the best counts, so that k results are k rows.
        passes: tells which vectors count; None: all.

    Raises:
        IndexBuildError: k is below 1.
    """
    if k < 1:
        raise IndexBuildError(f"k is {k}")
    found = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for block in blocks:
        if not len(block) or not len(queries):
            continue
        marks = None if passes is None else passes(block.ids)
        if marks is not None and not marks.any():
            continue
        parts = [found, _search_block(queries, block, found[0], k, saturation, marks, per_row=per_row)]
        if not per_row:
            found = merge_topk(parts, k)
            continue
        scores, ids = (np.concatenate(both, axis=1) for both in zip(*parts, strict=True))
        found = best_rows((scores, ids), min(k, max(1, ids.shape[1])))
    return found


def _search_block(
    queries: SparseRows,
    block: Lists,
    so_far: FloatArray,
    k: int,
    saturation: Saturation | None,
    marks: npt.NDArray[np.bool_] | None,
    *,
    per_row: bool,
) -> Results:
    """Return the k best marked vectors of a block, and holes; what is worse than k ``so_far`` may lack."""
    norms = None if saturation is None else saturation.norms(block.sums)
    starts = np.flatnonzero(np.diff(first_ids(block.ids), prepend=-1)) if per_row else None
    least = so_far[:, -1] if so_far.shape[1] == k else np.zeros(len(queries), np.float32)
    chosen = []
    for number in range(len(queries)):
        scores = _scores(queries, number, block, norms)
        scores = scores if marks is None else scores * marks
        places = _best(scores, starts, k, float(least[number]))
        chosen.append((scores[places], block.ids[places]))
    width = max(1, *(len(ids) for _, ids in chosen))
    scores = np.full((len(queries), width), -np.inf, np.float32)
    ids = np.full((len(queries), width), NO_RESULT, np.int64)
    for number, (some, named) in enumerate(chosen):
        scores[number, : len(some)], ids[number, : len(some)] = some, named
    return scores, ids


def _scores(
    queries: SparseRows, number: int, block: Lists, norms: npt.NDArray[np.float64] | None
) -> FloatArray:
    """Return the (n,) scores of the vectors of a block for one query; 0 of those that share no token."""
    some = slice(queries.offsets[number], queries.offsets[number + 1])
    wanted, weights = queries.indices[some], queries.values[some].astype(np.float64)
    places = np.minimum(np.searchsorted(block.tokens, wanted), len(block.tokens) - 1)
    there = block.tokens[places] == wanted if len(block.tokens) else np.zeros(len(wanted), np.bool_)
    places, weights = places[there], weights[there]
    starts, stops = block.offsets[places], block.offsets[places + 1]
    if not len(starts):
        return np.zeros(len(block), np.float32)
    spans = list(zip(starts.tolist(), stops.tolist(), strict=True))
    vectors = np.concatenate([block.vectors[a:b] for a, b in spans])
    products = np.concatenate([block.weights[a:b] for a, b in spans]).astype(np.float64)
    if norms is not None:
        products /= products + norms[vectors]
    products *= np.repeat(weights, stops - starts)
    return np.bincount(vectors, products, minlength=len(block)).astype(np.float32)


def _best(scores: FloatArray, starts: IdArray | None, k: int, least: float) -> IdArray:
    """Return the places of the k best scores above 0, in order; with ``starts`` the best of each row's."""
    tops = scores if starts is None else np.maximum.reduceat(scores, starts)
    hopeful = np.flatnonzero((tops >= least) & (tops > 0))
    if len(hopeful) > k:
        worst = np.partition(tops[hopeful], -k)[-k]
        hopeful = hopeful[tops[hopeful] >= worst]
    hopeful = hopeful[np.argsort(-tops[hopeful], kind="stable")][:k]
    if starts is None or not len(hopeful):
        return hopeful
    lengths = np.append(starts[1:], len(scores))[hopeful] - starts[hopeful]
    places, of_row = ranges(starts[hopeful], lengths), np.repeat(np.arange(len(hopeful)), lengths)
    hit = scores[places] == tops[hopeful][of_row]
    _, first = np.unique(of_row[hit], return_index=True)
    chosen: IdArray = places[hit][first]
    return chosen


def _joined(parts: list[tuple[SparseRows, IdArray]]) -> tuple[SparseRows, IdArray]:
    lengths = np.concatenate([np.diff(rows.offsets) for rows, _ in parts])
    rows = SparseRows(
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        np.concatenate([rows.indices for rows, _ in parts]),
        np.concatenate([rows.values for rows, _ in parts]),
    )
    return rows, np.concatenate([ids for _, ids in parts])


def _on_disk(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    with tempfile.TemporaryFile(prefix="bge-ray-lists-") as file:
        array.tofile(file)
        return mapped(file, array.dtype, len(array))


def mapped(file: BinaryIO, kind: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
    """Return so many numbers of a file that has no name as a view, which outlives the open file."""
    if not count:  # of which there is no map
        return np.empty(0, kind)
    file.flush()
    return np.memmap(file, kind, "r", shape=(count,))
