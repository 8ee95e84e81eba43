"""Names and Arrow schemas of the tables of a data set."""

import hashlib
from collections.abc import Iterable

import pyarrow as pa

OUTPUT_DTYPES = {"float16": pa.float16(), "float32": pa.float32()}
VALUE_BYTES = {"float16": 2, "float32": 4}
TEXT_HASH_BYTES = 16

# Columns that an embedding shard has or may have; a kept column may not take one of these names.
RESERVED_COLUMNS = (
    "vector_id",
    "passage_id",
    "chunk_no",
    "start",
    "end",
    "chunk_text",
    "text_hash",
    "n_tokens",
    "truncated",
    "embedding",
    "sparse",
    "colbert",
)

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("vector_id", pa.int64(), nullable=False),
        pa.field("passage_id", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


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
            pa.field("text_hash", pa.binary(TEXT_HASH_BYTES), nullable=False),
            pa.field("n_tokens", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            pa.field("embedding", pa.list_(element, dim), nullable=False),
            *kept,
        ]
    )


def hash_texts(texts: Iterable[str]) -> pa.Array:
    """Return the hash of each text that a model reads, its instruction included: 16 bytes of blake2b."""
    hashes = [hashlib.blake2b(text.encode(), digest_size=TEXT_HASH_BYTES).digest() for text in texts]
    return pa.array(hashes, pa.binary(TEXT_HASH_BYTES))
