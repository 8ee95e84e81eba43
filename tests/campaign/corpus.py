"""The texts of a campaign: a corpus in mixed formats with some bad rows, how it changes, and queries."""

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
CHANGES = ("changed", "new", "removed", "edited", "renamed", "copied")
# After these texts are there whose vectors are there already.
REUSING = frozenset({"edited", "renamed", "copied"})
EDITED_ROWS = 3
QUERIES = 60
BAD_QUERIES = (
    b'{"_id": "q-half", "text"\n'
    b'{"_id": "q-blank", "text": "  "}\n'
    b'{"_id": null, "text": "a query without an id"}\n'
)
QUERY_LINES = QUERIES + BAD_QUERIES.count(b"\n")


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
    elif state == "edited":
        objects[lines] = _edited(objects[lines], spare)
    elif state == "renamed":
        objects[f"renamed-{first}"] = objects.pop(first)
    elif state == "copied":
        objects[f"copy-of-{first}"] = objects[first]
    return objects


def _edited(lines: bytes, spare: list[dict[str, str]]) -> bytes:
    """Return JSONL with a row inserted, the next one gone, and the one after it with another text."""
    rows = lines.splitlines(keepends=True)
    inserted, other = spare[:2]
    third = json.loads(rows[2]) | {"text": other["text"]}
    return b"".join([rows[0], jsonl_bytes([inserted, third]), *rows[EDITED_ROWS:]])


@lru_cache
def queries() -> bytes:
    """Return the queries as JSONL: titles of passages, or their first sentences, and some bad lines."""
    records = docstrings(ROWS + SPARE)[:ROWS]
    lines = []
    for number, record in enumerate(records[:: ROWS // QUERIES]):
        text = record["title"] if number % 2 else record["text"].strip().partition(".")[0]
        lines.append({"_id": f"q-{number:02d}", "text": text or record["title"]})
    good = [json.dumps(line).encode() + b"\n" for line in lines]
    middle = len(good) // 2
    return b"".join([*good[:middle], BAD_QUERIES, *good[middle:]])


def corpus_hash(state: str = "base") -> str:
    """Name the content of a state, to tell a reference made from other texts."""
    digest = hashlib.sha256(queries())
    for name, data in sorted(corpus(state).items()):
        digest.update(name.encode() + hashlib.sha256(data).digest())
    return digest.hexdigest()[:16]
