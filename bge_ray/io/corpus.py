"""The corpus: which objects there are, what is in them, and the rows of a unit.

It dispatches over formats and keeps one promise for all of them: what is read is what was planned,
or a `CorpusError` names the object.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bge_ray.errors import CorpusError
from bge_ray.io.lines import read_csv, read_jsonl, scan_csv, scan_jsonl
from bge_ray.io.parquet import read_parquet, scan_parquet
from bge_ray.io.rows import Rows
from bge_ray.io.storage import ObjectInfo, Storage
from bge_ray.manifest import Columns, CorpusObject, Span, Unit, UnitLimits, span_units
from bge_ray.settings import CorpusSettings

_SUFFIX = re.compile(r"\.(parquet|pq|jsonl|ndjson|json|csv|tsv)(\.gz|\.zst|\.zstd)?$", re.IGNORECASE)
_FORMATS = {
    "parquet": "parquet",
    "pq": "parquet",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "csv": "csv",
    "tsv": "csv",
}
_COMPRESSIONS = {"": "", ".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_AUTO_ID_COLUMNS = ("_id", "id", "passage_id")


@dataclass(frozen=True)
class ScannedObject:
    """What one pass over an object found: its spans, and its columns with their Arrow types."""

    info: ObjectInfo
    format: str
    compression: str
    spans: tuple[Span, ...]
    columns: dict[str, str]


def list_corpus(storage: Storage, settings: CorpusSettings) -> list[ObjectInfo]:
    """Return the corpus objects, sorted by URI, without opening any.

    A folder in the BEIR layout (``corpus.jsonl`` beside ``queries.jsonl`` or ``qrels/``) yields its
    corpus only.

    Raises:
        CorpusError: nothing is there, or nothing that looks like a corpus.
        StorageError: the listing failed.
    """
    if settings.uri is None:
        raise CorpusError("corpus.uri is not set")
    listed = storage.list_files(settings.uri)
    if not listed:
        raise CorpusError(f"corpus.uri {settings.uri}: no such file or folder, or an empty one")
    beir = [o for o in listed if re.search(r"(^|/)corpus\.jsonl(\.gz|\.zst)?$", o.uri)]
    if beir and any(re.search(r"/(queries\.jsonl|qrels/)", o.uri) for o in listed):
        listed = beir
    known = listed if settings.format != "auto" else [o for o in listed if _SUFFIX.search(o.uri)]
    if not known:
        raise CorpusError(
            f"corpus.uri {settings.uri}: none of its {len(listed)} objects has a known ending "
            f"(such as {listed[0].uri}); set corpus.format to parquet, jsonl or csv"
        )
    return known


def object_format(uri: str, settings: CorpusSettings) -> tuple[str, str]:
    """Return (format, compression) of an object by its name, or by corpus.format."""
    match = _SUFFIX.search(uri)
    ending = re.search(r"\.(gz|zstd?)$", uri, re.IGNORECASE)
    compression = _COMPRESSIONS[ending.group(0).lower()] if ending else ""
    if settings.format != "auto":
        return settings.format, "" if settings.format == "parquet" else compression
    if match is None:
        raise CorpusError(f"{uri}: unknown ending; set corpus.format to parquet, jsonl or csv")
    return _FORMATS[match.group(1).lower()], compression


def scan_object(
    storage: Storage, info: ObjectInfo, settings: CorpusSettings, limits: UnitLimits
) -> ScannedObject:
    """Find the rows and columns of one object; reads a footer (Parquet) or streams it once (lines).

    Args:
        storage: where to read.
        info: the object as it was listed.
        settings: format and columns.
        limits: when a unit is full.

    Raises:
        CorpusError: the object is unreadable.
    """
    kind, compression = object_format(info.uri, settings)
    if kind == "parquet":
        text_columns = (settings.text_column, settings.title_column or "", *settings.keep_columns)
        spans, columns = scan_parquet(storage, info.uri, info.size, text_columns, limits)
    else:
        scan = scan_jsonl if kind == "jsonl" else scan_csv
        spans, columns = scan(storage, info.uri, info.size, compression, limits)
    return ScannedObject(info, kind, compression, tuple(spans), columns)


def resolve_columns(scanned: Sequence[ScannedObject], settings: CorpusSettings) -> Columns:
    """Choose the columns for a whole data set from its first objects.

    Raises:
        CorpusError: no object has rows, or an object lacks a column that is asked for.
    """
    filled = [s for s in scanned if s.spans]
    if not filled:
        raise CorpusError(f"corpus.uri {settings.uri}: {len(scanned)} objects, and no rows in any of them")
    first = filled[0].columns
    id_column = settings.id_column
    if id_column == "auto":
        found = [name for name in _AUTO_ID_COLUMNS if name in first]
        if not found:
            raise CorpusError(
                f"{filled[0].info.uri}: no id column among {sorted(first)} (looked for "
                f"{', '.join(_AUTO_ID_COLUMNS)}); set corpus.id_column"
            )
        id_column = found[0]
    title = settings.title_column
    if title == "auto":
        title = (
            "title" if all("title" in s.columns for s in filled) and settings.text_column != "title" else None
        )
    native = all(s.format == "parquet" for s in filled)
    kept = {name: first.get(name, "string") if native else "string" for name in settings.keep_columns}
    columns = Columns(id_column, settings.text_column, title, kept)
    for s in filled:
        check_columns(s, columns)
    return columns


def check_columns(scanned: ScannedObject, columns: Columns) -> None:
    """Refuse an object that lacks a column of the data set.

    Raises:
        CorpusError: names the object, the column and what is there instead.
    """
    if not scanned.spans:
        return
    needed = {"corpus.id_column": columns.id, "corpus.text_column": columns.text}
    if columns.title is not None:
        needed["corpus.title_column"] = columns.title
    needed |= {f"corpus.keep_columns ({name})": name for name in columns.kept}
    for setting, name in needed.items():
        if name not in scanned.columns:
            raise CorpusError(
                f"{scanned.info.uri}: no column {name!r} ({setting}); it has {sorted(scanned.columns)}"
            )
    text_columns = [columns.text] + ([columns.title] if columns.title is not None else [])
    for name in text_columns:
        if scanned.format == "parquet" and scanned.columns[name] != "string":
            raise CorpusError(
                f"{scanned.info.uri}: column {name!r} is {scanned.columns[name]}, expected text"
            )
    for name, kind in columns.kept.items():
        if scanned.columns[name] != kind and kind != "string":
            raise CorpusError(
                f"{scanned.info.uri}: kept column {name!r} is {scanned.columns[name]}, elsewhere in the data set {kind}"
            )


def read_units(
    storage: Storage, corpus_object: CorpusObject, span: Span, columns: Columns, todo: set[int]
) -> Iterator[tuple[Unit, Rows]]:
    """Yield each unit of a span whose first row is in ``todo``, with its rows, in order.

    Raises:
        CorpusError: the object changed since it was planned, or cannot be decoded.
        StorageError: it cannot be fetched.
    """
    _check_unchanged(storage, corpus_object)
    where = (storage, corpus_object.uri, corpus_object.size)
    if corpus_object.format == "parquet":
        found = read_parquet(*where, span, columns, todo)
    else:
        read = read_jsonl if corpus_object.format == "jsonl" else read_csv
        found = read(*where, corpus_object.compression, span, columns, todo)
    planned = {unit.first_row: unit for unit in span_units(corpus_object.object_no, span)}
    for first_row, rows in found:
        unit = planned[first_row]
        if len(rows) != unit.n_rows:
            raise CorpusError(
                f"{corpus_object.uri}: rows {first_row} to {first_row + unit.n_rows} were planned, only {len(rows)} "
                "are there; it changed since the run began: run again"
            )
        # Checked again after the bytes are here: an object replaced in between would mix two contents.
        _check_unchanged(storage, corpus_object)
        yield unit, rows


def _check_unchanged(storage: Storage, corpus_object: CorpusObject) -> None:
    now = storage.info(corpus_object.uri)
    if now is None:
        raise CorpusError(
            f"{corpus_object.uri}: was there when the run began, and is gone; run again to plan without it"
        )
    if (now.size, now.etag) != (corpus_object.size, corpus_object.etag):
        raise CorpusError(
            f"{corpus_object.uri}: changed since the run began; run again to embed its new content"
        )
