"""What travels between the stages: one Ray Data row is one work unit.

Tables cross as one Arrow IPC stream in a large_binary cell, so that a unit stays one row whatever
Ray does to blocks, and its buffers are views of the object store on the other side.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.dataset import Marker
from bge_ray.records.plan import Unit


@dataclass(frozen=True)
class UnitTask:
    """One unit to do: which rows, of which object, under which fingerprint."""

    unit: Unit
    fingerprint: str
    uri: str


@dataclass(frozen=True)
class UnitRow:
    """One unit on its way. Exactly one of ``marker`` (done) and ``error`` (given up) ends it.

    ``table`` is a token table before the encoder and an embedding shard after it.
    """

    task: UnitTask
    table: pa.Table | None = None
    rejected: pa.Table | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    marker: Marker | None = None
    error: str | None = None

    def failed(self, error: str) -> "UnitRow":
        """Return the row as given up, without its tables."""
        return dataclasses.replace(self, table=None, rejected=None, error=error)

    def to_batch(self) -> pa.Table:
        """Return the row as a one-row table."""
        return pa.table(
            {
                "task": [to_json(self.task).decode()],
                "table": _blob(self.table),
                "rejected": _blob(self.rejected),
                "facts": [json.dumps(self.facts)],
                "marker": pa.array([to_json(self.marker).decode() if self.marker else None], pa.string()),
                "error": pa.array([self.error], pa.string()),
            }
        )

    @staticmethod
    def from_batch(batch: pa.Table) -> "UnitRow":
        """Rebuild the row; the tables are views of the batch."""
        if batch.num_rows != 1:
            raise ValueError(f"expected one unit a batch, got {batch.num_rows}")
        marker = batch["marker"][0].as_py()
        return UnitRow(
            task=from_json(UnitTask, batch["task"][0].as_py()),
            table=_unblob(batch["table"]),
            rejected=_unblob(batch["rejected"]),
            facts=json.loads(batch["facts"][0].as_py()),
            marker=from_json(Marker, marker) if marker else None,
            error=batch["error"][0].as_py(),
        )


def _blob(table: pa.Table | None) -> pa.Array:
    if table is None:
        return pa.nulls(1, pa.large_binary())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    # pa.array([buffer]) would copy; the cell is put together from its buffers instead.
    offsets = pa.py_buffer(np.array([0, data.size], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def _unblob(column: pa.ChunkedArray) -> pa.Table | None:
    cell = column[0]
    return pa.ipc.open_stream(cell.as_buffer()).read_all() if cell.is_valid else None
