"""The three stages of the embed job, each a Ray Data operator: read and tokenise, encode, write.

A stage never fails because of its input: a row that cannot be used is rejected with a reason, a unit
that cannot be read or written is passed on as given up. Only defects raise.
"""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from ray.actor import ActorHandle

from bge_ray.errors import CorpusError, StorageError
from bge_ray.io.corpus import read_units
from bge_ray.io.rows import Passages, Rejected, check_rows, rejected_table, take_passages
from bge_ray.io.shards import ShardWriter, packed_tokens, shard_table, token_table
from bge_ray.io.storage import Storage
from bge_ray.manifest import CorpusObject, DatasetSpec, ModelSpec, Span, Unit, from_json, to_json
from bge_ray.model.batching import token_budget_batches
from bge_ray.model.encoder import Encoder, is_broken_device
from bge_ray.model.source import fetch_model
from bge_ray.model.tokenizer import Tokenizer
from bge_ray.pipeline.isolation import LETHAL_DEATHS, Attempt, run_isolated
from bge_ray.pipeline.payload import UnitRow, UnitTask
from bge_ray.schema import IdArray, PackedTokens, split_vector_ids

logger = logging.getLogger(__name__)

TOKENISE_ROWS = 1024
# Upper edges, in tokens, of the length histogram: half powers of two from 4 to 16384.
LENGTH_EDGES = tuple(round(2 ** (k / 2)) for k in range(4, 29))


@dataclass(frozen=True)
class EmbedJob:
    """What every task of a run must know; holds no connection and no secret."""

    storage: Storage
    root: str
    spec: DatasetSpec
    compression: str
    token_budget: int
    device: str
    threads: int
    trust_remote_code: bool
    max_attempts: int
    ledger: ActorHandle


@dataclass(frozen=True)
class SpanTask:
    """One span to read: the object (without its other spans) and the units of it that are to do."""

    corpus_object: CorpusObject
    span: Span
    todo: tuple[UnitTask, ...]


def span_batch(task: SpanTask) -> dict[str, str]:
    """Return a span as the row that the first stage takes."""
    return {"span": to_json(task).decode()}


def read_stage(batch: pa.Table, job: EmbedJob) -> Iterator[pa.Table]:
    """Read a span, check its rows and tokenise them; yields one row a unit."""
    task = from_json(SpanTask, batch["span"][0].as_py())
    todo = {unit_task.unit.first_row: unit_task for unit_task in task.todo}
    with Attempt(job.ledger, f"read {task.todo[0].unit.name}") as attempt:
        for first_row, unit_task in list(todo.items()):
            if (deaths := attempt.deaths.get(_reading(unit_task), 0)) >= LETHAL_DEATHS:
                del todo[first_row]
                yield _give_up(unit_task, f"reading it killed the worker process {deaths} times")
        if attempt.total_deaths >= job.max_attempts:
            for unit_task in todo.values():
                yield _give_up(unit_task, f"its worker process died {attempt.total_deaths} times")
            return
        yield from _read_span(task, todo, job, attempt)


def _read_span(
    task: SpanTask, todo: dict[int, UnitTask], job: EmbedJob, attempt: Attempt
) -> Iterator[pa.Table]:
    units = read_units(job.storage, task.corpus_object, task.span, job.spec.columns, set(todo))
    for unit_task in list(todo.values()):
        attempt.announce(_reading(unit_task))
        started = time.time()
        try:
            unit, rows = next(units)
        except (CorpusError, StorageError) as error:
            for left in todo.values():
                yield _give_up(left, str(error))
            return
        del todo[unit.first_row]
        read = time.time()
        passages, rejected = check_rows(rows)
        passages, tokens, killed = _tokenise(job, attempt, unit, passages)
        table = token_table(unit, passages, tokens)
        facts = {
            "read_started": started,
            "read_s": read - started,
            "tokenise_s": time.time() - read,
            "lengths": np.histogram(tokens.lengths, bins=(0, *LENGTH_EDGES, 1 << 30))[0].tolist(),
        }
        rejects = rejected_table(unit.object_no, unit.first_row, rejected + killed)
        yield UnitRow(unit_task, table=table, rejected=rejects, facts=facts).to_batch()


def _tokenise(
    job: EmbedJob, attempt: Attempt, unit: Unit, passages: Passages
) -> tuple[Passages, PackedTokens, list[Rejected]]:
    tokenizer = _load_tokenizer(job.spec.model, trust_remote_code=job.trust_remote_code)
    instruction = job.spec.model.passage_instruction
    done: list[tuple[IdArray, PackedTokens]] = []
    killed: list[Rejected] = []

    def run(pieces: Sequence[IdArray]) -> None:
        for piece in pieces:
            done.append((piece, tokenizer.tokenise([instruction + passages.texts[i] for i in piece])))

    def reject(i: int, detail: str) -> None:
        killed.append(Rejected(int(passages.rows[i]), passages.passage_ids[i], "killed_worker", detail))

    everything = np.arange(len(passages.rows), dtype=np.int64)
    pieces = [everything[i : i + TOKENISE_ROWS] for i in range(0, len(everything), TOKENISE_ROWS)]
    run_isolated(attempt, f"tokenising {unit.name}", pieces, run, reject)
    tokens = PackedTokens.concatenate([tokens for _, tokens in done])
    if killed:
        passages = take_passages(passages, np.concatenate([piece for piece, _ in done] or [everything[:0]]))
    return passages, tokens, killed


@functools.lru_cache(maxsize=2)
def _load_tokenizer(model: ModelSpec, *, trust_remote_code: bool) -> Tokenizer:
    # Ray counts one CPU for this task; the tokenizer's own threads would take the others, too.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder, _ = fetch_model(model.name, model.revision)
    return Tokenizer(folder, model.max_length, trust_remote_code=trust_remote_code)


class EncodeStage:
    """An actor that holds one encoder; token tables in, embedding shards out."""

    def __init__(self, job: EmbedJob) -> None:
        """Load the model; nothing is encoded before that."""
        self._job = job
        self._encoder = Encoder(
            job.spec.model, device=job.device, threads=job.threads, trust_remote_code=job.trust_remote_code
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode one unit."""
        row = UnitRow.from_batch(batch)
        if row.error is not None or row.table is None:
            return batch
        with Attempt(self._job.ledger, f"encode {row.task.unit.name}") as attempt:
            if attempt.total_deaths >= self._job.max_attempts:
                return row.failed(f"its encoder died {attempt.total_deaths} times").to_batch()
            return self._encode(row, row.table, attempt).to_batch()

    def _encode(self, row: UnitRow, table: pa.Table, attempt: Attempt) -> UnitRow:
        started = time.time()
        tokens = packed_tokens(table)
        result = self._encoder.empty_result(len(tokens))

        def run(batches: Sequence[IdArray]) -> None:
            try:
                self._encoder.encode(tokens, batches, result)
            except RuntimeError as error:
                if not is_broken_device(error):
                    raise
                # A CUDA context that has failed once fails for ever; a new process gets a new one.
                logger.exception("unit %s: the device failed; restarting this encoder", row.task.unit.name)
                os._exit(75)

        def reject(i: int, detail: str) -> None:
            result.faults[i] = ("killed_worker", detail)

        batches = token_budget_batches(tokens.lengths, self._job.token_budget)
        run_isolated(attempt, "encoding", batches, run, reject)
        self._reject_overflow(result.embeddings, result.faults)
        shard = shard_table(self._job.spec, table, result.embeddings)
        ended = time.time()
        facts = row.facts | {
            "encode_started": started,
            "encode_ended": ended,
            "device_s": result.busy_s,
            "batches": result.batches,
            "padded_tokens": result.padded_tokens,
            "encoder": f"{os.uname().nodename}:{os.getpid()}",
        }
        if not result.faults:
            return dataclasses.replace(row, table=shard, facts=facts)
        return _move_faults(row, shard, result.faults, facts)

    def _reject_overflow(self, embeddings: np.ndarray, faults: dict[int, tuple[str, str]]) -> None:
        """Reject vectors that are finite in float32 and not in the output dtype (unnormalised ones)."""
        if self._job.spec.dtype == "float32":
            return
        limit = np.finfo(self._job.spec.dtype).max
        for i in np.flatnonzero(np.abs(embeddings).max(axis=1, initial=0) > limit):
            faults[int(i)] = (
                "non_finite",
                f"a component exceeds {limit}, the largest {self._job.spec.dtype}",
            )


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


def _reading(task: UnitTask) -> str:
    return f"reading {task.unit.name}"


def _give_up(task: UnitTask, error: str) -> pa.Table:
    return UnitRow(task).failed(error).to_batch()
