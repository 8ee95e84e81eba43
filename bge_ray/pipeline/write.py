"""Third stage: commit a unit, and send the driver a receipt."""

import dataclasses
import time

import pyarrow as pa

from bge_ray.errors import StorageError
from bge_ray.io.shards import ShardWriter
from bge_ray.pipeline.isolation import Attempt
from bge_ray.pipeline.job import EmbedJob
from bge_ray.pipeline.payload import UnitRow


def write_stage(batch: pa.Table, job: EmbedJob) -> pa.Table:
    """Commit one unit; what goes on to the driver is a receipt without tables."""
    row = UnitRow.from_batch(batch)
    if row.error is not None or row.table is None or row.rejected is None:
        return row.failed(row.error or "its tables were lost on the way").to_batch()
    writer = ShardWriter(job.storage, job.root, job.spec, job.compression)
    with Attempt(job.ledger, f"write {row.task.unit.name}") as attempt:
        if attempt.total_deaths >= job.max_attempts:
            return row.failed(f"its writer died {attempt.total_deaths} times").to_batch()
        started = time.time()
        try:
            marker = writer.commit(row.task.unit, row.task.fingerprint, row.table, row.rejected)
        except StorageError as error:
            return row.failed(str(error)).to_batch()
    facts = row.facts | {"write_s": time.time() - started, "written": time.time()}
    return dataclasses.replace(row, table=None, rejected=None, facts=facts, marker=marker).to_batch()
