"""What the stages of a search or rerank run share: groups of input rows, and the parcel that travels.

A *group* is some input rows (queries, or query and passage pairs) that are read, searched and joined
with their texts together; a *unit* is a part of a group that is scored, committed and resumed on its
own. One Ray Data row is one parcel: a group at first, one of its units later.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from ray.actor import ActorHandle

from bge_ray.model.reranker_spec import RerankerSpec
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.model import ModelSpec
from bge_ray.storage.objects import Storage, join

# Rows on their way. ``row_no`` is the number of the input row within its group; a row with a reason has
# no score of its own, or lost it. ``score`` is the first stage's, ``logit`` the reranker's.
CANDIDATE_SCHEMA = pa.schema(
    [
        pa.field("row_no", pa.int64(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string()),
        pa.field("passage_id", pa.string()),
        pa.field("text", pa.string()),
        pa.field("vector_id", pa.int64()),
        pa.field("score", pa.float64()),
        pa.field("logit", pa.float32()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
QUERY_SCHEMA = pa.schema([CANDIDATE_SCHEMA.field(name) for name in ("row_no", "query_id", "query")])


@dataclass(frozen=True, order=True)
class UnitTask:
    """Rows [first_row, first_row + n_rows) of a group, done under a fingerprint of all that decides them."""

    first_row: int
    n_rows: int
    fingerprint: str


@dataclass(frozen=True)
class GroupTask:
    """Input rows stored at ``uri``, and the units of them that are to do; ``number`` gives the order."""

    number: int
    uri: str
    todo: tuple[UnitTask, ...]

    @property
    def name(self) -> str:
        """What the ledger and the messages call it."""
        rows = [unit.first_row for unit in self.todo]
        return f"{self.number}" if len(rows) != 1 else f"{self.number}-{rows[0]}"

    def of_unit(self, unit: UnitTask) -> "GroupTask":
        """Return the task of one of the units alone."""
        return dataclasses.replace(self, todo=(unit,))


@dataclass(frozen=True)
class Workplace:
    """Where inputs and parts of a run lie, and who counts the deaths of its workers; holds no secret."""

    storage: Storage
    folder: str
    max_attempts: int
    ledger: ActorHandle

    def part_uri(self, fingerprint: str) -> str:
        """Return where the rows of a finished unit are: they are there whole, or not at all."""
        return part_uri(self.folder, fingerprint)


def part_uri(folder: str, fingerprint: str) -> str:
    """Return the URI of the part of a unit below the work folder."""
    return join(folder, "parts", f"{fingerprint}.parquet")


@dataclass(frozen=True)
class Device:
    """Where a model of ours runs, and how much it is given at once."""

    name: str
    threads: int
    token_budget: int
    trust_remote_code: bool


@dataclass(frozen=True)
class EncodeJob:
    """What a query encoder must know."""

    place: Workplace
    spec: ModelSpec
    device: Device


@dataclass(frozen=True)
class ScoreJob:
    """What pair tokenising and scoring must know."""

    place: Workplace
    spec: RerankerSpec
    device: Device


@dataclass(frozen=True)
class Parcel:
    """A group or a unit on its way; with an ``error`` it is given up, and nothing is done to it any more."""

    task: GroupTask
    table: pa.Table | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def failed(self, error: str) -> "Parcel":
        """Return the parcel as given up."""
        return dataclasses.replace(self, table=None, error=error)

    def filled(self, table: pa.Table, **facts: Any) -> "Parcel":
        """Return the parcel with another table and more facts."""
        return dataclasses.replace(self, table=table, facts=self.facts | facts)

    def to_batch(self) -> pa.Table:
        """Return the parcel as a one-row table."""
        return pa.table(
            {
                "task": [to_json(self.task).decode()],
                "table": pa.array([None if self.table is None else ipc_bytes(self.table)], pa.large_binary()),
                "facts": [json.dumps(self.facts)],
                "error": pa.array([self.error], pa.string()),
            }
        )

    @staticmethod
    def from_batch(batch: pa.Table) -> "Parcel":
        """Rebuild the parcel; its table is a view of the batch."""
        cell = batch["table"][0]
        return Parcel(
            task=from_json(GroupTask, batch["task"][0].as_py()),
            table=pa.ipc.open_stream(cell.as_buffer()).read_all() if cell.is_valid else None,
            facts=json.loads(batch["facts"][0].as_py()),
            error=batch["error"][0].as_py(),
        )


def ipc_bytes(table: pa.Table) -> bytes:
    """Return a table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue())


def whole(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array, also one without rows, which has no chunk to begin with."""
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
