"""Input rows of a search or rerank run: groups that are read and joined together, units that are committed.

A *group* is some input rows (queries, or query and passage pairs) that are read, searched and joined with
their texts together; a *unit* is a part of a group that is scored, committed and resumed on its own. A
parcel is a group at first, one of its units later.
"""

import dataclasses
from dataclasses import dataclass

import pyarrow as pa
from ray.actor import ActorHandle

from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.records.schemas import SPAN_COLUMNS
from bge_ray.storage.objects import Storage, join

# Rows on their way. ``row_no`` is the number of the input row within its group; a row with a reason has
# no score of its own, or lost it. ``first_score`` is the first stage's, ``score`` the reranker's, which may
# put more beside it: `ModelSpec.layer_scores`.
CANDIDATE_SCHEMA = pa.schema(
    [
        pa.field("row_no", pa.int64(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string()),
        pa.field("passage_id", pa.string()),
        pa.field("text", pa.string()),
        pa.field("vector_id", pa.int64()),
        pa.field("first_score", pa.float64()),
        pa.field("score", pa.float32()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
# Beside them over a data set of chunks: which chunk was found, null where all of the passage is meant.
SPAN_SCHEMA = pa.schema([(name, pa.int32()) for name in SPAN_COLUMNS])
QUERY_SCHEMA = pa.schema([CANDIDATE_SCHEMA.field(name) for name in ("row_no", "query_id", "query")])


@dataclass(frozen=True, order=True)
class GroupUnit:
    """Rows [first_row, first_row + n_rows) of a group, done under a fingerprint of all that decides them."""

    first_row: int
    n_rows: int
    fingerprint: str


@dataclass(frozen=True)
class GroupTask:
    """Input rows stored at ``uri``, and the units of them that are to do; ``number`` gives the order."""

    number: int
    uri: str
    todo: tuple[GroupUnit, ...]

    @property
    def name(self) -> str:
        """What the ledger and the messages call it."""
        rows = [unit.first_row for unit in self.todo]
        return f"{self.number}" if len(rows) != 1 else f"{self.number}-{rows[0]}"

    @property
    def n_rows(self) -> int:
        """Rows of the units to do."""
        return sum(unit.n_rows for unit in self.todo)

    def of_unit(self, unit: GroupUnit) -> "GroupTask":
        """Return the task of one of the units alone."""
        return dataclasses.replace(self, todo=(unit,))

    def parcel(self) -> Parcel:
        """Return the group, or the unit, as it travels."""
        return Parcel.of(self.name, self)


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
