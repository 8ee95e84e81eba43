"""Stages that take time and do nothing: what is left is what the driver and Ray cost.

Kept free of torch, because a simulated pool has more processes than a laptop has memory for it.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from bge_ray.formats.rows import rejected_table
from bge_ray.pipeline.embed.tasks import SpanTask
from bge_ray.pipeline.engine.payload import UnitRow
from bge_ray.records.canonical import from_json
from bge_ray.records.dataset import FileFact, Marker


@dataclass(frozen=True)
class SimulatedJob:
    """How long each stage takes over a unit, in seconds, and the bytes of its table."""

    read_s: float
    encode_s: float
    write_s: float
    table_bytes: int


def read_stage(batch: pa.Table, job: SimulatedJob) -> Iterator[pa.Table]:
    """Yield the units of a span, each with a table of its own."""
    task = from_json(SpanTask, batch["span"][0].as_py())
    for unit_task in task.todo:
        time.sleep(job.read_s)
        table = pa.table({"ids": pa.array([bytes(job.table_bytes)], pa.large_binary())})
        unit = unit_task.unit
        yield UnitRow(
            unit_task, table=table, rejected=rejected_table(unit.object_no, unit.first_row, [])
        ).to_batch()


class EncodeStage:
    """An actor that sleeps instead of a GPU that works."""

    def __init__(self, job: SimulatedJob) -> None:
        """Note how long to sleep."""
        self._job = job

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Hold a unit for as long as encoding it would take."""
        row = UnitRow.from_batch(batch)
        started = time.time()
        time.sleep(self._job.encode_s)
        facts = {
            "encode_started": started,
            "encode_ended": time.time(),
            "encoder": f"{os.uname().nodename}:{os.getpid()}",
        }
        return UnitRow(row.task, row.table, row.rejected, row.facts | facts).to_batch()


def write_stage(batch: pa.Table, job: SimulatedJob) -> pa.Table:
    """Send the driver a receipt as large as a real one."""
    row = UnitRow.from_batch(batch)
    time.sleep(job.write_s)
    unit = row.task.unit
    fact = FileFact(f"embeddings/{unit.name}.parquet", job.table_bytes, "0" * 64, unit.n_rows)
    marker = Marker(unit, row.task.fingerprint, unit.n_rows, 0, unit.n_rows, unit.n_rows, 0, {}, fact, None)
    return UnitRow(row.task, facts=row.facts, marker=marker).to_batch()
