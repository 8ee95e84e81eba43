"""Names and Arrow schemas of the tables of a data set."""

import hashlib
from collections.abc import Iterable, Sequence

import pyarrow as pa

from bge_ray.records.chunking import Chunking
from bge_ray.records.outputs import Output

TEXT_HASH_BYTES = 16

# Where a chunk lies in its text: its number, and its characters in the text as it stands in the corpus.
SPAN_COLUMNS = ("chunk_no", "start", "end")
# Columns that an embedding shard has or may have; a kept column may not take one of these names.
RESERVED_COLUMNS = (
    "vector_id",
    "passage_id",
    *SPAN_COLUMNS,
    "chunk_text",
    "text_hash",
    "n_tokens",
    "truncated",
    "embedding",
    "sparse",
    "colbert",
    "bm25",
)

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("vector_id", pa.int64(), nullable=False),
        pa.field("passage_id", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


def embedding_schema(
    outputs: Sequence[Output], kept: pa.Schema, chunking: Chunking | None = None
) -> pa.Schema:
    """Schema of an embedding shard.

    Args:
        outputs: of the model, a column each.
        kept: the metadata columns carried along, with their types.
        chunking: how texts are cut; ``start`` and ``end`` (exclusive) count characters of the text as it
            stands in the corpus.
    """
    chunk = []
    if chunking is not None:
        chunk = [pa.field(name, pa.int32(), nullable=False) for name in SPAN_COLUMNS]
        if chunking.keep_text:
            chunk.append(pa.field("chunk_text", pa.string(), nullable=False))
    return pa.schema(
        [
            pa.field("vector_id", pa.int64(), nullable=False),
            pa.field("passage_id", pa.string(), nullable=False),
            *chunk,
            pa.field("text_hash", pa.binary(TEXT_HASH_BYTES), nullable=False),
            pa.field("n_tokens", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            *(output.field() for output in outputs),
            *kept,
        ]
    )


def hash_texts(texts: Iterable[str]) -> pa.Array:
    """Return the hash of each text that a model reads, its instruction included: 16 bytes of blake2b."""
    hashes = [hashlib.blake2b(text.encode(), digest_size=TEXT_HASH_BYTES).digest() for text in texts]
    return pa.array(hashes, pa.binary(TEXT_HASH_BYTES))
