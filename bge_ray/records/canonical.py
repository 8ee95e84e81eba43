"""The one JSON and the one digest of everything that is written down: same content, same bytes."""

import dataclasses
import functools
import hashlib
import json
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

R = TypeVar("R")


def to_json(record: Any) -> bytes:
    """Return a record as indented UTF-8 JSON with sorted keys: same record, same bytes."""
    return (
        json.dumps(dataclasses.asdict(record), sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    ).encode()


def from_json(kind: type[R], data: bytes | str) -> R:
    """Rebuild a record of the given kind from its JSON.

    Raises:
        ValueError: not JSON, or not this kind of record; says in one line what is wrong first.
    """
    try:
        found: R = reader_of(cast(type, kind)).validate_json(data)
    except ValidationError as error:
        raise ValueError(_first_fault(error)) from error
    return found


@functools.cache
def reader_of(kind: type) -> TypeAdapter[Any]:
    """Return what builds records of a kind from JSON, made once: that takes as long as many readings."""
    return TypeAdapter(kind)


def _first_fault(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False, include_input=False)
    place = ".".join(str(part) for part in first["loc"])
    return (f"{place}: " if place else "") + first["msg"] + (f", and {len(others)} more" if others else "")


def digest(*values: Any) -> str:
    """Return the hex sha256 over values that JSON can hold, or bytes; their borders count."""
    sha = hashlib.sha256()
    for value in values:
        data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
