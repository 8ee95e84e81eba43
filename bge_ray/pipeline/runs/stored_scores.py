"""Queries against what is stored of passages, as FlagEmbedding's ``compute_score`` scores them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bge_ray.index.scores import colbert_scores, dense_scores, sparse_scores
from bge_ray.records.arrays import MultiRows, SparseRows, dense_rows, multi_rows, sparse_rows
from bge_ray.records.ids import FloatArray, IdArray
from bge_ray.records.outputs import Output


def score_stored(
    outputs: Sequence[Output], queries: pa.Table, stored: pa.Table, numbers: IdArray, places: IdArray
) -> dict[str, FloatArray]:
    """Score (p,) pairs of query and vector.

    Args:
        outputs: of the data set.
        queries: n rows with a column for each of them.
        stored: m rows with a column for each of them, as shards hold them.
        numbers: (p,) of the queries.
        places: (p,) of the vectors in ``stored``.

    Returns:
        (p,) scores by the name of the output.
    """
    order = np.argsort(numbers, kind="stable")
    edges = np.flatnonzero(np.diff(numbers[order], prepend=-1, append=-1))
    scores = {output.name: np.empty(len(numbers), np.float32) for output in outputs}
    for output in outputs:
        asked = _Asked(output, queries)
        there = asked.stored(stored)
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            some = order[start:stop]
            scores[output.name][some] = asked.score(int(numbers[some[0]]), there, places[some])
    return scores


class _Asked:
    """One output of queries, to be compared with what is stored of it."""

    def __init__(self, output: Output, queries: pa.Table) -> None:
        self._output = output
        # Queries are as they were computed, whatever is stored of passages.
        self._queries = _rows(queries[output.name], output.kind, "float32")

    def stored(self, table: pa.Table) -> npt.NDArray[np.floating] | SparseRows | MultiRows:
        return _rows(table[self._output.name], self._output.kind, self._output.dtype)

    def score(
        self, number: int, stored: npt.NDArray[np.floating] | SparseRows | MultiRows, places: IdArray
    ) -> FloatArray:
        query, passages = self._queries[np.array([number])], stored[places]
        if isinstance(query, SparseRows) and isinstance(passages, SparseRows):
            return sparse_scores(query, passages)
        if isinstance(query, MultiRows) and isinstance(passages, MultiRows):
            return colbert_scores(query.vectors, passages)
        return dense_scores(np.asarray(query)[0], np.asarray(passages))


def _rows(
    column: pa.ChunkedArray, kind: str, dtype: str
) -> npt.NDArray[np.floating] | SparseRows | MultiRows:
    if kind == "dense":
        return dense_rows(column)
    return sparse_rows(column) if kind == "sparse" else multi_rows(column, dtype)
