"""What the stages of an embed run know: the spans that they start from, their units, and where they write."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from ray.actor import ActorHandle

from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.records.dataset import DatasetSpec, FileFact
from bge_ray.records.plan import CorpusObject, Span, Unit
from bge_ray.settings.sections import Reuse
from bge_ray.storage.objects import Storage


@dataclass(frozen=True)
class CorpusUnit:
    """One unit to do: which rows, of which object, under which fingerprint.

    ``place`` is the number of its parcel among those that share texts; None where they do not.
    """

    unit: Unit
    fingerprint: str
    uri: str
    place: int | None = None


@dataclass(frozen=True)
class UnitsTask:
    """Units that travel together: one of a large object, or those of a group of small ones.

    The table may hold rows of other units of the group, which are done already and only encoded with them.
    """

    units: tuple[CorpusUnit, ...]

    @property
    def name(self) -> str:
        """Name of the first unit."""
        return self.units[0].unit.name

    @property
    def place(self) -> int | None:
        """Number of the parcel; see `CorpusUnit`."""
        return self.units[0].place

    def parcel(self) -> Parcel:
        """Return the units as they travel."""
        return Parcel.of(self.name, self)


@dataclass(frozen=True)
class Source:
    """A shard whose texts may be those of an object: of ``n_rows`` rows from ``first_row`` on of its own.

    ``fingerprint`` is that of the unit that made it.
    """

    first_row: int
    n_rows: int
    fact: FileFact
    fingerprint: str


@dataclass(frozen=True)
class SpanTask:
    """One span to read: the object (without its other spans) and the units of it that are to do.

    ``sources`` are shards that its texts may have vectors in.
    """

    corpus_object: CorpusObject
    span: Span
    todo: tuple[CorpusUnit, ...]
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class ReadTask:
    """What one task reads: a span, whose units go on one by one, or the spans of a group, which go together.

    Of a group all spans are there, also those with nothing to do.
    """

    spans: tuple[SpanTask, ...]

    @property
    def todo(self) -> tuple[CorpusUnit, ...]:
        """The units to do, in plan order."""
        return tuple(unit for span in self.spans for unit in span.todo)

    @property
    def is_group(self) -> bool:
        """Tell whether the units go on together."""
        return len(self.spans) > 1

    @property
    def n_parcels(self) -> int:
        """How many parcels come of it."""
        return 1 if self.is_group else len(self.todo)

    def placed(self, places: Mapping[str, int]) -> "ReadTask":
        """Return it with the places of its units to do, by their names."""
        return self._with(lambda todo: tuple(replace(u, place=places[u.unit.name]) for u in todo))

    def only(self, places: Collection[int]) -> "ReadTask":
        """Return it with those of its units to do whose place is one of some."""
        return self._with(lambda todo: tuple(unit for unit in todo if unit.place in places))

    def _with(self, change: Callable[[tuple[CorpusUnit, ...]], tuple[CorpusUnit, ...]]) -> "ReadTask":
        return ReadTask(tuple(replace(span, todo=change(span.todo)) for span in self.spans))

    def parcel(self) -> Parcel:
        """Return it as it travels to the stage that reads."""
        return Parcel.of(self.todo[0].unit.name, self)


@dataclass(frozen=True)
class Shared:
    """Where places, numbered from 0, leave what they give to each other; see `dataset.shared`.

    ``folder`` is below the data set's. The first ``n_shards`` of the ``n_places`` are shards, the others
    parcels. Texts are shared in ``n_buckets``.
    """

    folder: str
    n_shards: int
    n_places: int
    n_buckets: int

    def hashes_path(self, place: int) -> str:
        """Return the path of the texts of some places, of which the given one is the first."""
        return f"{self.folder}/hashes/{place:08d}"

    def shared_path(self, bucket: int) -> str:
        """Return the path of who gives what to whom, of the texts of a bucket."""
        return f"{self.folder}/shared/{bucket:08d}"

    def given_path(self, place: int) -> str:
        """Return the path of what a place gives."""
        return f"{self.folder}/given/{place:08d}"


@dataclass(frozen=True)
class EmbedJob:
    """What reading and writing tasks must know; holds no connection and no secret.

    ``shared`` is where texts of other parcels and shards are found, with `output.reuse: corpus`.
    """

    storage: Storage
    root: str
    spec: DatasetSpec
    compression: str
    trust_remote_code: bool
    max_attempts: int
    ledger: ActorHandle
    reuse: Reuse
    shared: Shared | None = None
