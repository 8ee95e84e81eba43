"""What the stages of an embed run know: the span that they start from, its units, and where they write."""

from dataclasses import dataclass

from ray.actor import ActorHandle

from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.plan import CorpusObject, Span, Unit
from bge_ray.storage.objects import Storage


@dataclass(frozen=True)
class CorpusUnit:
    """One unit to do: which rows, of which object, under which fingerprint."""

    unit: Unit
    fingerprint: str
    uri: str

    def parcel(self) -> Parcel:
        """Return the unit as it travels."""
        return Parcel.of(self.unit.name, self)


@dataclass(frozen=True)
class SpanTask:
    """One span to read: the object (without its other spans) and the units of it that are to do."""

    corpus_object: CorpusObject
    span: Span
    todo: tuple[CorpusUnit, ...]

    def parcel(self) -> Parcel:
        """Return the span as it travels to the stage that reads it."""
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
