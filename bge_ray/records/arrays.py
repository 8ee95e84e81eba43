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
