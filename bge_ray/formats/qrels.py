"""Judged relevance: TREC qrels, BEIR's tsv with its header, and tables in Parquet as the hub has them."""

import re
from collections.abc import Iterator
from typing import Any

from bge_ray.errors import CorpusError
from bge_ray.formats.endings import ending_of
from bge_ray.formats.lines import read_text_lines
from bge_ray.formats.parquet import open_parquet
from bge_ray.storage.objects import ObjectInfo, Storage

_QUERY_IDS = ("query-id", "query_id", "qid")
_PASSAGE_IDS = ("corpus-id", "corpus_id", "passage_id", "docid", "pid")
_RELEVANCES = ("score", "relevance", "label")
# Judgements beside the corpus and queries of a folder in the BEIR layout.
_FOLDER = "qrels"
READ_ROWS = 65_536


def read_qrels(storage: Storage, uri: str) -> dict[str, dict[str, int]]:
    """Return relevance by query and passage.

    A file of lines holds TREC qrels (`query_id 0 passage_id relevance`) or BEIR's (`query-id corpus-id
    score`, with or without that header); where tabs separate the fields, ids may hold blanks. Parquet has the
    columns of BEIR's header. Of a folder the one file of judgements in it, or in its folder qrels, is taken.

    Raises:
        CorpusError: no such object, several in a folder, a bad line, a relevance that is no whole number, or
            two judgements of one pair that disagree.
    """
    info = find_qrels(storage, uri)
    qrels: dict[str, dict[str, int]] = {}
    parquet = ending_of(info.uri).format == "parquet"
    rows = _parquet_rows(storage, info) if parquet else _line_rows(storage, info)
    for place, query_id, passage_id, value in rows:
        relevance = _whole(value)
        if relevance is None:
            raise CorpusError(f"{info.uri}: {place}: relevance {value!r}, expected a whole number")
        if qrels.setdefault(query_id, {}).setdefault(passage_id, relevance) != relevance:
            raise CorpusError(
                f"{info.uri}: {place}: query {query_id!r} and passage {passage_id!r} are judged "
                f"{relevance} here and {qrels[query_id][passage_id]} earlier"
            )
    if not qrels:
        raise CorpusError(f"{info.uri}: no judgement in it")
    return qrels


def find_qrels(storage: Storage, uri: str) -> ObjectInfo:
    """Return the file of judgements: an object, or the one in a folder, or in its folder qrels.

    Raises:
        CorpusError: there is none, or there are several.
    """
    info = storage.info(uri)
    # An object store may tell of a folder as of an empty object.
    if info is not None and any(found.uri == info.uri for found in storage.list_files(info.uri)):
        return info
    for folder in (f"{uri.rstrip('/')}/{_FOLDER}", uri):
        found = list(storage.list_files(folder))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(sorted(one.uri for one in found)[:5])
            raise CorpusError(f"{uri}: holds several files, name the one with the judgements: {names}")
    raise CorpusError(f"{uri}: no such object, and no folder that holds one")


def _line_rows(storage: Storage, info: ObjectInfo) -> Iterator[tuple[str, str, str, Any]]:
    for line in read_text_lines(storage, info):
        if line.text is None:
            raise CorpusError(f"{info.uri}: {line.place}: {line.fault}")
        tabbed = line.text.count("\t") in (2, 3)
        fields = [f.strip() for f in line.text.split("\t")] if tabbed else line.text.split()
        if line.number == 1 and fields[0].lower() in _QUERY_IDS:
            continue
        if len(fields) == 4:
            fields = [fields[0], *fields[2:]]
        if len(fields) != 3 or not all(fields):
            raise CorpusError(
                f"{info.uri}: {line.place}: expected `query_id 0 passage_id relevance` or "
                f"`query-id corpus-id score` with a whole number, got {line.text[:100]!r}; separate the "
                "fields by tabs where ids hold blanks"
            )
        yield line.place, fields[0], fields[1], fields[2]


def _parquet_rows(storage: Storage, info: ObjectInfo) -> Iterator[tuple[str, str, str, Any]]:
    row = 0
    with open_parquet(storage, info.uri, info.size, stream=True) as file:
        there = file.schema_arrow.names
        chosen = []
        for names in (_QUERY_IDS, _PASSAGE_IDS, _RELEVANCES):
            found = [name for name in names if name in there]
            if not found:
                raise CorpusError(f"{info.uri}: none of {', '.join(names)} among its columns {there}")
            chosen.append(found[0])
        for batch in file.iter_batches(READ_ROWS, columns=chosen):
            columns = [batch.column(name).to_pylist() for name in chosen]
            for query_id, passage_id, relevance in zip(*columns, strict=True):
                if query_id is None or passage_id is None:
                    raise CorpusError(f"{info.uri}: row {row}: an id is missing")
                yield f"row {row}", str(query_id), str(passage_id), relevance
                row += 1


def _whole(value: Any) -> int | None:
    """Return a relevance as trec_eval takes it; 1.0 is 1, and 0.5 is none."""
    if isinstance(value, str) and not re.fullmatch(r"[-+]?\d+(\.0*)?", value):
        return None
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    number = int(value.partition(".")[0]) if isinstance(value, str) else value
    return int(number) if number == number // 1 and abs(number) < 2**31 else None
