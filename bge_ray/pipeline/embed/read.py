"""First stage: read a span, check its rows, tokenise them. A CPU task that loads no model.

A row that cannot be used stays in the table with its reason, a unit that cannot be read is passed on as
given up; only defects raise.
"""

import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from bge_ray.errors import CorpusError, StorageError
from bge_ray.formats.corpus import read_units
from bge_ray.formats.rows import Passages, Rejected, check_rows
from bge_ray.pipeline.embed.tasks import CorpusUnit, EmbedJob, SpanTask
from bge_ray.pipeline.engine.isolation import LETHAL_DEATHS, Attempt
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.rows import Fault, spread, with_faults, with_tokens
from bge_ray.pipeline.engine.tokenise import load_text_feeder, tokenise
from bge_ray.records.ids import vector_ids
from bge_ray.records.plan import Unit
from bge_ray.records.schemas import TEXT_HASH_BYTES, hash_texts
from bge_ray.records.tokens import PackedTokens

# Upper edges, in tokens, of the length histogram: half powers of two from 4 to 16384.
LENGTH_EDGES = tuple(round(2 ** (k / 2)) for k in range(4, 29))


def read_span_stage(batch: pa.Table, job: EmbedJob) -> Iterator[pa.Table]:
    """Read a span, check its rows and tokenise them; yields one parcel a unit."""
    task = Parcel.from_batch(batch).task_as(SpanTask)
    todo = {unit.unit.first_row: unit for unit in task.todo}
    with Attempt(job.ledger, f"read {task.todo[0].unit.name}") as attempt:
        lethal = [u for u in task.todo if attempt.deaths.get(_reading(u), 0) >= LETHAL_DEATHS]
        for unit in lethal:
            del todo[unit.unit.first_row]
            yield _give_up(unit, "reading it killed the worker process again and again")
        if attempt.total_deaths >= job.max_attempts:
            for unit in todo.values():
                yield _give_up(unit, f"its worker process died {attempt.total_deaths} times")
            return
        yield from _read_span(task, todo, job, attempt)


def _read_span(
    task: SpanTask, todo: dict[int, CorpusUnit], job: EmbedJob, attempt: Attempt
) -> Iterator[pa.Table]:
    units = read_units(job.storage, task.corpus_object, task.span, job.spec.columns, set(todo))
    for corpus_unit in list(todo.values()):
        attempt.announce(_reading(corpus_unit))
        started = time.time()
        try:
            unit, rows = next(units)
        except (CorpusError, StorageError) as error:
            yield from (_give_up(left, str(error)) for left in todo.values())
            return
        del todo[unit.first_row]
        read = time.time()
        passages, rejected = check_rows(rows)
        table, tokens = _tokenised(job, attempt, unit, passages, rejected)
        yield (
            corpus_unit.parcel()
            .filled(
                table,
                read_started=started,
                read_s=read - started,
                tokenise_s=time.time() - read,
                text_bytes=sum(len(text.encode()) for text in passages.texts),
                lengths=count_lengths(tokens.lengths),
                tokenizer=load_text_feeder(job.spec.model, trust_remote_code=job.trust_remote_code).note,
            )
            .to_batch()
        )


def _tokenised(
    job: EmbedJob, attempt: Attempt, unit: Unit, passages: Passages, rejected: list[Rejected]
) -> tuple[pa.Table, PackedTokens]:
    """Return all rows of a unit, those with texts tokenised and the others with their reasons."""
    feeder = load_text_feeder(job.spec.model, trust_remote_code=job.trust_remote_code)
    rows, tokens, killed = tokenise(
        attempt,
        f"tokenising {unit.name}",
        len(passages.texts),
        lambda piece: feeder.passages([passages.texts[i] for i in piece]),
    )
    table = unit_table(unit, passages, rejected, job.spec.model.passage_instruction)
    lengths = np.zeros(len(passages.texts), np.int32)
    truncated = np.zeros(len(passages.texts), np.bool_)
    lengths[rows], truncated[rows] = tokens.lengths, tokens.truncated
    table = table.append_column("n_tokens", spread(pa.array(lengths), passages.rows, len(table)))
    table = table.append_column("truncated", spread(pa.array(truncated), passages.rows, len(table)))
    faults: dict[int, Fault] = {int(passages.rows[i]): fault for i, fault in killed.items()}
    return with_faults(with_tokens(table, passages.rows[rows], tokens), faults), tokens


def unit_table(unit: Unit, passages: Passages, rejected: list[Rejected], instruction: str) -> pa.Table:
    """Return every row of a unit: ids, hash of the text that the model reads, kept columns, and faults.

    What a rejected row lacks is null.
    """
    n_rows, rows = unit.n_rows, passages.rows
    hashes = hash_texts(instruction + text for text in passages.texts)
    columns = {
        "vector_id": pa.array(vector_ids(unit.object_no, unit.first_row + np.arange(n_rows, dtype=np.int64))),
        "passage_id": spread(pa.array(passages.passage_ids, pa.string()), rows, n_rows),
        "text_hash": spread(hashes.cast(pa.binary(TEXT_HASH_BYTES)), rows, n_rows),
        **{name: spread(column, rows, n_rows) for name, column in passages.kept.items()},
    }
    table = pa.table(columns)
    if rejected:
        names = table["passage_id"].to_pylist()
        for fault in rejected:
            names[fault.row] = fault.passage_id
        place = table.schema.get_field_index("passage_id")
        table = table.set_column(place, "passage_id", pa.array(names, pa.string()))
    return with_faults(table, {fault.row: (fault.reason, fault.detail) for fault in rejected})


def count_lengths(lengths: np.ndarray) -> list[int]:
    """Return how many lengths lie up to each of LENGTH_EDGES, and how many beyond the last."""
    bins = np.searchsorted(LENGTH_EDGES, lengths, side="left")
    return [int(count) for count in np.bincount(bins, minlength=len(LENGTH_EDGES) + 1)]


def _reading(unit: CorpusUnit) -> str:
    return f"reading {unit.unit.name}"


def _give_up(unit: CorpusUnit, error: str) -> pa.Table:
    return unit.parcel().failed(error).to_batch()
