"""Runs, qrels, queries and candidate lists: what search and rerank read and write.

A run is a ranked list of candidates a query, as a TREC run file or as Parquet with the same columns.
Files that may be large are streamed, one query after the other. It knows no corpus and no model.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.errors import CorpusError
from bge_ray.formats.corpus import read_units, resolve_columns, scan_object
from bge_ray.formats.lines import iter_lines, open_lines
from bge_ray.formats.parquet import open_parquet
from bge_ray.formats.rows import Passages, Rejected, check_rows, take_passages
from bge_ray.records.plan import CorpusObject, UnitLimits, span_units
from bge_ray.settings.sections import CorpusSettings
from bge_ray.storage.objects import ObjectInfo, Storage

RUN_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("passage_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("tag", pa.string(), nullable=False),
    ]
)
_QUERY_LIMITS = UnitLimits(max_rows=50_000, max_bytes=96_000_000, vector_bytes=0)
_QUERY_ID_COLUMNS = ("_id", "query_id", "qid", "id")
_QUERY_TEXT_COLUMNS = ("text", "query", "question")
_RUN_ENDING = re.compile(r"\.(trec|run|txt)(\.gz|\.zst)?$", re.IGNORECASE)
_BEIR_QUERIES = re.compile(r"(^|/)queries\.jsonl(\.gz|\.zst)?$")


@dataclass(frozen=True)
class Candidates:
    """The candidates of one query: ``scores`` is None where the file has none, ``texts`` where it has ids.

    With scores they are sorted by (-score, passage_id), otherwise they are in the order of the file.
    """

    query_id: str
    passage_ids: list[str]
    scores: list[float] | None = None
    query: str | None = None
    texts: list[str] | None = None


@dataclass(frozen=True)
class QueryBatch:
    """Queries of one piece of a file; ``rejected`` counts rows from the first row of the object."""

    uri: str
    query_ids: list[str]
    texts: list[str]
    rejected: list[Rejected] = field(default_factory=list)


def sort_candidates(passage_ids: Sequence[str], scores: Sequence[float]) -> list[int]:
    """Return the positions by (-score, passage_id): the same order wherever the candidates came from."""
    return sorted(range(len(passage_ids)), key=lambda i: (-scores[i], passage_ids[i]))


def run_table(ranked: Iterable[Candidates], tag: str) -> pa.Table:
    """Return scored candidates as a table of RUN_SCHEMA, sorted and ranked from 1 within each query."""
    columns: tuple[list[Any], ...] = ([], [], [], [])
    for candidates in ranked:
        if candidates.scores is None:
            raise CorpusError(f"query {candidates.query_id!r}: its candidates have no scores, so no ranks")
        order = sort_candidates(candidates.passage_ids, candidates.scores)
        columns[0].extend([candidates.query_id] * len(order))
        columns[1].extend(candidates.passage_ids[i] for i in order)
        columns[2].extend(range(1, len(order) + 1))
        columns[3].extend(float(candidates.scores[i]) for i in order)
    return pa.table([*columns, [tag] * len(columns[0])], schema=RUN_SCHEMA)


def encode_trec(table: pa.Table) -> bytes:
    """Return a table of RUN_SCHEMA as lines ``query_id Q0 passage_id rank score tag``.

    Scores are written in full, so that reading them gives the same numbers and the same order.

    Raises:
        CorpusError: an id or the tag is empty or holds white space, which separates the fields.
    """
    for name in ("query_id", "passage_id", "tag"):
        for value in table[name].unique().to_pylist():
            if not value or value.split() != [value]:
                raise CorpusError(
                    f"{name} {value!r} cannot stand in a TREC run: white space separates its fields"
                )
    columns = (table[name].to_pylist() for name in RUN_SCHEMA.names)
    return "".join(f"{q} Q0 {p} {r} {s!r} {t}\n" for q, p, r, s, t in zip(*columns, strict=True)).encode()


def encode_run_parquet(table: pa.Table) -> bytes:
    """Return a table of RUN_SCHEMA as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def read_run(storage: Storage, uri: str) -> Iterator[Candidates]:
    """Yield the candidates of each query of a run, sorted; Parquet by its ending, anything else as TREC.

    Raises:
        CorpusError: a bad line or row (named), a query in two places, a passage twice in one query.
        StorageError: it cannot be fetched.
    """
    info = _info(storage, uri)
    is_parquet = uri.lower().endswith((".parquet", ".pq"))
    rows = _run_rows(storage, info) if is_parquet else _trec_rows(storage, info)
    seen: set[str] = set()
    for query_id, group in itertools.groupby(rows, key=lambda row: row[1]):
        found = list(group)
        place = found[0][0]
        if query_id in seen:
            raise CorpusError(f"{uri}: {place}: query {query_id!r} began earlier; sort the run by query")
        seen.add(query_id)
        best: dict[str, float] = {}
        for place, _, passage_id, score in found:
            if passage_id in best:
                raise CorpusError(f"{uri}: {place}: passage {passage_id!r} twice for query {query_id!r}")
            best[passage_id] = score
        ids = sorted(best, key=lambda p: (-best[p], p))
        yield Candidates(query_id, ids, [best[p] for p in ids])


def read_qrels(storage: Storage, uri: str) -> dict[str, dict[str, int]]:
    """Return relevance by query and passage, of TREC qrels or of BEIR's tsv with its header.

    Raises:
        CorpusError: a bad line, or two judgements of one pair that disagree.
    """
    qrels: dict[str, dict[str, int]] = {}
    for place, line in _text_lines(storage, _info(storage, uri)):
        fields = line.split()
        if place == "line 1" and fields[0].lower() in ("query-id", "query_id", "qid"):
            continue
        if len(fields) == 4:
            fields = [fields[0], *fields[2:]]
        if len(fields) != 3 or not re.fullmatch(r"[-+]?\d+", fields[2]):
            raise CorpusError(
                f"{uri}: {place}: expected `query_id 0 passage_id relevance` or "
                f"`query-id corpus-id score` with a whole number, got {line[:100]!r}"
            )
        query_id, passage_id, relevance = fields[0], fields[1], int(fields[2])
        if qrels.setdefault(query_id, {}).setdefault(passage_id, relevance) != relevance:
            raise CorpusError(
                f"{uri}: {place}: query {query_id!r} and passage {passage_id!r} are judged "
                f"{relevance} here and {qrels[query_id][passage_id]} earlier"
            )
    if not qrels:
        raise CorpusError(f"{uri}: no judgement in it")
    return qrels


def read_queries(
    storage: Storage, uri: str, id_column: str = "auto", text_column: str = "auto"
) -> Iterator[QueryBatch]:
    """Yield the queries of a file, folder or glob of JSONL, Parquet or CSV, batch by batch.

    A query without id or text, or with an id that stands earlier in any of the objects, is rejected
    with its reason; accepted plus rejected equals the rows. Of a BEIR folder it takes ``queries.jsonl``.

    Raises:
        CorpusError: nothing is there, an object is unreadable, or a column is missing.
    """
    listed = storage.list_files(uri)
    beir = [info for info in listed if _BEIR_QUERIES.search(info.uri)]
    infos = beir if beir and len(listed) > len(beir) else listed
    if not infos:
        raise CorpusError(f"{uri}: no such file or folder, or an empty one")
    seen: set[str] = set()
    for info in infos:
        yield from _read_query_object(storage, info, id_column, text_column, seen)


def read_candidates(storage: Storage, uri: str) -> Iterator[Candidates]:
    """Yield candidate lists: a run (TREC or Parquet), or JSONL with the texts inline.

    A JSONL line holds ``query`` and either ``pos`` and ``neg`` (FlagEmbedding's, texts; ids from
    ``pos_id`` and ``neg_id``, else ``pos-0``, ``neg-0``, ...) or ``passages``, a list of
    ``{"passage_id", "text"}``. The query id is ``query_id``, ``_id`` or ``id``, else the line number.

    Raises:
        CorpusError: a bad line (named), or a query id in two places.
    """
    if _RUN_ENDING.search(uri) or uri.lower().endswith((".parquet", ".pq")):
        yield from read_run(storage, uri)
        return
    seen: set[str] = set()
    for place, line in _text_lines(storage, _info(storage, uri)):
        try:
            candidates = _inline_candidates(json.loads(line), place.removeprefix("line "))
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{uri}: {place}: {error}") from error
        if candidates.query_id in seen:
            raise CorpusError(f"{uri}: {place}: query id {candidates.query_id!r} stands earlier")
        seen.add(candidates.query_id)
        yield candidates


def _inline_candidates(record: Any, number: str) -> Candidates:
    is_query = isinstance(record, dict) and isinstance(record.get("query"), str)
    _require(is_query, "expected a JSON object with a text `query`")
    query_id = str(next((record[k] for k in ("query_id", "_id", "id") if record.get(k) is not None), number))
    if "passages" in record:
        passages = record["passages"]
        is_list = isinstance(passages, list) and all(isinstance(p, dict) for p in passages)
        _require(is_list, "expected `passages` to be a list of objects with `passage_id` and `text`")
        found = [(p.get("passage_id"), p.get("text")) for p in passages]
    else:
        is_pair = "pos" in record or "neg" in record
        _require(is_pair, f"expected `passages`, or `pos` and `neg`; it has {sorted(record)}")
        found = _labelled(record, "pos") + _labelled(record, "neg")
    _require(all(isinstance(text, str) for _, text in found), "a candidate without a text")
    _require(all(isinstance(passage_id, str | int) for passage_id, _ in found), "a candidate without an id")
    ids = [str(passage_id) for passage_id, _ in found]
    _require(len(set(ids)) == len(ids), f"a passage id stands twice for query {query_id!r}")
    return Candidates(query_id, ids, query=record["query"], texts=[text for _, text in found])


def _labelled(record: dict[str, Any], side: str) -> list[tuple[Any, Any]]:
    texts = record.get(side) or []
    texts = [texts] if isinstance(texts, str) else texts
    _require(isinstance(texts, list), f"expected `{side}` to be a list of texts")
    ids = record.get(f"{side}_id") or [f"{side}-{i}" for i in range(len(texts))]
    is_one_each = isinstance(ids, list) and len(ids) == len(texts)
    _require(is_one_each, f"expected `{side}_id` to be a list with one id for each of {len(texts)} texts")
    return list(zip(ids, texts, strict=True))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _read_query_object(
    storage: Storage, info: ObjectInfo, id_column: str, text_column: str, seen: set[str]
) -> Iterator[QueryBatch]:
    columns = CorpusSettings(uri=info.uri, id_column=id_column, text_column=text_column, title_column=None)
    scanned = scan_object(storage, info, columns, _QUERY_LIMITS)
    if not scanned.spans:
        return
    chosen = {
        "id_column": _choose(scanned.columns, id_column, _QUERY_ID_COLUMNS, info.uri),
        "text_column": _choose(scanned.columns, text_column, _QUERY_TEXT_COLUMNS, info.uri),
    }
    resolved = resolve_columns([scanned], columns.model_copy(update=chosen))
    found = CorpusObject(
        0, info.uri, info.size, info.etag, scanned.format, scanned.compression, scanned.spans
    )
    for span in found.spans:
        todo = {unit.first_row for unit in span_units(found.object_no, span)}
        for unit, rows in read_units(storage, found, span, resolved, todo):
            queries, rejected = _without_seen(*check_rows(rows), seen)
            seen.update(queries.passage_ids)
            placed = [Rejected(unit.first_row + r.row, r.passage_id, r.reason, r.detail) for r in rejected]
            yield QueryBatch(
                info.uri, queries.passage_ids, queries.texts, sorted(placed, key=lambda r: r.row)
            )


def _without_seen(
    queries: Passages, rejected: list[Rejected], seen: set[str]
) -> tuple[Passages, list[Rejected]]:
    again = np.array([query_id in seen for query_id in queries.passage_ids], dtype=np.bool_)
    late = [
        Rejected(int(queries.rows[i]), queries.passage_ids[i], "duplicate_id", "the query id stands earlier")
        for i in np.flatnonzero(again)
    ]
    return take_passages(queries, np.flatnonzero(~again)), rejected + late


def _choose(there: dict[str, str], asked: str, usual: Sequence[str], uri: str) -> str:
    if asked != "auto":
        return asked
    for name in usual:
        if name in there:
            return name
    raise CorpusError(f"{uri}: none of {', '.join(usual)} among its columns {sorted(there)}; name the column")


def _info(storage: Storage, uri: str) -> ObjectInfo:
    info = storage.info(uri)
    if info is None:
        raise CorpusError(f"{uri}: no such object")
    return info


def _text_lines(storage: Storage, info: ObjectInfo) -> Iterator[tuple[str, str]]:
    """Yield ("line N", text) of each line that is not blank."""
    ending = info.uri.lower().rpartition(".")[2]
    compression = {"gz": "gzip", "zst": "zstd", "zstd": "zstd"}.get(ending, "")
    with open_lines(storage, info.uri, info.size, compression) as file:
        for number, (_, _, line) in enumerate(iter_lines(file), 1):
            if line is None:
                raise CorpusError(f"{info.uri}: line {number} is too long")
            try:
                text = line.decode().strip()
            except UnicodeDecodeError as error:
                raise CorpusError(f"{info.uri}: line {number}: not UTF-8: {error.reason}") from error
            if text:
                yield f"line {number}", text


def _trec_rows(storage: Storage, info: ObjectInfo) -> Iterator[tuple[str, str, str, float]]:
    for place, line in _text_lines(storage, info):
        fields = line.split()
        if len(fields) not in (5, 6):
            raise CorpusError(
                f"{info.uri}: {place}: expected `query_id Q0 passage_id rank score tag`, got {line[:100]!r}"
            )
        yield place, fields[0], fields[2], _score(fields[4], info.uri, place)


def _run_rows(storage: Storage, info: ObjectInfo) -> Iterator[tuple[str, str, str, float]]:
    names = ["query_id", "passage_id", "score"]
    with open_parquet(storage, info.uri, info.size, stream=True) as file:
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing:
            raise CorpusError(f"{info.uri}: no columns {missing}; it has {file.schema_arrow.names}")
        row = 0
        for batch in file.iter_batches(8192, columns=names):
            for query_id, passage_id, score in zip(*(batch[n].to_pylist() for n in names), strict=True):
                if query_id is None or passage_id is None:
                    raise CorpusError(f"{info.uri}: row {row}: an id is null")
                yield f"row {row}", str(query_id), str(passage_id), _score(score, info.uri, f"row {row}")
                row += 1


def _score(value: Any, uri: str, place: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if math.isnan(score):
        raise CorpusError(f"{uri}: {place}: score {value!r} is not a number")
    return score
