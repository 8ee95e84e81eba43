"""Queries: read as a corpus is, through the same units and the same check of each row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from bge_ray.errors import CorpusError
from bge_ray.formats.corpus import (
    ScannedObject,
    check_types,
    is_text_or_null,
    read_units,
    refuse_names,
    scan_sought,
)
from bge_ray.formats.endings import beir_folder, ending_of
from bge_ray.formats.rows import Passages, Rejected, check_rows, take_passages
from bge_ray.formats.sought import Sought
from bge_ray.records.columns import Columns, ColumnType
from bge_ray.records.plan import Coding, UnitLimits, span_units
from bge_ray.storage.objects import ObjectInfo, Storage

_LIMITS = UnitLimits(max_rows=50_000, max_bytes=96_000_000, vector_bytes=0)
_ID_COLUMNS = ("_id", "query_id", "qid", "id")
_TEXT_COLUMNS = ("text", "query", "question")


@dataclass(frozen=True)
class QueryBatch:
    """Queries of one piece of a file; ``rejected`` counts rows from the first row of the object.

    ``filters`` are what stands in the column of filters, None where there is none.
    """

    uri: str
    query_ids: list[str]
    texts: list[str]
    filters: list[str | None]
    rejected: list[Rejected] = field(default_factory=list)


def read_queries(
    storage: Storage,
    uri: str,
    id_column: str = "auto",
    text_column: str = "auto",
    filter_column: str | None = None,
) -> Iterator[QueryBatch]:
    """Yield the queries of a file, folder or glob of JSONL, Parquet or CSV, batch by batch.

    A query without id or text, or with an id that stands earlier in any of the objects, is rejected
    with its reason; accepted plus rejected equals the rows. Of a BEIR folder it takes ``queries.jsonl``.

    Raises:
        CorpusError: nothing is there, an object is unreadable, or a column is missing.
    """
    listed = storage.list_files(uri)
    beir = [info for info in listed if beir_folder(info.uri, "queries") is not None]
    infos = beir if beir and len(listed) > len(beir) else listed
    if not infos:
        raise CorpusError(f"{uri}: no such file or folder, or an empty one")
    refuse_names(infos)
    sought = Sought(
        ids=_ID_COLUMNS if id_column == "auto" else (id_column,),
        texts=_TEXT_COLUMNS if text_column == "auto" else (text_column,),
        kept=() if filter_column is None else (filter_column,),
    )
    seen: set[str] = set()
    for info in infos:
        yield from _read_query_object(storage, info, sought, seen)


def _read_query_object(
    storage: Storage, info: ObjectInfo, sought: Sought, seen: set[str]
) -> Iterator[QueryBatch]:
    ending = ending_of(info.uri)
    if not ending.format:
        raise CorpusError(f"{info.uri}: unknown ending; queries are .jsonl, .parquet, .csv or .tsv files")
    scanned = scan_sought(storage, info, Coding(ending.format, ending.compression), sought, _LIMITS)
    if not scanned.spans:
        return
    # Whatever a column of filters holds is read as text: what is none is told of its query.
    filters = {_choose(scanned, (name,)): ColumnType.of(pa.string()) for name in sought.kept}
    columns = Columns(_choose(scanned, sought.ids), _choose(scanned, sought.texts), None, filters)
    if scanned.format == "parquet":
        check_types(scanned, columns)
        for name in filters:
            if not is_text_or_null(scanned.columns[name].arrow()):
                raise CorpusError(
                    f"{info.uri}: column {name!r} of filters is {scanned.columns[name].name}, expected text"
                )
    found = scanned.under(0)
    for span in found.spans:
        todo = {unit.first_row for unit in span_units(found.object_no, span)}
        for unit, rows in read_units(storage, found, span, columns, todo):
            queries, rejected = _without_seen(*check_rows(rows), seen)
            seen.update(queries.passage_ids)
            placed = [Rejected(unit.first_row + r.row, r.passage_id, r.reason, r.detail) for r in rejected]
            own = [queries.kept[name].to_pylist() for name in filters]
            yield QueryBatch(
                info.uri,
                queries.passage_ids,
                queries.texts,
                own[0] if own else [None] * len(queries.texts),
                sorted(placed, key=lambda r: r.row),
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


def _choose(scanned: ScannedObject, names: Sequence[str]) -> str:
    for name in names:
        if name in scanned.columns:
            return name
    raise CorpusError(
        f"{scanned.info.uri}: none of {', '.join(names)} among its columns {sorted(scanned.columns)}; "
        "name the column"
    )
