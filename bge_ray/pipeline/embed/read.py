"""First stage: read a span, check its rows, tokenise them. A CPU task that loads no model.

A row that cannot be used is rejected with a reason, a unit that cannot be read is passed on as
given up; only defects raise.
"""

import functools
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from bge_ray.dataset.commit import token_table
from bge_ray.errors import CorpusError, StorageError
from bge_ray.formats.corpus import read_units
from bge_ray.formats.rows import Passages, Rejected, check_rows, rejected_table, take_passages
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.spec import text_feeder
from bge_ray.pipeline.embed.tasks import EmbedJob, SpanTask
from bge_ray.pipeline.engine.isolation import LETHAL_DEATHS, Attempt, run_isolated
from bge_ray.pipeline.engine.payload import UnitRow, UnitTask
from bge_ray.records.dataset import Unit, from_json
from bge_ray.records.ids import IdArray
from bge_ray.records.model import ModelSpec
from bge_ray.records.tokens import PackedTokens

TOKENISE_ROWS = 1024
# Upper edges, in tokens, of the length histogram: half powers of two from 4 to 16384.
LENGTH_EDGES = tuple(round(2 ** (k / 2)) for k in range(4, 29))


def read_stage(batch: pa.Table, job: EmbedJob) -> Iterator[pa.Table]:
    """Read a span, check its rows and tokenise them; yields one row a unit."""
    task = from_json(SpanTask, batch["span"][0].as_py())
    todo = {unit_task.unit.first_row: unit_task for unit_task in task.todo}
    with Attempt(job.ledger, f"read {task.todo[0].unit.name}") as attempt:
        lethal = [u for u in task.todo if attempt.deaths.get(_reading(u), 0) >= LETHAL_DEATHS]
        for unit_task in lethal:
            del todo[unit_task.unit.first_row]
            yield _give_up(unit_task, "reading it killed the worker process again and again")
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
            yield from (_give_up(left, str(error)) for left in todo.values())
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
            "text_bytes": sum(len(text.encode()) for text in passages.texts),
            "lengths": count_lengths(tokens.lengths),
        }
        rejects = rejected_table(unit.object_no, unit.first_row, rejected + killed)
        yield UnitRow(unit_task, table=table, rejected=rejects, facts=facts).to_batch()


def _tokenise(
    job: EmbedJob, attempt: Attempt, unit: Unit, passages: Passages
) -> tuple[Passages, PackedTokens, list[Rejected]]:
    feeder = _load_feeder(job.spec.model, trust_remote_code=job.trust_remote_code)
    done: list[tuple[IdArray, PackedTokens]] = []
    killed: list[Rejected] = []

    def run(pieces: Sequence[IdArray]) -> None:
        done.extend((p, feeder.passages([passages.texts[i] for i in p])) for p in pieces)

    def reject(i: int, detail: str) -> None:
        killed.append(Rejected(int(passages.rows[i]), passages.passage_ids[i], "killed_worker", detail))

    everything = np.arange(len(passages.rows), dtype=np.int64)
    pieces = [everything[i : i + TOKENISE_ROWS] for i in range(0, len(everything), TOKENISE_ROWS)]
    run_isolated(attempt, f"tokenising {unit.name}", pieces, run, reject)
    tokens = PackedTokens.concatenate([tokens for _, tokens in done])
    if killed:
        passages = take_passages(passages, np.concatenate([piece for piece, _ in done] or [everything[:0]]))
    return passages, tokens, killed


def count_lengths(lengths: np.ndarray) -> list[int]:
    """Return how many lengths lie up to each of LENGTH_EDGES, and how many beyond the last."""
    bins = np.searchsorted(LENGTH_EDGES, lengths, side="left")
    return [int(count) for count in np.bincount(bins, minlength=len(LENGTH_EDGES) + 1)]


@functools.lru_cache(maxsize=2)
def _load_feeder(model: ModelSpec, *, trust_remote_code: bool) -> TextFeeder:
    # Ray counts one CPU for this task; the tokenizer's own threads would take the others, too.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return text_feeder(model, trust_remote_code=trust_remote_code)


def _reading(task: UnitTask) -> str:
    return f"reading {task.unit.name}"


def _give_up(task: UnitTask, error: str) -> pa.Table:
    return UnitRow(task).failed(error).to_batch()
