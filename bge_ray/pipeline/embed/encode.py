"""Second stage: actors that hold one encoder each; token tables in, embedding shards out."""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from bge_ray.dataset.commit import packed_tokens, shard_table
from bge_ray.formats.rows import Rejected, rejected_table
from bge_ray.model.spec import model_folder
from bge_ray.pipeline.embed.tasks import EmbedJob
from bge_ray.pipeline.engine.device import device_or_exit
from bge_ray.pipeline.engine.isolation import Attempt, run_isolated
from bge_ray.pipeline.engine.payload import UnitRow
from bge_ray.records.ids import IdArray, split_vector_ids
from bge_ray.records.model import EMBEDDING


class EncodeStage:
    """An actor that holds one encoder; token tables in, embedding shards out."""

    def __init__(self, job: EmbedJob) -> None:
        """Load the model; nothing is encoded before that."""
        from bge_ray.model.run.model import Model, Place  # torch, only where there is a model

        self._job = job
        spec = job.spec.model
        self._model = Model(spec, model_folder(spec), Place(job.device, job.threads, job.trust_remote_code))
        if job.device != "cpu":
            self._model.warm_up(job.token_budget)
        self._idle_since: float | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode one unit."""
        row = UnitRow.from_batch(batch)
        if row.error is not None or row.table is None:
            return batch
        # The first unit is waited for while the run starts, which is no fault of the readers.
        waited = 0.0 if self._idle_since is None else time.time() - self._idle_since
        with Attempt(self._job.ledger, f"encode {row.task.unit.name}") as attempt:
            if attempt.total_deaths >= self._job.max_attempts:
                return row.failed(f"its encoder died {attempt.total_deaths} times").to_batch()
            batch = self._encode(row, row.table, attempt, waited).to_batch()
        self._idle_since = time.time()
        return batch

    def _encode(self, row: UnitRow, table: pa.Table, attempt: Attempt, waited_s: float) -> UnitRow:
        started = time.time()
        tokens = packed_tokens(table)
        result = self._model.empty_result(len(tokens))

        def run(batches: Sequence[IdArray]) -> None:
            with device_or_exit(f"unit {row.task.unit.name}"):
                self._model.run(tokens, batches, result)

        def reject(i: int, detail: str) -> None:
            result.faults[i] = ("killed_worker", detail)

        batches = self._model.cut(tokens.lengths, self._job.token_budget)
        run_isolated(attempt, "encoding", batches, run, reject)
        shard = shard_table(self._job.spec, table, result.array(EMBEDDING))
        ended = time.time()
        facts = row.facts | {
            "encode_started": started,
            "encode_ended": ended,
            "waited_s": waited_s,
            "device_s": result.busy_s,
            "batches": result.batches,
            "padded_tokens": result.padded_tokens,
            "memory_splits": result.splits,
            "encoder": f"{os.uname().nodename}:{os.getpid()}",
        }
        if not result.faults:
            return dataclasses.replace(row, table=shard, facts=facts)
        return _move_faults(row, shard, result.faults, facts)


def _move_faults(
    row: UnitRow, shard: pa.Table, faults: dict[int, tuple[str, str]], facts: dict[str, Any]
) -> UnitRow:
    """Move rows without a vector from the shard to the rejected rows."""
    unit = row.task.unit
    _, row_no = split_vector_ids(shard["vector_id"].to_numpy())
    late = [
        Rejected(int(row_no[i]) - unit.first_row, shard["passage_id"][i].as_py(), reason, detail)
        for i, (reason, detail) in sorted(faults.items())
    ]
    rejected = pa.concat_tables([row.rejected, rejected_table(unit.object_no, unit.first_row, late)])
    keep = np.ones(len(shard), dtype=np.bool_)
    keep[list(faults)] = False
    return dataclasses.replace(
        row, table=shard.filter(pa.array(keep)), rejected=rejected.sort_by("vector_id"), facts=facts
    )
