"""What travels between the stages of every job: one Ray Data row is one parcel.

Its table crosses as one Arrow IPC stream in a large_binary cell, so that a parcel stays one row whatever Ray
does to blocks, and its buffers are views of the object store on the other side. A row of the table that
cannot be done stays in it, with its reason; a parcel with an error is given up as a whole.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from bge_ray.errors import BgeRayError, DamagedFileError
from bge_ray.records.arrays import whole
from bge_ray.records.canonical import from_json, to_json

T = TypeVar("T")


@dataclass(frozen=True)
class Parcel:
    """Some rows on their way, under the name that the ledger and the messages give them.

    ``task`` is the JSON of what the stages of its job know it as, ``facts`` what they noted on the way.
    """

    name: str
    task: str
    table: pa.Table | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @staticmethod
    def of(name: str, task: Any) -> "Parcel":
        """Return a parcel that has nothing but its task, a record."""
        return Parcel(name, to_json(task).decode())

    def task_as(self, kind: type[T]) -> T:
        """Return the task as the record it was made of."""
        return from_json(kind, self.task)

    def failed(self, error: str) -> "Parcel":
        """Return the parcel as given up."""
        return dataclasses.replace(self, table=None, error=error)

    def given_up(self, error: BgeRayError) -> "Parcel":
        """Return the parcel as given up for an error of one of ours, here or in an actor that was asked.

        Raises:
            DamagedFileError: as it came, because no rerun mends it; the run ends.
        """
        cause = getattr(error, "cause", error)  # what Ray wraps is told by its cause
        if isinstance(cause, DamagedFileError):
            raise cause
        return self.failed(str(error))

    def filled(self, table: pa.Table | None, **facts: Any) -> "Parcel":
        """Return the parcel with another table and more facts."""
        return dataclasses.replace(self, table=table, facts={**self.facts, **facts})

    def to_batch(self) -> pa.Table:
        """Return the parcel as a one-row table."""
        return pa.table(
            {
                "name": [self.name],
                "task": [self.task],
                "table": _cell(self.table),
                "facts": [json.dumps(dict(self.facts))],
                "error": pa.array([self.error], pa.string()),
            }
        )

    @staticmethod
    def from_batch(batch: pa.Table) -> "Parcel":
        """Rebuild the parcel; its table is a view of the batch."""
        if batch.num_rows != 1:
            raise ValueError(f"expected one parcel a batch, got {batch.num_rows}")
        return Parcel(
            name=batch["name"][0].as_py(),
            task=batch["task"][0].as_py(),
            table=_table(whole(batch["table"])),
            facts=json.loads(batch["facts"][0].as_py()),
            error=batch["error"][0].as_py(),
        )


def ipc_buffer(table: pa.Table) -> pa.Buffer:
    """Return a table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def _table(cell: pa.Array) -> pa.Table | None:
    if cell.null_count:
        return None
    # cell[0].as_buffer() would copy: a scalar owns its bytes.
    _, offsets, data = cell.buffers()
    start, stop = np.frombuffer(offsets, np.int64)[cell.offset : cell.offset + 2]
    return pa.ipc.open_stream(data.slice(start, stop - start)).read_all()


def _cell(table: pa.Table | None) -> pa.Array:
    if table is None:
        return pa.nulls(1, pa.large_binary())
    data = ipc_buffer(table)
    # pa.array([buffer]) would copy; the cell is put together from its buffers instead.
    offsets = pa.py_buffer(np.array([0, data.size], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])
