"""The corpus: which objects there are, what is in them, and the rows of a unit.

It dispatches over formats and keeps one promise for all of them: what is read is what was planned,
or a `CorpusError` names the object.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bge_ray.errors import CorpusError, StorageError
from bge_ray.formats.lines import read_csv, read_jsonl, scan_csv, scan_jsonl
from bge_ray.formats.parquet import read_parquet, scan_parquet
from bge_ray.formats.rows import Rows
from bge_ray.records.dataset import Columns
from bge_ray.records.plan import CorpusObject, Span, Unit, UnitLimits, span_units
from bge_ray.settings.sections import CorpusSettings
from bge_ray.storage.objects import ObjectInfo, Storage

logger = logging.getLogger(__name__)

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
_BEIR_CORPUS = re.compile(r"corpus\.jsonl(\.gz|\.zst|\.zstd)?$")
_BEIR_OTHER = re.compile(r"(queries\.jsonl(\.gz|\.zst|\.zstd)?|qrels/[^/]+)$")
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

    In a folder of the BEIR layout, ``queries.jsonl`` and ``qrels/`` beside ``corpus.jsonl`` are no corpus.

    Raises:
        CorpusError: nothing is there, or nothing that looks like a corpus.
        StorageError: the listing failed.
    """
    if settings.uri is None:
        raise CorpusError("corpus.uri is not set")
    listed = storage.list_files(settings.uri)
    if not listed:
        raise CorpusError(
            f"corpus.uri {settings.uri}: no such file or folder, or an empty one "
            "(names that start with a dot or an underscore do not count)"
        )
    listed = _without_beir_queries(listed)
    if settings.format != "auto":
        return listed
    known = [o for o in listed if _SUFFIX.search(o.uri)]
    unknown = [o for o in listed if not _SUFFIX.search(o.uri)]
    if not known:
        raise CorpusError(
            f"corpus.uri {settings.uri}: none of its {len(listed)} objects has a known ending "
            f"(such as {listed[0].uri}); set corpus.format to parquet, jsonl or csv"
        )
    if unknown:
        logger.warning(
            "corpus.uri %s: %d objects without a known ending are left out, such as %s",
            settings.uri,
            len(unknown),
            unknown[0].uri,
        )
    return known


def _without_beir_queries(listed: list[ObjectInfo]) -> list[ObjectInfo]:
    folders = [o.uri[: m.start()] for o in listed if (m := _BEIR_CORPUS.search(o.uri)) is not None]
    beir = {f for f in folders if f.endswith("/")}

    def belongs(uri: str) -> bool:
        other = _BEIR_OTHER.search(uri)
        return other is not None and uri[: other.start()] in beir

    return [o for o in listed if not belongs(o.uri)]


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
        title = "title" if settings.title_column == "auto" else settings.title_column or ""
        text_columns = (settings.text_column, title, *settings.keep_columns)
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
        titled = any("title" in s.columns for s in filled) and settings.text_column != "title"
        title = "title" if titled else None
    kept = {name: _kept_kind(name, filled) for name in settings.keep_columns}
    columns = Columns(id_column, settings.text_column, title, kept)
    for s in filled:
        check_columns(s, columns)
    return columns


def _kept_kind(name: str, filled: Sequence[ScannedObject]) -> str:
    """Return the type of a metadata column: that of the first Parquet object that has any, else text."""
    if any(s.format != "parquet" for s in filled):
        return "string"
    kinds = [s.columns[name] for s in filled if s.columns.get(name, "null") != "null"]
    return kinds[0] if kinds else "string"


def check_columns(scanned: ScannedObject, columns: Columns) -> None:
    """Refuse an object that lacks a column of the data set.

    The lines of JSONL need not all have the same keys: a title that none of its first rows has is taken as
    missing in those rows, not in the object.

    Raises:
        CorpusError: names the object, the column and what is there instead.
    """
    if not scanned.spans:
        return
    needed = {"corpus.id_column": columns.id, "corpus.text_column": columns.text}
    if columns.title is not None and scanned.format != "jsonl":
        needed["corpus.title_column"] = columns.title
    needed |= {f"corpus.keep_columns ({name})": name for name in columns.kept}
    for setting, name in needed.items():
        if name not in scanned.columns:
            raise CorpusError(_lacks(scanned, setting, name))
    if scanned.format == "parquet":
        _check_types(scanned, columns)
    for name, kind in columns.kept.items():
        if scanned.columns[name] not in (kind, "null") and kind != "string":
            raise CorpusError(
                f"{scanned.info.uri}: kept column {name!r} is {scanned.columns[name]}, "
                f"elsewhere in the data set {kind}"
            )


def _check_types(scanned: ScannedObject, columns: Columns) -> None:
    for name in (columns.text, columns.title):
        if name is not None and scanned.columns[name] not in ("string", "null"):
            raise CorpusError(
                f"{scanned.info.uri}: column {name!r} is {scanned.columns[name]}, expected text"
            )
    id_kind = scanned.columns[columns.id]
    if id_kind not in ("string", "null") and not re.fullmatch(r"u?int\d+", id_kind):
        raise CorpusError(
            f"{scanned.info.uri}: id column {columns.id!r} is {id_kind}, expected text or integers"
        )


def _lacks(scanned: ScannedObject, setting: str, name: str) -> str:
    where = " in its first rows" if scanned.format == "jsonl" else ""
    hint = ""
    if setting == "corpus.title_column":
        hint = "; other objects have it: set corpus.title_column to null to embed texts alone"
    return (
        f"{scanned.info.uri}: no column {name!r} ({setting}){where}; it has {sorted(scanned.columns)}{hint}"
    )


def read_units(
    storage: Storage, corpus_object: CorpusObject, span: Span, columns: Columns, todo: set[int]
) -> Iterator[tuple[Unit, Rows]]:
    """Yield each unit of a span whose first row is in ``todo``, with its rows, in order.

    Raises:
        CorpusError: the object changed since it was planned, or cannot be decoded.
        StorageError: it cannot be fetched.
    """
    planned = {unit.first_row: unit for unit in span_units(corpus_object.object_no, span)}
    _check_unchanged(storage, corpus_object)
    try:
        for first_row, rows in _read(storage, corpus_object, span, columns, todo):
            unit = planned[first_row]
            _check_count(corpus_object, unit, rows)
            # Checked again after the bytes are here: an object replaced meanwhile would mix two contents.
            _check_unchanged(storage, corpus_object)
            yield unit, rows
    except (CorpusError, StorageError):
        # What looks like damage may be a new content under the old plan; then that is the message.
        _check_unchanged(storage, corpus_object)
        raise


def _read(
    storage: Storage, corpus_object: CorpusObject, span: Span, columns: Columns, todo: set[int]
) -> Iterator[tuple[int, Rows]]:
    uri = corpus_object.uri
    if corpus_object.format == "parquet":
        return read_parquet(storage, uri, corpus_object.size, span, columns, todo)
    read = read_jsonl if corpus_object.format == "jsonl" else read_csv
    return read(storage, uri, corpus_object.compression, span, columns, todo)


def _check_count(corpus_object: CorpusObject, unit: Unit, rows: Rows) -> None:
    if len(rows) != unit.n_rows:
        raise CorpusError(
            f"{corpus_object.uri}: rows {unit.first_row} to {unit.first_row + unit.n_rows - 1} were planned, "
            f"only {len(rows)} of them are there"
        )


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
