"""Which shards of an earlier state may have the texts of an object: by version, name and size, or all.

A wrong guess costs time and never a vector, since what is taken is proved by the hash of its text.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bge_ray.formats.corpus import ScannedObject
from bge_ray.pipeline.embed.tasks import ReadTask, Source
from bge_ray.records.canonical import digest
from bge_ray.records.dataset import DatasetSpec, FileFact, Manifest, Marker
from bge_ray.records.plan import NO_VERSION, CorpusObject, Plan

# Objects that a new one is compared with.
MAX_EARLIER = 4
# What a unit looks at: so many shards, and so many rows of them, whose hashes are in memory at once.
NEAR_SHARDS, NEAR_ROWS = 64, 400_000
# Changes with every change of how texts are shared, or of what the files of that say.
SHARING_FORMAT = 1


class EarlierObjects:
    """The objects of the plan before, as a new object may be found among them."""

    def __init__(self, previous: Plan | None, listed: Iterable[str]) -> None:
        """Take the plan before, and the URIs that are there now."""
        there = set(listed)
        self._by_uri: dict[str, list[CorpusObject]] = defaultdict(list)
        self._by_version: dict[tuple[int, str], list[CorpusObject]] = defaultdict(list)
        self._by_size: dict[int, list[CorpusObject]] = defaultdict(list)
        self._gone_by_name: dict[str, list[CorpusObject]] = defaultdict(list)
        for known in previous.objects if previous else ():
            self._by_uri[known.uri].append(known)
            self._by_size[known.size].append(known)
            if known.etag != NO_VERSION:
                self._by_version[known.size, known.etag].append(known)
            if known.uri not in there:
                self._gone_by_name[_name(known.uri)].append(known)

    def of(self, scan: ScannedObject) -> tuple[int, ...]:
        """Return the numbers of objects that may hold texts of a new one, the likeliest first.

        Those are objects of the same version under any name (moved, renamed, copied), the object's own
        earlier version, objects of the same size (a copy on a disk has a time of its own), and objects gone
        that had the name; and what each of them was compared with, which a run that did not end leaves.
        """
        info = scan.info
        found = [
            *self._by_version[info.size, info.version],
            *self._by_uri[info.uri],
            *self._by_size[info.size],
            *self._gone_by_name[_name(info.uri)],
        ]
        numbers = [number for known in found for number in (known.object_no, *known.earlier)]
        return tuple(dict.fromkeys(numbers))[:MAX_EARLIER]


def earlier_shards(
    manifest: Manifest | None, finished: Mapping[str, Marker], plan: Plan, vector_fingerprint: str
) -> dict[int, list[Source]]:
    """Return the shards whose vectors may be reused, by the number of their object.

    They are the same for every attempt at a run, so that a run that was cut off encodes the same texts when
    it goes on: the published shards, and those that earlier runs finished of objects that are gone.

    Args:
        manifest: of the last complete run.
        finished: the markers of all that is finished, by unit name.
        plan: of this run.
        vector_fingerprint: of the data set.
    """
    published = manifest.shards if manifest and manifest.vector_fingerprint == vector_fingerprint else ()
    names = {marker.unit.name for marker in published}
    alive = {corpus_object.object_no for corpus_object in plan.objects}
    left = (m for m in finished.values() if m.unit.name not in names and m.unit.object_no not in alive)
    found: dict[int, list[Source]] = defaultdict(list)
    for marker in sorted((*published, *left), key=lambda m: m.unit):
        if marker.embeddings is not None:
            unit = marker.unit
            found[unit.object_no].append(
                Source(unit.first_row, unit.n_rows, marker.embeddings, marker.fingerprint)
            )
    return found


@dataclass(frozen=True)
class Places:
    """Who may share texts: shards whose vectors are there, and the parcels of ``tasks``, in this order.

    ``tasks`` are all that is to be done since the last complete run, be it done by now or not, so that every
    attempt at this run shares the same. Their units know their places.
    """

    shards: tuple[FileFact, ...]
    tasks: tuple[ReadTask, ...]

    @staticmethod
    def of(shards: Sequence[FileFact], tasks: Sequence[ReadTask]) -> "Places":
        """Number shards and parcels."""
        place = itertools.count(len(shards))
        numbered = []
        for task in tasks:
            if task.is_group:
                number = next(place)
                numbers = dict.fromkeys((unit.unit.name for unit in task.todo), number)
            else:
                numbers = {unit.unit.name: next(place) for unit in task.todo}
            numbered.append(task.placed(numbers))
        return Places(tuple(shards), tuple(numbered))

    @property
    def n_places(self) -> int:
        """How many there are."""
        return len(self.shards) + sum(task.n_parcels for task in self.tasks)

    def numbers(self) -> dict[str, int]:
        """Return the place of each unit, by its name."""
        return {u.unit.name: u.place for task in self.tasks for u in task.todo if u.place is not None}

    def key(self, spec: DatasetSpec) -> str:
        """Return the name under which these places share: of all that decides what they do."""
        units = [[[u.unit.name, u.fingerprint, u.place] for u in task.todo] for task in self.tasks]
        shards = [[fact.path, fact.sha256] for fact in self.shards]
        return digest([SHARING_FORMAT, spec.vector_fingerprint, units, shards])[:16]


def shareable(shards: Mapping[int, Sequence[Source]], fresh: Iterable[ReadTask]) -> tuple[FileFact, ...]:
    """Return the shards of `earlier_shards` whose texts any parcel may have, in order of their place.

    Not what the very units of ``fresh`` have made, for the same reason that they are no source of their own.
    """
    own = {unit.fingerprint for task in fresh for unit in task.todo}
    sources = (source for number in sorted(shards) for source in shards[number])
    return tuple(source.fact for source in sources if source.fingerprint not in own)


def nearest(
    sources: Sequence[Source], first_row: int, n_rows: int, most_rows: int = NEAR_ROWS
) -> list[Source]:
    """Return the shards nearest to a range of rows: inserted and deleted rows move the others by a few.

    Args:
        sources: the likeliest object's first.
        first_row: of the range.
        n_rows: of the range.
        most_rows: of all shards that are returned, chunks counted; one is always.
    """

    def distance(source: Source) -> int:
        return max(first_row - source.first_row - source.n_rows, source.first_row - first_row - n_rows, 0)

    near: list[Source] = []
    rows = 0
    for source in sorted(sources, key=distance)[:NEAR_SHARDS]:
        rows += source.fact.rows
        if near and rows > most_rows:
            break
        near.append(source)
    return near


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]
