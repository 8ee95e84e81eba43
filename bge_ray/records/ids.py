"""Names and layouts shared by every file of a data set: ids, columns, Arrow schemas.

It knows no storage, no model and no index. A vector is named by its place:
``vector_id = object_no << 32 | row_no``, so retries and resumed runs give the same ids and an id
leads back to its row without a lookup table.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

FORMAT_VERSION = 1

ROW_BITS = 32
MAX_ROWS_PER_OBJECT = 1 << ROW_BITS
MAX_OBJECTS = 1 << 31  # keeps vector_id >= 0 in int64; FAISS uses -1 for "no result"

OUTPUT_DTYPES = {"float16": pa.float16(), "float32": pa.float32()}
VALUE_BYTES = {"float16": 2, "float32": 4}

# Columns that every embedding shard has; a kept column may not take one of these names.
RESERVED_COLUMNS = ("vector_id", "passage_id", "n_tokens", "truncated", "embedding")

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("vector_id", pa.int64(), nullable=False),
        pa.field("passage_id", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)

IdArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]


def vector_ids(object_no: int, rows: npt.NDArray[np.integer]) -> IdArray:
    """Pack row numbers of one corpus object into vector ids.

    Args:
        object_no: number of the object in the plan, in [0, MAX_OBJECTS).
        rows: (n,) row numbers within the object, each in [0, MAX_ROWS_PER_OBJECT).

    Returns:
        (n,) int64, all >= 0.
    """
    return (np.int64(object_no) << ROW_BITS) | rows.astype(np.int64)


def split_vector_ids(ids: IdArray) -> tuple[IdArray, IdArray]:
    """Return (object_no, row_no), each (n,) int64, of (n,) int64 vector ids."""
    return ids >> ROW_BITS, ids & (MAX_ROWS_PER_OBJECT - 1)


def embedding_schema(dim: int, dtype: str, kept: pa.Schema) -> pa.Schema:
    """Schema of an embedding shard.

    Args:
        dim: length of one embedding.
        dtype: a key of OUTPUT_DTYPES.
        kept: the metadata columns carried along, with their types.
    """
    element = pa.field("element", OUTPUT_DTYPES[dtype], nullable=False)
    return pa.schema(
        [
            pa.field("vector_id", pa.int64(), nullable=False),
            pa.field("passage_id", pa.string(), nullable=False),
            pa.field("n_tokens", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            pa.field("embedding", pa.list_(element, dim), nullable=False),
            *kept,
        ]
    )
