"""Columns of outputs as numpy arrays, without a Python object a row; views where Arrow has the same bytes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.records.ids import IdArray
from bge_ray.records.outputs import VALUE_BYTES


@dataclass(frozen=True)
class SparseRows:
    """Weights of n rows: a matrix in compressed rows.

    Row i has the ``indices`` (total,) int32, ascending, and the ``values`` (total,) from ``offsets[i]`` to
    ``offsets[i + 1]``, of (n + 1,) int64.
    """

    offsets: IdArray
    indices: npt.NDArray[np.int32]
    values: npt.NDArray[np.floating[Any]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: IdArray) -> "SparseRows":
        """Return the given (m,) rows, in their order."""
        offsets, places = _places(self.offsets, rows)
        return SparseRows(offsets, self.indices[places], self.values[places])

    @property
    def row_numbers(self) -> IdArray:
        """(total,) of which row each entry is."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


@dataclass(frozen=True)
class MultiRows:
    """Some vectors of each of n rows: row i has ``vectors[offsets[i]:offsets[i + 1]]`` of (total, dim)."""

    offsets: IdArray
    vectors: npt.NDArray[np.floating[Any]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: IdArray) -> "MultiRows":
        """Return the given (m,) rows, in their order."""
        offsets, places = _places(self.offsets, rows)
        return MultiRows(offsets, self.vectors[places])


def ranges(starts: IdArray, lengths: IdArray) -> IdArray:
    """Return the numbers of (n,) ranges, one after the other: each of its length, from its start on."""
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) + np.repeat(starts - ends + lengths, lengths)


def _places(offsets: IdArray, rows: IdArray) -> tuple[IdArray, IdArray]:
    """Return (m + 1,) offsets of m rows that are taken out, and where their entries are."""
    starts, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]), ranges(starts, lengths)


def whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return a column as one array, also one without rows, which has no chunk to begin with."""
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def dense_rows(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.floating[Any]]:
    """Return (n, dim) of a dense output."""
    array = whole(column)
    flat: npt.NDArray[np.floating[Any]] = array.flatten().to_numpy()
    return flat.reshape(len(array), array.type.list_size)


def sparse_rows(column: pa.Array | pa.ChunkedArray) -> SparseRows:
    """Return the weights of a sparse output."""
    array = whole(column)
    offsets, indices = _lists(pc.struct_field(array, "indices"))
    _, values = _lists(pc.struct_field(array, "values"))
    return SparseRows(offsets, indices.to_numpy(), values.to_numpy())


def multi_rows(column: pa.Array | pa.ChunkedArray, dtype: str) -> MultiRows:
    """Return the vectors of a multi output; ``dtype`` is what its bytes are, as `Output.dtype` has it."""
    offsets, vectors = _lists(whole(column))
    width = vectors.type.byte_width
    data = vectors.buffers()[1]
    if data is None or not len(vectors):
        return MultiRows(offsets, np.zeros((0, width // VALUE_BYTES[dtype]), dtype))
    numbers = np.frombuffer(data, dtype, len(vectors) * width // VALUE_BYTES[dtype], vectors.offset * width)
    return MultiRows(offsets, numbers.reshape(len(vectors), -1))


def _lists(column: pa.ListArray) -> tuple[IdArray, pa.Array]:
    """Return (n + 1,) offsets from 0 on and the values, also of a slice."""
    offsets = column.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], column.values.slice(offsets[0], offsets[-1] - offsets[0])
