"""Stages that take time and do nothing: what is left is what the driver and Ray cost.

Kept free of torch, because a simulated pool has more processes than a laptop has memory for it.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from bge_ray.pipeline.embed.tasks import ReadTask, UnitsTask
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.records.dataset import FileFact, Marker


@dataclass(frozen=True)
class SimulatedJob:
    """How long each stage takes over a unit, in seconds, and the bytes of its table.

    A unit is ``encode_s`` at the device, and ``host_s`` on its way there and back.
    """

    read_s: float
    encode_s: float
    host_s: float
    write_s: float
    table_bytes: int


def read_nothing(batch: pa.Table, job: SimulatedJob) -> Iterator[pa.Table]:
    """Yield the units of a span, each with a table of its own."""
    for unit in Parcel.from_batch(batch).task_as(ReadTask).todo:
        time.sleep(job.read_s)
        table = pa.table({"ids": pa.array([bytes(job.table_bytes)], pa.large_binary())})
        yield UnitsTask((unit,)).parcel().filled(table).to_batch()


class SleepStage:
    """An actor that sleeps instead of a GPU that works; at the device there is one unit at a time."""

    def __init__(self, job: SimulatedJob) -> None:
        """Note how long to sleep."""
        self._job = job
        self._device = threading.Lock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Hold a unit for as long as encoding it would take; what it notes is its time at the device."""
        parcel = Parcel.from_batch(batch)
        time.sleep(self._job.host_s / 2)
        with self._device:
            started = time.time()
            time.sleep(self._job.encode_s)
            ended = time.time()
        time.sleep(self._job.host_s / 2)
        process = f"{os.uname().nodename}:{os.getpid()}"
        return parcel.filled(
            parcel.table, encode_started=started, encode_ended=ended, process=process
        ).to_batch()


def write_nothing(batch: pa.Table, job: SimulatedJob) -> pa.Table:
    """Send the driver a receipt as large as a real one."""
    parcel = Parcel.from_batch(batch)
    time.sleep(job.write_s)
    [task] = parcel.task_as(UnitsTask).units
    unit, n_rows = task.unit, task.unit.n_rows
    fact = FileFact(f"embeddings/{unit.name}.parquet", job.table_bytes, "0" * 64, n_rows)
    marker = Marker(unit, task.fingerprint, n_rows, 0, n_rows, n_rows, 0, {}, fact, None)
    return parcel.filled(None, markers=[dataclasses.asdict(marker)]).to_batch()
