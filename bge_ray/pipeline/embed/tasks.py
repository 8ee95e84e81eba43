"""What the stages of an embed run share: the facts every task must know, and the row they start from."""

from dataclasses import dataclass

from ray.actor import ActorHandle

from bge_ray.pipeline.engine.payload import UnitTask
from bge_ray.records.canonical import to_json
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.plan import CorpusObject, Span
from bge_ray.storage.objects import Storage


@dataclass(frozen=True)
class EmbedJob:
    """What every task of a run must know; holds no connection and no secret."""

    storage: Storage
    root: str
    spec: DatasetSpec
    compression: str
    token_budget: int
    device: str
    threads: int
    trust_remote_code: bool
    max_attempts: int
    ledger: ActorHandle


@dataclass(frozen=True)
class SpanTask:
    """One span to read: the object (without its other spans) and the units of it that are to do."""

    corpus_object: CorpusObject
    span: Span
    todo: tuple[UnitTask, ...]


def span_batch(task: SpanTask) -> dict[str, str]:
    """Return a span as the row that the first stage takes."""
    return {"span": to_json(task).decode()}
