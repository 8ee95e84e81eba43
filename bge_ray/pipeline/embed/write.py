"""Third stage: commit units, and send the driver a receipt."""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.dataset.commit import ShardWriter
from bge_ray.errors import StorageError
from bge_ray.pipeline.embed.reuse import count_reused, settle_reused
from bge_ray.pipeline.embed.tasks import CorpusUnit, EmbedJob, UnitsTask
from bge_ray.pipeline.engine.isolation import Attempt
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.records.dataset import DatasetSpec, Marker
from bge_ray.records.ids import first_ids, id_range, split_vector_ids
from bge_ray.records.plan import Unit
from bge_ray.records.schemas import REJECTED_SCHEMA, embedding_schema
from bge_ray.report.facts import EXAMPLES_PER_REASON

MAX_ID_CHARS = 200
# Files of one parcel that are written at once: each waits for its store most of the time.
PARALLEL_COMMITS = 8


def commit_stage(batch: pa.Table, job: EmbedJob) -> Iterator[pa.Table]:
    """Commit the units of a parcel; the driver gets one receipt, and one for each that failed."""
    parcel = Parcel.from_batch(batch)
    if parcel.table is None:
        yield batch
        return
    units = parcel.task_as(UnitsTask).units
    writer = ShardWriter(job.storage, job.root, job.spec, job.compression)
    with Attempt(job.ledger, f"write {parcel.name}") as attempt:
        if attempt.total_deaths >= job.max_attempts:
            yield parcel.failed(f"its writer died {attempt.total_deaths} times").to_batch()
            return
        started = time.time()
        table = settle_reused(parcel.table, job.spec)
        shard, rejected = split_rows(job.spec, table)
        parts = [(task, _of_unit(shard, task.unit), _of_unit(rejected, task.unit)) for task in units]

        def commit(part: tuple[CorpusUnit, pa.Table, pa.Table]) -> Marker | str:
            task, own, left_out = part
            try:
                return writer.commit(task.unit, task.fingerprint, own, left_out)
            except StorageError as error:
                return str(error)

        with ThreadPoolExecutor(min(PARALLEL_COMMITS, len(parts))) as pool:
            results = list(pool.map(commit, parts))
    ended = time.time()
    for task, result in zip(units, results, strict=True):
        if isinstance(result, str):
            yield UnitsTask((task,)).parcel().failed(result).to_batch()
    done = [(p, marker) for p, marker in zip(parts, results, strict=True) if isinstance(marker, Marker)]
    if done:
        facts: dict[str, Any] = {
            "write_s": ended - started,
            "written": ended,
            "rejected_examples": [e for (task, _, left_out), _ in done for e in _examples(task, left_out)],
            "markers": [dataclasses.asdict(marker) for _, marker in done],
        }
        facts |= count_reused(table, [own["vector_id"] for (_, own, _), _ in done])
        for output in job.spec.model.outputs:
            facts[f"{output.name}_bytes"] = sum(own[output.name].nbytes for (_, own, _), _ in done)
        yield parcel.filled(None, **facts).to_batch()


def _of_unit(table: pa.Table, unit: Unit) -> pa.Table:
    """Return the rows of a unit of a table whose vector ids ascend."""
    start, stop = np.searchsorted(
        table["vector_id"].to_numpy(), id_range(unit.object_no, unit.first_row, unit.n_rows)
    )
    return table.slice(start, stop - start)


def split_rows(spec: DatasetSpec, table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the rows that have their outputs, as an embedding shard, and those with a reason.

    A corpus row goes one way with all of its chunks: to the rejected if one of them has a reason, its first.
    """
    schema = embedding_schema(spec.model.outputs, spec.columns.kept_schema(), spec.chunking)
    reasons = table["reason"]
    rejected = REJECTED_SCHEMA.empty_table()
    if reasons.null_count < len(table):
        rows = first_ids(table["vector_id"].to_numpy())
        faulty = np.flatnonzero(pc.is_valid(reasons).to_numpy())
        left_out, first = np.unique(rows[faulty], return_index=True)
        rejected = table.take(pa.array(faulty[first])).select(REJECTED_SCHEMA.names)
        rejected = rejected.set_column(0, "vector_id", pa.array(left_out)).cast(REJECTED_SCHEMA)
        table = table.filter(pa.array(~np.isin(rows, left_out)))
    return pa.table([table[name] for name in schema.names], schema=schema), rejected


def _examples(task: CorpusUnit, rejected: pa.Table) -> list[dict[str, Any]]:
    """Return a few rejected rows of each reason, for the report."""
    examples: list[dict[str, Any]] = []
    shown: Counter[str] = Counter()
    rows = split_vector_ids(np.asarray(rejected["vector_id"])).row_no.tolist()
    for fault, row in zip(rejected.to_pylist(), rows, strict=True):
        shown[fault["reason"]] += 1
        if shown[fault["reason"]] > EXAMPLES_PER_REASON:
            continue
        passage_id = fault["passage_id"]
        examples.append(
            {
                "passage_id": passage_id and passage_id[:MAX_ID_CHARS],
                "reason": fault["reason"],
                "detail": fault["detail"],
                "uri": task.uri,
                "row": row,
            }
        )
    return examples
