"""The corpus of a campaign: real texts in mixed formats, some bad rows, and how it changes."""

import hashlib
import json
from functools import lru_cache

from tests.support.corpora import docstrings, jsonl_bytes, mixed_objects, parquet_bytes

ROWS = 720
SPARE = 120
UNIT_ROWS = 40
BAD_LINES = b'{"id": "half a line, "text"\n' + b"".join(
    json.dumps(row).encode() + b"\n"
    for row in (
        {"id": None, "text": "no id"},
        {"id": "blank", "text": "  "},
        {"id": "twice", "text": "a text"},
        {"id": "twice", "text": "another text"},
    )
)
CHANGES = ("changed", "new", "removed")


@lru_cache
def corpus(state: str = "base") -> dict[str, bytes]:
    """Return the objects by name: in the base state, or after one of CHANGES."""
    records = docstrings(ROWS + SPARE)
    objects = mixed_objects(records[:ROWS], pieces=6)
    first, lines = sorted(objects)[:2]
    objects[lines] += BAD_LINES
    spare = records[ROWS:]
    if state == "changed":
        objects[first] = parquet_bytes(spare)
    elif state == "new":
        objects["999-late.jsonl"] = jsonl_bytes(spare)
    elif state == "removed":
        del objects[first]
    return objects


def corpus_hash(state: str = "base") -> str:
    """Name the content of a state, to tell a reference made from other texts."""
    digest = hashlib.sha256()
    for name, data in sorted(corpus(state).items()):
        digest.update(name.encode() + hashlib.sha256(data).digest())
    return digest.hexdigest()[:16]
