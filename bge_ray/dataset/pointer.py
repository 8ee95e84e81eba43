"""A pointer: a folder that stands for a data set, and is moved from one to another in one step.

What reads by it finds one data set or the other, never a mixture; what has begun reads on where it began.
"""

from dataclasses import dataclass
from typing import Any

from bge_ray.errors import DatasetMismatchError, SettingsError, TakenOverError
from bge_ray.records.canonical import from_json, to_json
from bge_ray.storage.objects import Storage, join

NAME = "pointer.json"


@dataclass(frozen=True)
class Pointer:
    """Where it leads, where it led before (None: nowhere), and since when, in UTC.

    ``back_from`` is what it was led back from, if that was the last move: to go back again is not to go
    forward.
    """

    dataset: str
    before: str | None
    moved_at: str
    format_version: int = 1
    back_from: str | None = None


@dataclass(frozen=True)
class Seen:
    """A pointer as it was read; ``pointer`` is None and ``etag`` empty where there is none yet."""

    pointer: Pointer | None
    etag: str


def read_pointer(storage: Storage, folder: str) -> Seen:
    """Return the pointer of a folder.

    Raises:
        DatasetMismatchError: a file of its name is no pointer, or of a later version.
    """
    uri = join(folder, NAME)
    # The etag is read first: if the pointer is moved in between, a move by this etag is refused.
    info = storage.info(uri)
    data = None if info is None else storage.read_optional(uri)
    if info is None or data is None:
        return Seen(None, "")
    try:
        pointer = from_json(Pointer, data)
    except ValueError as error:
        raise DatasetMismatchError(f"{uri}: is no pointer of ours ({error}); move it away") from error
    if pointer.format_version != 1:
        raise DatasetMismatchError(f"{uri}: is of version {pointer.format_version}, this release reads 1")
    return Seen(pointer, info.etag)


def follow(storage: Storage, uri: str) -> str:
    """Return the data set that a folder stands for: that of its pointer, or else itself."""
    pointer = read_pointer(storage, uri).pointer
    return uri if pointer is None else pointer.dataset


def refuse_pointer(storage: Storage, uri: Any, key: str) -> None:
    """Refuse a pointer where a data set itself is needed.

    Raises:
        SettingsError: names where it leads.
    """
    if uri is not None and (pointer := read_pointer(storage, str(uri)).pointer) is not None:
        raise SettingsError(
            f"{key} {uri}: is a pointer, which leads to {pointer.dataset}; name the data set itself"
        )


def move(storage: Storage, folder: str, seen: Seen, to: Pointer) -> None:
    """Let a pointer lead elsewhere, in one request.

    Args:
        storage: where to write.
        folder: of the pointer.
        seen: what it was when this move was decided on.
        to: what it is to be.

    Raises:
        TakenOverError: somebody else moved it since.
    """
    uri, data = join(folder, NAME), to_json(to)
    moved = storage.create(uri, data) if seen.pointer is None else storage.replace(uri, data, seen.etag)
    if not moved:
        raise TakenOverError(
            f"{uri}: was moved by somebody else meanwhile; look where it leads and run again"
        )
