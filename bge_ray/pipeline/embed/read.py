"""First stage: read spans, check their rows, find their vectors or tokenise them. A CPU task without a model.

A row that cannot be used stays in the table with its reason, a unit that cannot be read is passed on as
given up; only defects raise.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bge_ray.dataset.reuse import hash_array
from bge_ray.errors import CorpusError, StorageError
from bge_ray.formats.corpus import read_units
from bge_ray.formats.rows import Passages, Rejected, check_rows
from bge_ray.pipeline.embed.cut import Pieces, Texts, cut_passages, tokens_of, with_columns, with_pieces
from bge_ray.pipeline.embed.reuse import Earlier, find_reused, with_reused
from bge_ray.pipeline.embed.tasks import CorpusUnit, EmbedJob, ReadTask, Source, SpanTask, UnitsTask
from bge_ray.pipeline.engine.isolation import LETHAL_DEATHS, Attempt
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.rows import Fault, spread, with_faults, with_tokens
from bge_ray.pipeline.engine.tokenise import load_text_feeder
from bge_ray.records.ids import IdArray, vector_ids
from bge_ray.records.plan import Unit, span_units
from bge_ray.records.schemas import hash_texts
from bge_ray.records.tokens import PackedTokens

# Upper edges, in tokens, of the length histogram: half powers of two from 4 to 16384.
LENGTH_EDGES = tuple(round(2 ** (k / 2)) for k in range(4, 29))


# Objects of a group are read side by side: each waits for its requests most of the time.
PARALLEL_OBJECTS = 16


@dataclass(frozen=True)
class Checked:
    """A unit as it was read: its accepted rows, and the others."""

    unit: Unit
    passages: Passages
    rejected: list[Rejected]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Found:
    """The rows of a parcel as they were read, or why they could not be; ``started`` in Unix seconds."""

    task: UnitsTask
    parts: tuple[Checked, ...]
    started: float
    error: str | None = None


def read_stage(batch: pa.Table, job: EmbedJob) -> Iterator[pa.Table]:
    """Read spans, check their rows and tokenise them; yields one parcel a unit, or one for all of a group."""
    task = Parcel.from_batch(batch).task_as(ReadTask)
    earlier = Earlier(job)
    with Attempt(job.ledger, f"read {task.todo[0].unit.name}") as attempt:
        for found in read_parcels(task, job, attempt):
            if found.error is not None:
                yield found.task.parcel().failed(found.error).to_batch()
            else:
                yield _filled(found, earlier, job, attempt)


def read_parcels(task: ReadTask, job: EmbedJob, attempt: Attempt) -> Iterator[Found]:
    """Read spans and check their rows: one parcel a unit, or one for all of a group, and those given up."""
    todo = {unit.unit.name: unit for unit in task.todo}
    lethal = {unit.name for unit in _all_units(task) if _deaths(attempt, unit) >= LETHAL_DEATHS}
    for name in lethal & todo.keys():
        yield _give_up(todo.pop(name), "reading it killed the worker process again and again")
    if attempt.total_deaths >= job.max_attempts:
        for unit in todo.values():
            yield _give_up(unit, f"its worker process died {attempt.total_deaths} times")
        return
    if task.is_group:
        yield from _read_group(task, todo, lethal, job, attempt)
    else:
        yield from _read_span(task.spans[0], todo, job, attempt)


def _read_span(
    task: SpanTask, todo: dict[str, CorpusUnit], job: EmbedJob, attempt: Attempt
) -> Iterator[Found]:
    wanted = {unit.unit.first_row for unit in todo.values()}
    units = read_units(job.storage, task.corpus_object, task.span, job.spec.columns, wanted)
    for corpus_unit in list(todo.values()):
        attempt.announce(_reading(corpus_unit.unit))
        started = time.time()
        try:
            unit, rows = next(units)
        except (CorpusError, StorageError) as error:
            yield from (_give_up(left, str(error)) for left in todo.values())
            return
        del todo[unit.name]
        parts = (Checked(unit, *check_rows(rows), task.sources),)
        yield Found(UnitsTask((corpus_unit,)), parts, started)


def _read_group(
    task: ReadTask, todo: dict[str, CorpusUnit], lethal: set[str], job: EmbedJob, attempt: Attempt
) -> Iterator[Found]:
    def read(span: SpanTask) -> Checked | tuple[Unit, str]:
        [unit] = span_units(span.corpus_object.object_no, span.span)
        attempt.announce(_reading(unit))
        try:
            wanted = {unit.first_row}
            [(_, rows)] = read_units(job.storage, span.corpus_object, span.span, job.spec.columns, wanted)
        except (CorpusError, StorageError) as error:
            return unit, str(error)
        return Checked(unit, *check_rows(rows), span.sources)

    started = time.time()
    spans = [s for s in task.spans if span_units(s.corpus_object.object_no, s.span)[0].name not in lethal]
    # One by one after a death, so that the object that was at work is known.
    with ThreadPoolExecutor(1 if attempt.careful else min(PARALLEL_OBJECTS, len(spans))) as pool:
        found = list(pool.map(read, spans))
    for result in found:
        if isinstance(result, tuple) and result[0].name in todo:
            yield _give_up(todo.pop(result[0].name), result[1])
    parts = tuple(result for result in found if isinstance(result, Checked))
    if todo:
        yield Found(UnitsTask(tuple(todo.values())), parts, started)


def _filled(found: Found, earlier: Earlier, job: EmbedJob, attempt: Attempt) -> pa.Table:
    """Return the parcel of some units: all rows of the given ones, tokenised unless they are reused."""
    read = time.time()
    made = _make(found, earlier, job, attempt)
    return (
        found.task.parcel()
        .filled(
            made.table,
            read_started=found.started,
            read_s=read - found.started,
            tokenise_s=time.time() - read,
            text_bytes=sum(len(text.encode()) for part in found.parts for text in part.passages.texts),
            lengths=count_lengths(made.lengths),
            tokens_encoded=made.tokens_encoded,
            tokenizer=load_text_feeder(job.spec.model, trust_remote_code=job.trust_remote_code).note,
        )
        .to_batch()
    )


@dataclass(frozen=True)
class _Made:
    """What a parcel is filled with: its table, the tokens of all its texts, and of those to be encoded."""

    table: pa.Table
    lengths: npt.NDArray[np.int32]
    tokens_encoded: int


def cut_parcel(found: Found, job: EmbedJob, attempt: Attempt) -> tuple[Texts, Pieces, dict[int, Fault]]:
    """Return the texts of a parcel, the pieces that a model reads of them, and faults by number of text."""
    firsts = np.cumsum([0, *(part.unit.n_rows for part in found.parts)]).tolist()
    texts = Texts.of([(first, part.passages) for first, part in zip(firsts, found.parts, strict=False)])
    prefix, trust = _tokenising(found), job.trust_remote_code
    return texts, *cut_passages(attempt, prefix, texts, job.spec, trust_remote_code=trust)


def tokenise_pieces(
    found: Found, texts: Texts, pieces: Pieces, wanted: IdArray, job: EmbedJob, attempt: Attempt
) -> tuple[IdArray, PackedTokens, dict[int, Fault]]:
    """Return the tokens of some pieces of a parcel; see `cut.tokens_of`."""
    prefix, trust = _tokenising(found), job.trust_remote_code
    return tokens_of(attempt, prefix, texts, pieces, wanted, job.spec, trust_remote_code=trust)


def _make(found: Found, earlier: Earlier, job: EmbedJob, attempt: Attempt) -> _Made:
    """Make all rows of some units: one for each piece that has an output, the others with their reasons."""
    texts, pieces, faults = cut_parcel(found, job, attempt)
    hashes = hash_texts(pieces.read)
    known = earlier.near([(part.unit, part.sources) for part in found.parts])
    reused = find_reused(job, hash_array(hashes), known, found.task.place)
    done, tokens, killed = tokenise_pieces(found, texts, pieces, reused.to_encode, job, attempt)
    table = pa.concat_tables(unit_table(part.unit, part.passages, part.rejected) for part in found.parts)
    table, at = with_pieces(table, texts, pieces, faults, job.spec)
    if pieces.tokens is not None:
        # Of its own, and not of a text with the same hash: a chunk says that its passage's title was cut.
        lengths, truncated = pieces.tokens.result_lengths.astype(np.int32), pieces.tokens.result_truncated
    else:
        lengths = reused.settled("n_tokens", done, tokens.lengths.astype(np.int32))
        truncated = reused.settled("truncated", done, tokens.truncated)
    facts = {"text_hash": hashes, "n_tokens": pa.array(lengths), "truncated": pa.array(truncated)}
    table = with_reused(with_columns(table, at, facts), at, reused, job.spec)
    table = with_faults(table, {int(at[n]): fault for n, fault in killed.items()})
    return _Made(with_tokens(table, at[done], tokens), lengths, int(tokens.lengths.sum()))


def unit_table(unit: Unit, passages: Passages, rejected: list[Rejected]) -> pa.Table:
    """Return every row of a unit: ids, kept columns, and faults.

    What a rejected row lacks is null.
    """
    n_rows, rows = unit.n_rows, passages.rows
    columns = {
        "vector_id": pa.array(vector_ids(unit.object_no, unit.first_row + np.arange(n_rows, dtype=np.int64))),
        "passage_id": spread(pa.array(passages.passage_ids, pa.string()), rows, n_rows),
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


def _all_units(task: ReadTask) -> list[Unit]:
    return [unit for s in task.spans for unit in span_units(s.corpus_object.object_no, s.span)]


def _reading(unit: Unit) -> str:
    return f"reading {unit.name}"


def _deaths(attempt: Attempt, unit: Unit) -> int:
    return attempt.deaths.get(_reading(unit), 0)


def _tokenising(found: Found) -> str:
    return f"tokenising {found.task.name}"


def _give_up(unit: CorpusUnit, error: str) -> Found:
    return Found(UnitsTask((unit,)), (), time.time(), error)
