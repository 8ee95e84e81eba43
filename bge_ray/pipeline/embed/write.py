"""Third stage: commit a unit, and send the driver a receipt."""

import dataclasses
import time
from collections import Counter
from typing import Any

import pyarrow as pa

from bge_ray.dataset.commit import ShardWriter
from bge_ray.errors import StorageError
from bge_ray.pipeline.embed.tasks import EmbedJob
from bge_ray.pipeline.engine.isolation import Attempt
from bge_ray.pipeline.engine.payload import UnitRow
from bge_ray.records.ids import split_vector_ids
from bge_ray.report.facts import EXAMPLES_PER_REASON

MAX_ID_CHARS = 200


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
    ended = time.time()
    facts = row.facts | {"write_s": ended - started, "written": ended, "rejected_examples": _examples(row)}
    return dataclasses.replace(row, table=None, rejected=None, facts=facts, marker=marker).to_batch()


def _examples(row: UnitRow) -> list[dict[str, Any]]:
    """Return a few rejected rows of each reason, for the report."""
    if row.rejected is None:
        return []
    examples: list[dict[str, Any]] = []
    shown: Counter[str] = Counter()
    row_numbers = split_vector_ids(row.rejected["vector_id"].to_numpy()).row_no
    for rejected, row_number in zip(row.rejected.to_pylist(), row_numbers.tolist(), strict=True):
        shown[rejected["reason"]] += 1
        if shown[rejected["reason"]] > EXAMPLES_PER_REASON:
            continue
        passage_id = rejected["passage_id"]
        examples.append(
            {
                "passage_id": passage_id and passage_id[:MAX_ID_CHARS],
                "reason": rejected["reason"],
                "detail": rejected["detail"],
                "uri": row.task.uri,
                "row": row_number,
            }
        )
    return examples
