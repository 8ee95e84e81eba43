"""What each published manifest added and removed against the one before it: the feed of a data set."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from bge_ray.errors import DatasetMismatchError
from bge_ray.records.canonical import digest, from_json, to_json
from bge_ray.records.dataset import Manifest, Marker
from bge_ray.records.ids import id_range
from bge_ray.storage.objects import Storage, join

_NAME = re.compile(r"changes/(\d{6})\.json$")


@dataclass(frozen=True)
class Change:
    """One step from a manifest to the next.

    ``before`` and ``after`` are digests of the manifests; the first step has none before it. ``added`` and
    ``removed`` are paths of shards, ``added_ids`` and ``removed_ids`` ranges [start, stop) of vector ids. A
    change whose ``after`` is neither the ``before`` of the next nor that of manifest.json never was: its run
    died before it published.
    """

    number: int
    before: str | None
    after: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    added_ids: tuple[tuple[int, int], ...]
    removed_ids: tuple[tuple[int, int], ...]


def manifest_digest(manifest: Manifest) -> str:
    """Return the name by which changes refer to a manifest."""
    return digest(to_json(manifest))


def write_change(storage: Storage, root: str, before: Manifest | None, after: Manifest) -> Change | None:
    """Write the change that is about to be published; it is there before the manifest is.

    Returns:
        The change, or None if the manifests are the same.

    Raises:
        DatasetMismatchError: the newest change is not one of ours.
    """
    was = manifest_digest(before) if before is not None else None
    now = manifest_digest(after)
    if was == now:
        return None
    there = {marker.unit: marker for marker in (before.shards if before is not None else ())}
    wanted = {marker.unit: marker for marker in after.shards}
    added = [m for unit, m in wanted.items() if there.get(unit) != m]
    removed = [m for unit, m in there.items() if wanted.get(unit) != m]
    number, latest = _latest(storage, root)
    what = (was, now, _paths(added), _paths(removed), _id_ranges(added), _id_ranges(removed))
    if latest == Change(number, *what):
        return latest  # of a run that died before it published just this
    # No number is given twice: whoever has read a change knows it by that.
    while True:
        number += 1
        change = Change(number, *what)
        if storage.create(_uri(root, number), to_json(change)):
            return change


def check_changes(storage: Storage, root: str) -> None:
    """Make sure that the newest change, which the next one follows, is one of ours; reads only.

    Raises:
        DatasetMismatchError: it is not.
    """
    _latest(storage, root)


def _latest(storage: Storage, root: str) -> tuple[int, Change | None]:
    numbers = _numbers(storage, root)
    if not numbers:
        return 0, None
    return numbers[-1], _read(storage, root, numbers[-1])


def _read(storage: Storage, root: str, number: int) -> Change:
    uri = _uri(root, number)
    try:
        return from_json(Change, storage.read(uri))
    except ValueError as error:
        raise DatasetMismatchError(
            f"{uri}: not a change of ours, or damaged ({error}); restore it, or move it away"
        ) from error


def _numbers(storage: Storage, root: str) -> list[int]:
    """Return the numbers of the changes that are there, ascending."""
    found = (_NAME.search(info.uri) for info in storage.list_files(join(root, "changes")))
    return sorted(int(match.group(1)) for match in found if match is not None)


def _uri(root: str, number: int) -> str:
    return join(root, "changes", f"{number:06d}.json")


def _paths(markers: Iterable[Marker]) -> tuple[str, ...]:
    return tuple(sorted(m.embeddings.path for m in markers if m.embeddings is not None))


def _id_ranges(markers: Iterable[Marker]) -> tuple[tuple[int, int], ...]:
    """Return the ranges of ids of units, neighbours joined."""
    units = sorted(marker.unit for marker in markers)
    ranges = [id_range(u.object_no, u.first_row, u.n_rows) for u in units]
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def read_changes(storage: Storage, root: str, since: int = 0) -> list[Change]:
    """Return the changes after a number, in order, without those that never were published.

    Raises:
        DatasetMismatchError: a file is not one of ours.
    """
    changes = [_read(storage, root, number) for number in _numbers(storage, root)]
    manifest = storage.read_optional(join(root, "manifest.json"))
    published = digest(manifest) if manifest is not None else None
    follows = [*(change.before for change in changes[1:]), published]
    real = [c for c, following in itertools.zip_longest(changes, follows) if c.after == following]
    return [change for change in real if change.number > since]
