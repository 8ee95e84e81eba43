"""Corpora for tests: real texts in every format the job reads, and what should come out."""

import csv
import gzip
import io
import itertools
import json
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from bge_ray.formats.docstrings import find_docstrings


@lru_cache(maxsize=1)
def docstrings(limit: int) -> list[dict[str, str]]:
    """Real passages: docstrings of Python and its packages, as records with id, title and text."""
    found = itertools.islice(find_docstrings(), limit)
    return [
        {"id": f"{number}:{name}", "title": title, "text": text}
        for number, (name, title, text) in enumerate(found)
    ]


def parquet_bytes(records: list[dict[str, str]], row_group_size: int = 500) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=row_group_size)
    return sink.getvalue()


def jsonl_bytes(records: list[dict[str, str]]) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)


def csv_bytes(records: list[dict[str, str]]) -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return sink.getvalue().encode()


def mixed_objects(records: list[dict[str, str]], pieces: int = 5) -> dict[str, bytes]:
    """Spread records over the formats; returns content by file name."""
    encoders = {
        "a.parquet": parquet_bytes,
        "b.jsonl": jsonl_bytes,
        "c.jsonl.gz": lambda r: gzip.compress(jsonl_bytes(r), mtime=0),
        "d.jsonl.zst": lambda r: zstandard.compress(jsonl_bytes(r)),
        "e.csv": csv_bytes,
    }
    size = -(-len(records) // pieces)
    objects = {}
    for number in range(pieces):
        name, encode = list(encoders.items())[number % len(encoders)]
        objects[f"{number:03d}-{name}"] = encode(records[number * size : (number + 1) * size])
    return objects
