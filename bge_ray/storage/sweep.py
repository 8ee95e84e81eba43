"""Files that no current state needs any more: they go once they have been dead for a while.

A reader of the state before has that long to end. Whose the files are, the caller must know: only what
it names is ever removed.
"""

import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bge_ray.errors import OutputCollisionError, TakenOverError
from bge_ray.records.canonical import reader_of
from bge_ray.storage.objects import Storage, is_local, join

# The underscore keeps it out of every listing of ours.
RETIRED = "_retired.json"
PARALLEL_REQUESTS = 16


@dataclass(frozen=True)
class Swept:
    """How many files were removed, and how many are dead and still wait."""

    removed: int
    waiting: int


@dataclass(frozen=True)
class _Retired:
    """Since when each file has been dead, in seconds of the clock."""

    since: dict[str, float]
    of: Literal["bge-ray"] = "bge-ray"
    format_version: Literal[1] = 1


def retire(storage: Storage, folder: str, dead: Iterable[str], grace_s: float, now: float) -> Swept:
    """Remove the files that have been dead for a while, and remember since when the others are.

    Args:
        storage: for all requests.
        folder: URI that the files lie below.
        dead: every file that is there and that no current state needs, as paths below the folder. One
            that is not among them any more is taken off the list.
        grace_s: how long a file must have been dead, in seconds.
        now: the time, in seconds of one clock for all runs.

    Raises:
        OutputCollisionError: a foreign file has the name of the list.
        TakenOverError: another run wrote the list meanwhile; nothing was removed.
    """
    uri = join(folder, RETIRED)
    # The etag is older than the content: a list that changes in between is not replaced.
    info, before = storage.info(uri), _read(storage, uri)
    # A clock that was ahead must not keep a file for ever.
    since = {path: min(now, before.get(path, now)) for path in dead}
    due = [path for path, died in since.items() if now - died >= grace_s]
    waiting = {path: died for path, died in sorted(since.items()) if now - died < grace_s}
    # First the list: a file that is off it and still there, as the process died, waits once more.
    if not _write(storage, uri, waiting, info.etag if info is not None else None):
        raise TakenOverError(f"{folder}: another run removes dead files here at the same time")
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        list(pool.map(lambda path: storage.delete([join(folder, path)]), due))
    return Swept(len(due), len(waiting))


def check_retired(storage: Storage, folder: str) -> None:
    """Refuse a folder where a foreign file has the name of the list; reads only.

    Raises:
        OutputCollisionError: it does.
    """
    _read(storage, join(folder, RETIRED))


def is_due(storage: Storage, folder: str, grace_s: float, now: float) -> bool:
    """Tell whether files wait below a folder that have been dead for long enough."""
    since = _read(storage, join(folder, RETIRED))
    return any(now - died >= grace_s for died in since.values())


def remove_empty_folders(storage: Storage, uri: str) -> int:
    """Remove a local folder and those below it as far as there is nothing in them; returns how many went."""

    def remove(fs: Any, path: str) -> int:
        if not is_local(fs) or Path(path).is_symlink():
            return 0
        found = [Path(folder) for folder, _, _ in os.walk(path, topdown=False)]
        return sum(_remove_if_empty(folder) for folder in found)

    return storage.attempt("clean", uri, remove)


def sweep_work(storage: Storage, folder: str, own: re.Pattern[str]) -> None:
    """Remove what lies below a work folder under names of ours, and the folders that are empty then.

    Args:
        storage: for all requests.
        folder: URI of the work folder.
        own: matches whole paths below it.
    """
    name = folder.rstrip("/").rpartition("/")[2]
    listed = storage.list_files(folder)
    found = [info.uri for info in listed if own.fullmatch(info.uri.rpartition(f"/{name}/")[2]) is not None]
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        list(pool.map(lambda uri: storage.delete([uri]), found))
    remove_empty_folders(storage, folder)


def _read(storage: Storage, uri: str) -> dict[str, float]:
    data = storage.read_optional(uri)
    if data is None:
        return {}
    try:
        retired: _Retired = reader_of(_Retired).validate_json(data)
    except ValueError as error:
        raise OutputCollisionError(
            f"{uri}: is not the list of dead files that this version writes; move it away"
        ) from error
    return retired.since


def _write(storage: Storage, uri: str, since: dict[str, float], etag: str | None) -> bool:
    """Write the list on condition that it is the one that was read; no list is kept of nothing."""
    data = json.dumps(asdict(_Retired(since)), indent=1).encode()
    if etag is None:
        return not since or storage.create(uri, data)
    return storage.replace(uri, data, etag) if since else storage.delete_seen(uri, etag)


def _remove_if_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # something is in it, it is a mount point, or its parent is not ours to change
        return False
    return True
