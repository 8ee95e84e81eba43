"""The stage of every model: token ids of passages, queries or pairs in, its outputs in their place."""

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from ray.actor import ActorHandle

from bge_ray.model.spec import model_folder, text_feeder
from bge_ray.model.uncollected import uncollected
from bge_ray.pipeline.engine.device import device_or_exit
from bge_ray.pipeline.engine.isolation import Attempt, run_isolated
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.room import Presence, Room
from bge_ray.pipeline.engine.rows import packed_tokens, spread, with_faults, without_tokens
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.ids import IdArray
from bge_ray.records.model import ModelSpec
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import Auto

if TYPE_CHECKING:
    from bge_ray.model.run.model import Model
    from bge_ray.model.run.result import Result
    from bge_ray.model.run.terms import TermModel


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelJob:
    """What an actor that holds a model must know; holds no secret.

    ``stage`` names what it notes (encode_started, score_ended, ...). With a ``dataset`` it refuses to start
    where the model gives other vectors than it gave when that was made. ``token_budget`` is settled in the
    actor, where the device is; ``units_at_once`` is that of its pool.
    """

    stage: Literal["encode", "score"]
    spec: ModelSpec
    device: str
    threads: int
    token_budget: int | Auto
    trust_remote_code: bool
    ledger: ActorHandle
    max_attempts: int
    dataset: DatasetSpec | None = None
    units_at_once: int = 1


class ModelStage:
    """An actor that holds one model, and runs the rows of parcels through it.

    Who may be where: Ray calls it from ``units_at_once`` threads, one parcel each. What they do to their own
    parcel they do side by side: take it out of Arrow, cut batches, make columns of the result, hand it on.
    Torch belongs to one further thread, `_device`, in which the model is loaded, warmed up and run, for one
    parcel after the other in the order of their arrival; so the device never has two of them, and never waits
    while one is ready. A parcel whose process died under it before is alone in the `Room` until it is done.
    """

    def __init__(self, job: ModelJob) -> None:
        """Load the model; no row is done before that."""
        self._job = job
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._model, self._budget = self._device.submit(_load, job).result()
        self._room = Room() if job.units_at_once > 1 else None
        self._presence = Presence()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Run the rows of one parcel."""
        parcel = Parcel.from_batch(batch)
        if parcel.table is None:
            return batch
        key = f"{self._job.stage} {parcel.name}"
        with self._presence.unit() as waited, Attempt(self._job.ledger, key, self._room) as attempt:
            if attempt.total_deaths >= self._job.max_attempts:
                return parcel.failed(f"its model's process died {attempt.total_deaths} times").to_batch()
            return self._run(parcel, parcel.table, attempt, waited).to_batch()

    def _run(self, parcel: Parcel, table: pa.Table, attempt: Attempt, waited_s: float) -> Parcel:
        started = time.time()
        rows, tokens = packed_tokens(table)
        result = self._model.empty_result(tokens.n_results)
        queued_s = 0.0

        def run(batches: Sequence[IdArray]) -> None:
            nonlocal queued_s
            sent = time.monotonic()
            at_device = self._device.submit(self._at_device, parcel.name, tokens, batches, result)
            queued_s += at_device.result() - sent

        def reject(i: int, detail: str) -> None:
            results = tokens.results_of(np.asarray([i], np.int64)).tolist()
            result.faults |= dict.fromkeys(results, ("killed_worker", detail))

        batches = self._model.cut(tokens, self._budget)
        run_isolated(attempt, self._job.stage, batches, run, reject)
        outputs = result.columns()
        done = without_tokens(table)
        for name, values in outputs.items():
            done = _placed(done, name, values, rows)
        done = with_faults(done, {int(rows[i]): fault for i, fault in result.faults.items()})
        facts: dict[str, Any] = {
            f"{self._job.stage}_started": started,
            f"{self._job.stage}_ended": time.time(),
            f"{self._job.stage}_queued": queued_s,
            "waited_s": waited_s,
            "device_s": result.busy_s,
            "batches": result.batches,
            "padded_tokens": result.padded_tokens,
            "memory_splits": result.splits,
            "process": f"{os.uname().nodename}:{os.getpid()}",
        }
        return parcel.filled(done, **facts)

    def _at_device(
        self, name: str, tokens: PackedTokens, batches: Sequence[IdArray], result: "Result"
    ) -> float:
        """Run batches, in the thread that torch belongs to; return when they began, as `time.monotonic`."""
        began = time.monotonic()
        with device_or_exit(name):
            self._model.run(tokens, batches, result)
        return began


@uncollected()
def _load(job: ModelJob) -> tuple["Model | TermModel", int]:
    """Load the model of a job, check it, and warm it up; return it with its token budget."""
    from bge_ray.model.canary import check_canaries  # torch, only where there is a model
    from bge_ray.model.run.model import Place, open_model

    model = open_model(
        job.spec, model_folder(job.spec), Place(job.device, job.threads, job.trust_remote_code)
    )
    if job.dataset is not None and job.dataset.canaries:
        # Queries may be cut shorter than the passages that the canaries were read as.
        as_passages = replace(job.dataset.model, name=job.spec.name, revision=job.spec.revision)
        feeder = text_feeder(as_passages, trust_remote_code=job.trust_remote_code)
        check_canaries(job.dataset.canaries, model, feeder)
    budget = model.settle_budget(job.token_budget)
    logger.info("%s on %s, batches of up to %d tokens", job.spec.name, job.device, budget)
    if job.device != "cpu":
        model.warm_up(budget)
    return model, budget


def _placed(table: pa.Table, name: str, values: pa.Array, rows: IdArray) -> pa.Table:
    """Put (m,) values of the rows of those numbers into a table, in the column's place if there is one."""
    values = spread(values, rows, len(table))
    place = table.schema.get_field_index(name)
    return table.append_column(name, values) if place < 0 else table.set_column(place, name, values)
