"""What the stages of an embed run know: the spans that they start from, their units, and where they write."""

from dataclasses import dataclass

from ray.actor import ActorHandle

from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.records.dataset import DatasetSpec, FileFact
from bge_ray.records.plan import CorpusObject, Span, Unit
from bge_ray.settings.sections import Reuse
from bge_ray.storage.objects import Storage


@dataclass(frozen=True)
class CorpusUnit:
    """One unit to do: which rows, of which object, under which fingerprint."""

    unit: Unit
    fingerprint: str
    uri: str


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

    def parcel(self) -> Parcel:
        """Return it as it travels to the stage that reads."""
        return Parcel.of(self.todo[0].unit.name, self)


@dataclass(frozen=True)
class EmbedJob:
    """What reading and writing tasks must know; holds no connection and no secret."""

    storage: Storage
    root: str
    spec: DatasetSpec
    compression: str
    trust_remote_code: bool
    max_attempts: int
    ledger: ActorHandle
    reuse: Reuse
