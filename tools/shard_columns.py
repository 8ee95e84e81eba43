"""What compressing each column of an embedding shard costs, and what it saves.

`python tools/shard_columns.py [ROWS]` prints the table of docs/measured.md: seconds of CPU of the best of
three writes of one column to a Parquet file in memory, as a shard has it, and the bytes of that file. The
passages are the docstrings of this Python and its packages, over and over with another number; vectors are of
unit norm with dimensions of unequal spread, as those of encoders are.
"""

import io
import itertools
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.dataset.commit import ROW_GROUP_ROWS
from bge_ray.formats.docstrings import find_docstrings
from bge_ray.records.ids import vector_ids
from bge_ray.records.schemas import hash_texts

DIM, TOKENS = 768, 85
COMPRESSIONS = ("none", "snappy", "zstd")


def make_shard(n_rows: int) -> pa.Table:
    """Return n rows as a unit of a plain data set has them, with two kept columns."""
    rng = np.random.default_rng(0)
    found = list(itertools.islice(find_docstrings(), n_rows))
    told = [found[i % len(found)] for i in range(n_rows)]
    texts = [f"{number} {text}" for number, (*_, text) in enumerate(told)]
    vectors = rng.normal(size=(n_rows, DIM)) * rng.lognormal(0, 0.3, DIM)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kind = pa.list_(pa.field("element", pa.float16(), nullable=False), DIM)
    halves = pa.array(vectors.astype(np.float16).reshape(-1))
    lengths = rng.integers(TOKENS // 2, 2 * TOKENS, n_rows)
    return pa.table(
        {
            "vector_id": vector_ids(0, np.arange(n_rows, dtype=np.int64)),
            "passage_id": [f"{name}-{number}" for number, (name, *_) in enumerate(told)],
            "text_hash": hash_texts(texts),
            "n_tokens": pa.array(rng.integers(3, 512, n_rows).astype(np.int32)),
            "truncated": rng.random(n_rows) < 0.02,
            "embedding": pa.FixedSizeListArray.from_arrays(halves, type=kind),
            "title (kept)": [title for _, title, _ in told],
            "text (kept)": texts,
            "sparse": _sparse(rng, lengths),
        }
    )


def _sparse(rng: np.random.Generator, lengths: np.ndarray) -> pa.Array:
    """Return weights of tokens as bge-m3 makes them."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    drawn = np.minimum(rng.zipf(1.3, offsets[-1]), 250_000).astype(np.int32)
    weights = np.abs(rng.normal(0.1, 0.08, offsets[-1])).astype(np.float16)
    parts = [pa.ListArray.from_arrays(pa.array(offsets), pa.array(part)) for part in (drawn, weights)]
    return pa.StructArray.from_arrays(parts, names=["indices", "values"])


def write(table: pa.Table, compression: str) -> tuple[float, int]:
    """Return the seconds of CPU of the best of three writes, and the bytes."""
    best = float("inf")
    for _ in range(3):
        buffer = io.BytesIO()
        started = time.process_time()
        pq.write_table(
            table,
            buffer,
            compression=compression,
            use_dictionary=[f.name for f in table.schema if f.name == "title (kept)"],
            write_statistics=[n for n in table.column_names if n not in ("embedding", "sparse")],
            row_group_size=ROW_GROUP_ROWS,
            write_page_checksum=True,
        )
        best = min(best, time.process_time() - started)
    return best, buffer.tell()


def main() -> None:
    """Print the table."""
    shard = make_shard(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
    heads = [f"{name} s | {name} MB" for name in COMPRESSIONS]
    print(f"| column | {' | '.join(heads)} |\n|---|{'---|---|' * len(COMPRESSIONS)}")
    for name in shard.column_names:
        cells = [f"{seconds:.3f} | {size / 1e6:.2f}" for seconds, size in measured(shard.select([name]))]
        print(f"| `{name}` | {' | '.join(cells)} |")


def measured(table: pa.Table) -> list[tuple[float, int]]:
    """Return what each compression costs and leaves."""
    return [write(table, compression) for compression in COMPRESSIONS]


if __name__ == "__main__":
    main()
