"""Vector ids: a vector is named by its place, never by when it arrived.

``vector_id = object_no << 41 | row_no << 13 | chunk_no`` (22, 28 and 13 bits), so retries and resumed runs
give the same ids, an id leads back to its row without a lookup table, and a removed object is one range
of ids.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

FORMAT_VERSION = 2

CHUNK_BITS = 13
ROW_BITS = 28
OBJECT_BITS = 22  # 63 bits together: ids are never negative in int64, and FAISS uses -1 for "no result"
MAX_CHUNKS_PER_ROW = 1 << CHUNK_BITS
MAX_ROWS_PER_OBJECT = 1 << ROW_BITS
MAX_OBJECTS = 1 << OBJECT_BITS

IdArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]


class Places(NamedTuple):
    """Where vectors come from: (n,) int64 each."""

    object_no: IdArray
    row_no: IdArray
    chunk_no: IdArray


def vector_ids(
    object_no: int, rows: npt.NDArray[np.integer], chunks: npt.NDArray[np.integer] | int = 0
) -> IdArray:
    """Pack places in one corpus object into vector ids.

    Args:
        object_no: number of the object in the plan, in [0, MAX_OBJECTS).
        rows: (n,) row numbers within the object, each in [0, MAX_ROWS_PER_OBJECT).
        chunks: (n,) numbers within their rows, each in [0, MAX_CHUNKS_PER_ROW); 0 where rows are whole.

    Returns:
        (n,) int64, all >= 0, ascending where (rows, chunks) are.
    """
    high = np.int64(object_no) << (ROW_BITS + CHUNK_BITS)
    return high | (rows.astype(np.int64) << CHUNK_BITS) | np.asarray(chunks, dtype=np.int64)


def split_vector_ids(ids: IdArray) -> Places:
    """Return the places of (n,) int64 vector ids."""
    return Places(
        ids >> (ROW_BITS + CHUNK_BITS),
        (ids >> CHUNK_BITS) & (MAX_ROWS_PER_OBJECT - 1),
        ids & (MAX_CHUNKS_PER_ROW - 1),
    )


def first_ids(ids: IdArray) -> IdArray:
    """Return for (n,) vector ids that of the first chunk of the same row."""
    return ids & ~np.int64(MAX_CHUNKS_PER_ROW - 1)


def id_range(object_no: int, first_row: int, n_rows: int) -> tuple[int, int]:
    """Return (start, stop) of the ids that the vectors of a range of rows may have."""
    start = (object_no << (ROW_BITS + CHUNK_BITS)) | (first_row << CHUNK_BITS)
    return start, start + (n_rows << CHUNK_BITS)
