"""Candidate lists of any origin, one query after the other; what cannot be used is named and left out.

A run (TREC or Parquet), a table of (query, passage) rows, or records with their texts inline. One bad
list does not spoil the rest.
"""

import itertools
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from bge_ray.errors import CorpusError
from bge_ray.formats.candidate_table import (
    LIST_COLUMNS,
    PASSAGE_ID_COLUMNS,
    QUERY_ID_COLUMNS,
    Listed,
    split,
)
from bge_ray.formats.endings import ending_of
from bge_ray.formats.lines import read_text_lines
from bge_ray.formats.parquet import open_parquet
from bge_ray.formats.runs import sort_candidates
from bge_ray.records.schemas import SPAN_COLUMNS
from bge_ray.storage.objects import ObjectInfo, Storage

# Told of (query id, passage id, reason, detail) of what is left out.
Reject: TypeAlias = Callable[[str | None, str | None, str, str], None]

T = TypeVar("T")

# Number, start and end of a chunk within its text, as SPAN_COLUMNS name them.
ChunkSpan: TypeAlias = tuple[int | None, int | None, int | None]
NO_SPAN: ChunkSpan = (None, None, None)

READ_ROWS = 65_536
# Of a table that holds texts, or lists.
READ_LARGE_ROWS = 8192


class _MalformedError(Exception):
    """One record or line cannot be used."""


@dataclass(frozen=True)
class Candidates:
    """The candidates of one query: ``scores`` is None where the file has none, ``texts`` where it has ids.

    With scores they are sorted by (-score, passage_id), otherwise they are in the order of the file.
    ``vector_ids`` say which of several passages of one id a search meant; None where the file does not.
    ``spans`` say which chunk of it was found: its number, start and end, each None where it was no chunk;
    None where the file does not say.
    """

    query_id: str
    passage_ids: list[str]
    scores: list[float] | None = None
    query: str | None = None
    texts: list[str] | None = None
    vector_ids: list[int] | None = None
    spans: list[ChunkSpan] | None = None


@dataclass(frozen=True)
class _Row:
    """One candidate as it was read; ``passage_id`` is None where the query has an empty list."""

    query_id: str
    query: str | None
    passage_id: str | None
    text: str | None
    score: float | None
    place: str
    vector_id: int | None = None
    span: ChunkSpan = NO_SPAN


def find_candidates(storage: Storage, uri: str) -> ObjectInfo:
    """Return the file itself, or of a folder its run.parquet or run.trec.

    Raises:
        CorpusError: there is neither.
    """
    names = ("", "/run.parquet", "/run.trec")
    for name in names:
        info = storage.info(f"{uri.rstrip('/')}{name}")
        # An object store may tell of a folder as of an empty object.
        if info is not None and any(found.uri == info.uri for found in storage.list_files(info.uri)):
            return info
    raise CorpusError(f"{uri}: no such file, and no folder with a run.parquet or run.trec")


def read_candidate_lists(
    storage: Storage, uri: str, reject: Reject, *, scattered: bool = False, chunks: bool = False
) -> Iterator[Candidates]:
    """Yield the candidates of each query, each passage once, sorted where there are scores.

    JSONL and Parquet hold either one record a query (``query`` with ``pos`` and ``neg``, as FlagEmbedding
    has them, or with ``passages``, a list of ``passage_id`` and ``text``), or one candidate a row
    (``query_id``, ``passage_id``, and ``score``, ``query``, ``text`` if there are any). The id of a
    query without one is the number of its line or row. Anything else is read as a TREC run.

    Args:
        storage: where to read.
        uri: a file; of a folder its run.parquet, or else run.trec, is taken.
        reject: told of every query and candidate that is left out.
        scattered: a query may come again, with more candidates, as in a run whose lines are in any order;
            otherwise what comes later is left out.
        chunks: each chunk of a passage is a candidate, where the file tells them apart; otherwise the best
            of them stands for the passage.

    Raises:
        CorpusError: there is no such file, it is unreadable, or nothing in it looks like candidates.
    """
    info = find_candidates(storage, uri)
    read = 0
    seen: set[str] = set()
    parts = _read_parts(storage, info, reject)
    for query_id, group in itertools.groupby(parts, key=lambda part: part[0]):
        together = [part for _, part in group]
        read += 1
        if query_id in seen and not scattered:
            rows = _rows(together)
            detail = f"{rows[0].place}: the query began earlier; its {len(rows)} candidates here are left out"
            reject(query_id, None, "duplicate_query", detail)
            continue
        seen.add(query_id)
        plain = _plain(together[0]) if len(together) == 1 else None
        yield plain or _candidates(query_id, _rows(together), reject, chunks=chunks)
    if not read:
        raise CorpusError(f"{info.uri}: holds no candidates")


def _plain(part: "_Part") -> Candidates | None:
    """Return candidates of which none is to be looked at by itself; None if one is."""
    if not isinstance(part, Listed) or len(set(part.passage_ids)) < len(part.passage_ids):
        return None
    order = None
    if part.scores is not None and not all(map(operator.gt, part.scores, part.scores[1:])):
        order = sort_candidates(part.passage_ids, part.scores)
    return Candidates(
        part.query_id,
        _ordered(part.passage_ids, order) or [],
        _ordered(part.scores, order),
        part.query,
        _ordered(part.texts, order),
        _ordered(part.vector_ids, order),
        _ordered(part.spans, order),
    )


def _ordered(column: list[T] | None, order: list[int] | None) -> list[T] | None:
    return column if column is None or order is None else [column[i] for i in order]


def _candidates(query_id: str, rows: list[_Row], reject: Reject, *, chunks: bool) -> Candidates:
    kept: dict[tuple[str, ChunkSpan], _Row] = {}
    seen: set[tuple[str, ChunkSpan]] = set()
    for row in rows:
        if row.passage_id is None:
            continue
        exact = (row.passage_id, row.span)
        key = exact if chunks else (row.passage_id, NO_SPAN)
        there = kept.setdefault(key, row)
        if exact in seen:
            reject(query_id, row.passage_id, "duplicate_passage", f"{row.place}: stands twice in the list")
        seen.add(exact)
        if row.score is not None and there.score is not None and row.score > there.score:
            kept[key] = row
    found = list(kept.values())
    ids = [passage_id for passage_id, _ in kept]
    scores = [row.score for row in found if row.score is not None]
    texts = [row.text for row in found if row.text is not None]
    vector_ids = [row.vector_id for row in found if row.vector_id is not None]
    query = next((row.query for row in rows if row.query is not None), None)
    if found and len(scores) == len(found):
        order = sort_candidates(ids, scores)
        ids, scores = [ids[i] for i in order], [scores[i] for i in order]
        texts = [texts[i] for i in order] if len(texts) == len(found) else texts
        vector_ids = [vector_ids[i] for i in order] if len(vector_ids) == len(found) else vector_ids
        found = [found[i] for i in order]
    return Candidates(
        query_id,
        ids,
        scores if found and len(scores) == len(found) else None,
        query,
        texts if found and len(texts) == len(found) else None,
        vector_ids if found and len(vector_ids) == len(found) else None,
        [row.span for row in found] if any(row.span != NO_SPAN for row in found) else None,
    )


# Consecutive rows of one query: one by one, or as columns where there is nothing to look for.
_Part: TypeAlias = list[_Row] | Listed


def _read_parts(storage: Storage, info: ObjectInfo, reject: Reject) -> Iterator[tuple[str, _Part]]:
    kind = ending_of(info.uri).format
    if kind == "parquet":
        yield from _parquet_parts(storage, info, reject)
    elif kind == "jsonl":
        yield from _together(_rows_of_records(_json_records(storage, info, reject), reject))
    else:
        yield from _together(_trec_rows(storage, info, reject))


def _together(rows: Iterable[_Row]) -> Iterator[tuple[str, _Part]]:
    for query_id, group in itertools.groupby(rows, key=lambda row: row.query_id):
        yield query_id, list(group)


def _rows(parts: Iterable[_Part]) -> list[_Row]:
    return [row for part in parts for row in (_listed_rows(part) if isinstance(part, Listed) else part)]


def _listed_rows(part: Listed) -> list[_Row]:
    nothing = [None] * len(part.passage_ids)
    columns = (part.texts or nothing, part.scores or nothing, part.vector_ids or nothing)
    spans: Sequence[ChunkSpan] = part.spans or [NO_SPAN] * len(part.passage_ids)
    rows = zip(part.passage_ids, *columns, spans, strict=True)
    return [
        _Row(part.query_id, part.query, passage_id, text, score, f"row {number}", vector_id, span)
        for number, (passage_id, text, score, vector_id, span) in enumerate(rows, part.first_row)
    ]


def _rows_of_records(records: Iterable[tuple[str, dict[str, Any]]], reject: Reject) -> Iterator[_Row]:
    for place, record in records:
        yield from _rows_of(record, place, reject)


def _rows_of(record: dict[str, Any], place: str, reject: Reject) -> list[_Row]:
    """Return the candidates of one record; of one that cannot be used none, and it is rejected."""
    query_id = next((str(record[n]) for n in QUERY_ID_COLUMNS if record.get(n) is not None), None)
    name = query_id if query_id is not None else place.rpartition(" ")[2]
    try:
        return _expand(record, name, place)
    except _MalformedError as error:
        reject(query_id, None, "malformed", f"{place}: {error}")
        return []


def _expand(record: dict[str, Any], query_id: str, place: str) -> list[_Row]:
    query = record.get("query")
    if query is not None and not isinstance(query, str):
        raise _MalformedError(f"the query is a {type(query).__name__}, expected text")
    if any(record.get(name) is not None for name in PASSAGE_ID_COLUMNS):
        return [_single(record, query_id, query, place)]
    if record.get("passages") is not None:
        found = [_passage(entry) for entry in _list(record, "passages")]
    elif "pos" in record or "neg" in record:
        found = _labelled(record, "pos") + _labelled(record, "neg")
    else:
        raise _MalformedError(f"expected passages, pos and neg, or passage_id; it has {sorted(record)}")
    if not found:
        return [_Row(query_id, query, None, None, None, place)]
    return [_Row(query_id, query, passage_id, text, score, place) for passage_id, text, score in found]


def _single(record: dict[str, Any], query_id: str, query: str | None, place: str) -> _Row:
    passage_id = next(record[n] for n in PASSAGE_ID_COLUMNS if record.get(n) is not None)
    text = record.get("text")
    if text is not None and not isinstance(text, str):
        raise _MalformedError(f"the text is a {type(text).__name__}")
    vector_id = record.get("vector_id")
    # A column of another meaning is no place; the passage is looked up by its id then.
    placed = vector_id if type(vector_id) is int and 0 <= vector_id < 1 << 63 else None
    number, start, end = (record.get(name) for name in SPAN_COLUMNS)
    span = (number, start, end) if all(type(at) is int for at in (number, start, end)) else NO_SPAN
    return _Row(query_id, query, str(passage_id), text, _score(record.get("score")), place, placed, span)


def _passage(entry: Any) -> tuple[str, str | None, float | None]:
    if isinstance(entry, str):
        return entry, None, None
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str | None):
        raise _MalformedError("expected passages to be ids, or objects with passage_id and text")
    names = (*PASSAGE_ID_COLUMNS, "_id", "id")
    passage_id = next((entry[name] for name in names if entry.get(name) is not None), None)
    if passage_id is None:
        raise _MalformedError("a passage without an id")
    return str(passage_id), entry.get("text"), _score(entry.get("score"))


def _labelled(record: dict[str, Any], side: str) -> list[tuple[str, str | None, float | None]]:
    texts = [record[side]] if isinstance(record.get(side), str) else _list(record, side)
    ids = _list(record, f"{side}_id") or [f"{side}-{i}" for i in range(len(texts))]
    if len(ids) != len(texts) or not all(isinstance(text, str) for text in texts):
        raise _MalformedError(f"expected {side} to be a list of texts, and {side}_id to have one id for each")
    return [(str(passage_id), text, None) for passage_id, text in zip(ids, texts, strict=True)]


def _list(record: dict[str, Any], name: str) -> list[Any]:
    found = record.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise _MalformedError(f"{name} is a {type(found).__name__}, expected a list")
    return found


def _score(value: Any) -> float | None:
    if value is None:
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if math.isnan(score):
        raise _MalformedError(f"score {value!r} is not a number")
    return score


def _parquet_parts(storage: Storage, info: ObjectInfo, reject: Reject) -> Iterator[tuple[str, _Part]]:
    first = 0
    with open_parquet(storage, info.uri, info.size, stream=True) as file:
        wanted = ("query", "text", "score", "vector_id", *LIST_COLUMNS)
        known = (*QUERY_ID_COLUMNS, *PASSAGE_ID_COLUMNS, *wanted, *SPAN_COLUMNS)
        names = [n for n in known if n in file.schema_arrow.names]
        if not {"pos", "neg", "passages", *PASSAGE_ID_COLUMNS} & set(names):
            raise CorpusError(
                f"{info.uri}: no candidates among its columns {file.schema_arrow.names}; expected "
                "passage_id, passages, or pos and neg"
            )
        large = {"text", *LIST_COLUMNS}.intersection(names)
        for batch in file.iter_batches(READ_LARGE_ROWS if large else READ_ROWS, columns=names):
            listed = split(batch, first)
            if listed is not None:
                yield from ((part.query_id, part) for part in listed)
            else:
                records = ((f"row {row}", record) for row, record in enumerate(batch.to_pylist(), first))
                yield from _together(_rows_of_records(records, reject))
            first += batch.num_rows


def _json_records(storage: Storage, info: ObjectInfo, reject: Reject) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in _lines(storage, info, reject):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reject(None, None, "malformed", f"{place}: not JSON: {error}")
            continue
        if isinstance(record, dict):
            yield place, record
        else:
            reject(None, None, "malformed", f"{place}: expected a JSON object")


def _trec_rows(storage: Storage, info: ObjectInfo, reject: Reject) -> Iterator[_Row]:
    for place, line in _lines(storage, info, reject):
        try:
            row = _trec_row(line, place)
        except _MalformedError as error:
            reject(line.split()[0], None, "malformed", f"{place}: {error}")
            continue
        yield row


def _trec_row(line: str, place: str) -> _Row:
    # Tabs tell the fields apart where ids hold blanks.
    fields = [field.strip() for field in line.split("\t")] if line.count("\t") in (4, 5) else line.split()
    if len(fields) not in (5, 6):
        raise _MalformedError(f"expected `query_id Q0 passage_id rank score tag`, got {line[:100]!r}")
    return _Row(fields[0], None, fields[2], None, _score(fields[4]), place)


def _lines(storage: Storage, info: ObjectInfo, reject: Reject) -> Iterator[tuple[str, str]]:
    for line in read_text_lines(storage, info):
        if line.text is None:
            reject(None, None, "malformed", f"{line.place}: {line.fault}")
        else:
            yield line.place, line.text
