"""What checks come to, and what they read with: plain clients, not our own code."""

import hashlib
import io
import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass
class Findings:
    """What a check came to; ``broken`` has a line for each guarantee that does not hold."""

    broken: list[str] = field(default_factory=list)
    rows: int = 0
    lost: int = 0
    doubled: int = 0


def names_below(fs: Any, folder: str, foreign: frozenset[str]) -> set[str]:
    """Return the names below a folder, at any depth, without the foreign ones."""
    return {path.partition(f"{folder}/")[2] for path in fs.find(folder) if path not in foreign}


def read_json(fs: Any, path: str) -> dict[str, Any]:
    return json.loads(fs.cat_file(path))


def read_table(fs: Any, path: str) -> pa.Table:
    """Read a Parquet file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not whole.
    """
    data = fs.cat_file(path)
    try:
        return pq.read_table(io.BytesIO(data))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: {error}") from error


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_fact(fs: Any, path: str, fact: dict[str, Any]) -> list[str]:
    """Compare a file with what was vouched for: its number of bytes, its sha256, the rows of a table."""
    try:
        data = fs.cat_file(path)
    except FileNotFoundError:
        return [f"{path}: missing"]
    if (len(data), sha256(data)) != (fact["bytes"], fact["sha256"]):
        return [f"{path}: other bytes than were vouched for"]
    if path.endswith(".parquet") and pq.read_metadata(io.BytesIO(data)).num_rows != fact["rows"]:
        return [f"{path}: other rows than were vouched for"]
    return []
