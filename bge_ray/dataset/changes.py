"""What each published manifest added and removed against the one before it: the feed of a data set."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bge_ray.errors import DatasetMismatchError, SettingsError
from bge_ray.records.canonical import digest, from_json, to_json
from bge_ray.records.dataset import Manifest, Marker
from bge_ray.records.ids import id_range
from bge_ray.records.plan import Unit
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
    ranges = sorted(_ids(marker.unit) for marker in markers)
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
        DatasetMismatchError: a file is not one of ours, or one that leads to the manifest is gone.
        SettingsError: ``since`` is neither 0 nor the number of a change of that line.
    """
    # First: a change that is published meanwhile does not follow from it, and is left for the next time.
    manifest = storage.read_optional(join(root, "manifest.json"))
    return _line(storage, root, digest(manifest) if manifest is not None else None, since)


def _line(storage: Storage, root: str, published: str | None, since: int) -> list[Change]:
    """Return the changes after a number that lead to the manifest of a digest; see `read_changes`."""
    changes = [_read(storage, root, number) for number in _numbers(storage, root)]
    follows = [*(change.before for change in changes[1:]), published]
    real = [c for c, following in zip(changes, follows, strict=False) if c.after == following]
    last = real[-1] if real else None
    if (None if last is None else last.after) != published:
        raise DatasetMismatchError(
            f"{join(root, 'changes')}: no file in it leads to manifest.json, the newest is gone; restore it, "
            "or start anew from manifest.json once another run has published"
        )
    known = next((change for change in changes if change.number == since), None)
    # One whose run died before it published: the next one began where it began.
    never_was = known and any(c.before == known.before for c in changes if c.number > since)
    if since and (known is None or never_was):
        raise SettingsError(
            f"--since {since}: no change of that number leads to the manifest of {root}, the last one is "
            f"{0 if last is None else last.number}; start anew with 0"
        )
    before = known.after if known is not None else None
    line = [change for change in real if change.number > since]
    for change in line:
        if change.before != before:
            raise DatasetMismatchError(
                f"{_uri(root, change.number)}: the change before it is gone; start anew from manifest.json, "
                f"and go on with --since {line[-1].number}"
            )
        before = change.after
    return line


@dataclass(frozen=True)
class Difference:
    """What became of a data set after a change: to be applied in the order of the fields.

    ``number`` is the change that leads to what is there now. The ids in the ranges of ``removed`` are gone.
    Of the shards of ``replaced`` there were rows of the same ids before, of ``added`` none.
    """

    number: int
    removed: tuple[tuple[int, int], ...]
    replaced: tuple[Marker, ...]
    added: tuple[Marker, ...]


def read_difference(storage: Storage, root: str, manifest: Manifest, since: int) -> Difference:
    """Return what became of a data set after a change, whatever was there for a while in between.

    Args:
        storage: where to read.
        root: folder of the data set.
        manifest: its manifest.
        since: number of the change that is known; 0 for nothing.

    Raises:
        DatasetMismatchError, SettingsError: as `read_changes`.
    """
    changes = _line(storage, root, manifest_digest(manifest), since)
    gone: list[tuple[int, int]] = []
    born: list[tuple[int, int]] = []
    paths: set[str] = set()
    for change in changes:
        # Neither what the follower never had, nor what goes a second time.
        gone = sorted([*gone, *_without(_without(change.removed_ids, born), gone)])
        born = sorted([*_without(born, change.removed_ids), *_without(change.added_ids, gone)])
        paths = (paths - set(change.removed)) | set(change.added)
    replaced: list[Marker] = []
    added: list[Marker] = []
    for marker in manifest.shards:
        if marker.embeddings is not None and marker.embeddings.path in paths:
            (replaced if _without([_ids(marker.unit)], gone) != [_ids(marker.unit)] else added).append(marker)
    live = sorted(_ids(marker.unit) for marker in replaced)
    number = changes[-1].number if changes else since
    return Difference(number, tuple(_without(gone, live)), tuple(replaced), tuple(added))


def _ids(unit: Unit) -> tuple[int, int]:
    return id_range(unit.object_no, unit.first_row, unit.n_rows)


def _without(ranges: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what is left of ascending ranges once all that is in other ascending ranges is taken out."""
    left: list[tuple[int, int]] = []
    place = 0
    for start, stop in ranges:
        while place < len(others) and others[place][1] <= start:
            place += 1
        k = place
        while k < len(others) and others[k][0] < stop:
            if others[k][0] > start:
                left.append((start, others[k][0]))
            start = max(start, others[k][1])
            k += 1
        if start < stop:
            left.append((start, stop))
    return left
