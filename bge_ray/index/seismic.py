"""Sparse vectors in an index of Seismic, which finds most of the best without looking at all lists.

It says which vectors may be the best; their scores are summed again from what is stored, as an exact search
does, so that a score never depends on the approximation. The package is an extra.
"""

import contextlib
import importlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bge_ray.errors import IndexBuildError, InstallationError
from bge_ray.index.lists import Lists, mapped, search_lists
from bge_ray.index.refill import REFILL
from bge_ray.index.topk import NO_RESULT, Results, best, best_rows
from bge_ray.index.tune import measure_recall
from bge_ray.records.arrays import SparseRows
from bge_ray.records.ids import FloatArray, IdArray
from bge_ray.records.index import Recall
from bge_ray.records.sparse import Pruning, SparseChoice

# From the cheapest to the dearest; each finds more than the one before.
LADDER = (
    Pruning(5, 1.0),
    Pruning(8, 0.9),
    Pruning(12, 0.8),
    Pruning(20, 0.7),
    Pruning(64, 0.5),
)
# What its smaller kind of index numbers tokens with.
_SMALL_TOKENS = 1 << 16


def package() -> Any:
    """Return the module of Seismic.

    Raises:
        InstallationError: it cannot be imported.
    """
    try:
        found = importlib.import_module("seismic")
    except ImportError as error:
        raise InstallationError(
            "search.sparse approximate: Seismic cannot be imported: run `pip install 'bge-ray[seismic]'`, on "
            f"Linux on x86-64, or set search.sparse to exact ({error})"
        ) from error
    if not hasattr(found, "SeismicDatasetLV"):
        raise InstallationError(
            f"search.sparse approximate: the module seismic at {getattr(found, '__file__', None)} is not "
            "that of pyseismic-lsr 0.5.4 or newer: run `pip install 'bge-ray[seismic]'`"
        )
    return found


class SeismicIndex:
    """The vectors of some lists in an index of Seismic, in memory; what they store is on disk beside it.

    The same lists make the same index, however many threads make it.
    """

    def __init__(self, blocks: Sequence[Lists], threads: int) -> None:
        """Make it of the blocks, which are kept: they answer what it cannot.

        Args:
            blocks: of different vectors, by ascending ids.
            threads: that making it may use.

        Raises:
            InstallationError: see `package`.
        """
        seismic = package()
        began = time.time()
        self._blocks = blocks
        self._ids = np.concatenate([np.empty(0, np.int64), *(block.ids for block in blocks)])
        self._tokens = np.unique(np.concatenate([np.empty(0, np.int32), *(block.tokens for block in blocks)]))
        self._rows = _stored(blocks)
        # Tokens are numbered anew: it keeps a list for each number up to the largest.
        small = len(self._tokens) < _SMALL_TOKENS
        kinds = ("SeismicDataset", "SeismicIndex") if small else ("SeismicDatasetLV", "SeismicIndexLV")
        make_dataset, make_index = (getattr(seismic, name) for name in kinds)
        dataset = make_dataset(len(self._tokens))
        starts = np.cumsum([0, *(len(block) for block in blocks)])
        for start, stop in itertools.pairwise(starts.tolist()):
            rows = self._rows[np.arange(start, stop)]
            numbers = np.searchsorted(self._tokens, rows.indices).astype(np.int64)
            dataset.add_documents_by_id(
                [str(i) for i in range(start, stop)], numbers, rows.values, rows.offsets
            )
        self._index: Any = None
        if len(self._tokens):
            with _silent():
                self._index = make_index.build_from_dataset(dataset, num_threads=threads)
        self._word: Any = seismic.get_seismic_string()
        self.build_s = time.time() - began

    def __len__(self) -> int:
        return len(self._ids)

    def search(self, queries: SparseRows, k: int, pruning: Pruning, *, per_row: bool = False) -> Results:
        """Return of each query the best k that are found; one that finds fewer than k is searched exactly.

        Args:
            queries: n of them.
            k: results a query.
            pruning: what is left out.
            per_row: of the chunks of a corpus row only the best counts, so that k results are k rows.

        Raises:
            IndexBuildError: k is below 1.
        """
        if k < 1:
            raise IndexBuildError(f"k is {k}")
        fetched = min(k * (REFILL if per_row else 1), len(self))
        scores = np.full((len(queries), fetched), -np.inf, np.float32)
        ids = np.full((len(queries), fetched), NO_RESULT, np.int64)
        for number, (start, stop) in enumerate(itertools.pairwise(queries.offsets.tolist())):
            tokens, weights = queries.indices[start:stop], queries.values[start:stop]
            places = self._candidates(tokens, weights, fetched, pruning)
            sums = _sums(tokens, weights, self._rows[places])
            there = sums > 0
            n = int(there.sum())
            scores[number, :n], ids[number, :n] = sums[there], self._ids[places[there]]
        found = best_rows((scores, ids), k) if per_row else best(scores, ids, k)
        short = np.flatnonzero((found[1] == NO_RESULT).any(axis=1))
        if len(short):
            exact = best(*search_lists(queries[short], self._blocks, k, per_row=per_row), k)
            found[0][short], found[1][short] = exact
        return found

    def _candidates(
        self, tokens: npt.NDArray[np.int32], weights: npt.NDArray[Any], k: int, pruning: Pruning
    ) -> IdArray:
        """Return the places of k vectors that may be the best, or of fewer."""
        if self._index is None:
            return np.empty(0, np.int64)
        numbers = np.minimum(np.searchsorted(self._tokens, tokens), len(self._tokens) - 1)
        known = self._tokens[numbers] == tokens
        if not known.any():
            return np.empty(0, np.int64)
        found = self._index.search(
            "",
            numbers[known].astype(self._word),
            weights[known].astype(np.float32),
            k=k,
            query_cut=pruning.query_cut,
            heap_factor=pruning.heap_factor,
        )
        return np.array([int(name) for _, _, name in found], np.int64)


# Queries, results to find, how -> results; None: exactly.
SearchSparse = Callable[[SparseRows, int, Pruning | None], Results]


def choose_pruning(
    search: SearchSparse, queries: SparseRows, k: int, target: float, build_s: float
) -> SparseChoice:
    """Return the cheapest pruning whose recall@k reaches a target; where none does, exact lists are taken.

    Args:
        search: asks all vectors.
        queries: n of them, to be searched exactly and by one pruning after the other.
        k: results a query.
        target: in (0, 1].
        build_s: what making the indexes took, to be told.
    """
    began = time.perf_counter()
    _, truth = best(*search(queries, k, None), k)
    exact_ms = _ms_each(began, len(queries))
    tried: list[SparseChoice] = []
    for pruning in LADDER:
        began = time.perf_counter()
        _, found = best(*search(queries, k, pruning), k)
        spent = _ms_each(began, len(queries))
        recall = _recall(found, truth, k)
        taken = recall is not None and recall.value >= target
        tried.append(SparseChoice(target, taken, pruning, len(queries), recall, exact_ms, spent, build_s))
        if taken or recall is None:
            break
    return tried[-1]


def _recall(found: IdArray, truth: IdArray, k: int) -> Recall | None:
    return measure_recall(found, truth, k) if (truth != NO_RESULT).any() else None


def _ms_each(began: float, count: int) -> float:
    return 1000 * (time.perf_counter() - began) / max(1, count)


def _stored(blocks: Sequence[Lists]) -> SparseRows:
    """Return the rows that lists were made of, as views of files; memory: those of one block."""
    lengths = []
    with tempfile.TemporaryFile(prefix="bge-ray-rows-") as tokens, tempfile.TemporaryFile() as weights:
        for block in blocks:
            order = np.argsort(block.vectors, kind="stable")
            np.repeat(block.tokens, np.diff(block.offsets))[order].tofile(tokens)
            block.weights[order].tofile(weights)
            lengths.append(np.bincount(block.vectors, minlength=len(block)))
        offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
        n = int(offsets[-1])
        return SparseRows(offsets, mapped(tokens, np.int32, n), mapped(weights, np.float32, n))


def _sums(tokens: npt.NDArray[np.int32], weights: npt.NDArray[Any], rows: SparseRows) -> FloatArray:
    """Return the (n,) scores of rows for one query: the sums of `lists.search_lists`, bit for bit."""
    if not len(tokens):
        return np.zeros(len(rows), np.float32)
    places = np.minimum(np.searchsorted(tokens, rows.indices), len(tokens) - 1)
    shared = tokens[places] == rows.indices
    products = rows.values[shared].astype(np.float64) * weights[places[shared]].astype(np.float64)
    return np.bincount(rows.row_numbers[shared], products, minlength=len(rows)).astype(np.float32)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what Seismic prints while it builds out of this process's output: it has no setting for that."""
    sys.stdout.flush()
    with contextlib.ExitStack() as stack, Path(os.devnull).open("wb") as nowhere:
        kept = os.dup(1)
        stack.callback(os.close, kept)
        os.dup2(nowhere.fileno(), 1)
        stack.callback(os.dup2, kept, 1)
        yield
