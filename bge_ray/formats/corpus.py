"""The corpus: which objects there are, what is in them, and the rows of a unit.

It dispatches over formats and keeps one promise for all of them: what is read is what was planned,
or a `CorpusError` names the object.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from bge_ray.errors import CorpusError, StorageError
from bge_ray.formats.delimited import read_delimited, scan_delimited
from bge_ray.formats.endings import beir_folder, ending_of
from bge_ray.formats.jsonl import read_jsonl, scan_jsonl
from bge_ray.formats.parquet import read_parquet, scan_parquet
from bge_ray.formats.partitions import partition_values
from bge_ray.formats.rows import RawRows
from bge_ray.formats.sought import Sought
from bge_ray.formats.types import extension_names, is_text, plain_type, unify_all, unify_types, without_nulls
from bge_ray.records.columns import Columns, ColumnType
from bge_ray.records.plan import NO_VERSION, Coding, CorpusObject, Span, Unit, UnitLimits, span_units
from bge_ray.settings.sections import CorpusSettings
from bge_ray.storage.objects import ObjectInfo, Storage

logger = logging.getLogger(__name__)

MAX_NAMED_OBJECTS = 10  # of those that a message or a report is about
_AUTO_ID_COLUMNS = ("_id", "id", "passage_id")
# A data set keeps the columns that it began with.
_WAY_OUT = "write one of them anew, or leave it out of corpus.keep_columns and choose another output.uri"


@dataclass(frozen=True)
class ScannedObject:
    """What one pass over an object found: its spans, and its columns with the types it gives them.

    ``partitions`` are those of the kept columns that stand in its path alone.
    """

    info: ObjectInfo
    coding: Coding
    spans: tuple[Span, ...]
    columns: dict[str, ColumnType]
    partitions: tuple[tuple[str, str | None], ...] = ()

    @property
    def format(self) -> str:
        """Format of the object."""
        return self.coding.format

    @property
    def unit_rows(self) -> tuple[int, ...]:
        """Rows of each of its units."""
        return tuple(n_rows for span in self.spans for n_rows in span.unit_rows)

    def under(self, number: int, group: int | None = None) -> CorpusObject:
        """Return the object under a number, alone or in a group."""
        info = self.info
        return CorpusObject(
            number, info.uri, info.size, info.version, self.coding, self.spans, group, self.partitions
        )


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
    refuse_names(listed)
    listed = _without_beir_queries(listed)
    if unversioned := [info for info in listed if info.version == NO_VERSION]:
        logger.warning(
            "corpus.uri %s: the store tells neither an etag nor a time of %d objects, such as %s: a new "
            "content of equal size would not be seen",
            settings.uri,
            len(unversioned),
            unversioned[0].uri,
        )
    if settings.format != "auto":
        return listed
    known = [o for o in listed if ending_of(o.uri).format]
    unknown = [o for o in listed if not ending_of(o.uri).format]
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


def refuse_names(listed: Sequence[ObjectInfo]) -> None:
    """Refuse objects by whose names they can be neither written down nor opened again.

    Raises:
        CorpusError: names the first.
    """
    for info in listed:
        shown = info.uri.encode(errors="backslashreplace").decode()
        if shown != info.uri:
            raise CorpusError(f"{shown}: its name is not UTF-8; rename it")
        # What fsspec takes for one file system in front of another.
        if "::" in info.uri.partition("://")[2]:
            raise CorpusError(f"{shown}: its name holds '::', which stands between file systems; rename it")


def _without_beir_queries(listed: list[ObjectInfo]) -> list[ObjectInfo]:
    corpora = {folder for o in listed if (folder := beir_folder(o.uri, "corpus")) is not None}

    def belongs(uri: str) -> bool:
        return beir_folder(uri, "queries") in corpora or _qrels_parent(uri) in corpora

    return [o for o in listed if not belongs(o.uri)]


def _qrels_parent(uri: str) -> str | None:
    """Return the folder, with its slash, in which a folder ``qrels`` holds the object."""
    folder = uri.rpartition("/")[0]
    return folder.removesuffix("qrels") if folder.endswith("/qrels") else None


def coding_of(uri: str, settings: CorpusSettings) -> Coding:
    """Return how an object is to be read, by its name and the settings.

    Raises:
        CorpusError: neither tells the format.
    """
    ending = ending_of(uri)
    kind = ending.format if settings.format == "auto" else settings.format
    if not kind:
        raise CorpusError(f"{uri}: unknown ending; set corpus.format to parquet, jsonl or csv")
    compression = "" if kind == "parquet" else ending.compression
    if kind != "csv":
        return Coding(kind, compression)
    return Coding(kind, compression, settings.csv_quoting, settings.header or ())


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
    sought = Sought(
        ids=_AUTO_ID_COLUMNS if settings.id_column == "auto" else (settings.id_column,),
        texts=(settings.text_column,),
        title="title" if settings.title_column == "auto" else settings.title_column,
        kept=settings.keep_columns,
    )
    scanned = scan_sought(storage, info, coding_of(info.uri, settings), sought, limits)
    in_path = partition_values(info.uri)
    only_there = [n for n in settings.keep_columns if n in in_path and n not in scanned.columns]
    if not only_there:
        return scanned
    text = dict.fromkeys(only_there, ColumnType.of(pa.string()))
    partitions = tuple((name, in_path[name]) for name in only_there)
    return replace(scanned, columns=scanned.columns | text, partitions=partitions)


def scan_sought(
    storage: Storage, info: ObjectInfo, coding: Coding, sought: Sought, limits: UnitLimits
) -> ScannedObject:
    """Find the rows and columns of one object in a coding; see `scan_object`."""
    if coding.format == "parquet":
        spans, columns = scan_parquet(storage, info.uri, info.size, sought, limits)
    elif coding.format == "jsonl":
        spans, columns = scan_jsonl(storage, info.uri, info.size, coding.compression, sought, limits)
    else:
        spans, columns = scan_delimited(storage, info.uri, info.size, coding, sought, limits)
    types = {name: ColumnType.of(found) for name, found in columns.items()}
    return ScannedObject(info, coding, tuple(spans), types)


def resolve_columns(scanned: Sequence[ScannedObject], settings: CorpusSettings) -> Columns:
    """Choose the columns for a whole data set from its first objects.

    Raises:
        CorpusError: no object has rows, an object lacks a column that is asked for, or two of them
            disagree on the type of a kept one.
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
    columns = Columns(id_column, settings.text_column, title)
    check_all_columns(filled, columns)
    kept = {name: _settle_type(name, filled) for name in settings.keep_columns}
    return Columns(id_column, settings.text_column, title, kept)


def _settle_type(name: str, filled: Sequence[ScannedObject]) -> ColumnType:
    """Return the one type in which a metadata column is kept, whichever object a row comes from.

    Text formats give way: where types disagree and only they have other than text, the column is text.
    """
    _check_each(filled, lambda s: _check_has(s, f"corpus.keep_columns ({name})", name))
    found = [s.columns[name].arrow() for s in filled]
    plain = [plain_type(kind) for kind in found]
    unified = unify_all(plain)
    if unified is None:
        if any(
            s.format == "parquet" and not is_text_or_null(kind) for s, kind in zip(filled, plain, strict=True)
        ):
            raise CorpusError(_disagreement(name, filled, plain))
        unified = pa.string()
    extensions = sorted({extension for kind in found for extension in extension_names(kind)})
    note = f"({', '.join(extensions)})" if extensions else ""
    return ColumnType.of(without_nulls(unified), note)


def _disagreement(name: str, filled: Sequence[ScannedObject], plain: Sequence[pa.DataType]) -> str:
    so_far, last = pa.null(), 0
    while (unified := unify_types(so_far, plain[last])) is not None:
        so_far, last = unified, last + 1
    first = next((n for n in range(last) if unify_types(plain[n], plain[last]) is None), 0)
    return (
        f"kept column {name!r} is {plain[first]} in {filled[first].info.uri} and {plain[last]} in "
        f"{filled[last].info.uri}; {_WAY_OUT}"
    )


def check_all_columns(scanned: Sequence[ScannedObject], columns: Columns) -> None:
    """Refuse objects of which `check_columns` refuses one, all of them in one message.

    Raises:
        CorpusError: names the first ones and says how many.
    """
    _check_each(scanned, lambda found: check_columns(found, columns))


def _check_each(scanned: Sequence[ScannedObject], check: Callable[[ScannedObject], None]) -> None:
    errors = []
    for found in scanned:
        try:
            check(found)
        except CorpusError as error:
            errors.append(str(error))
    if errors:
        whole = f"{len(errors)} corpus objects lack what others have:{one_a_line(errors)}"
        raise CorpusError(whole if len(errors) > 1 else errors[0])


def one_a_line(errors: Sequence[str]) -> str:
    """Return what is wrong with the first objects, a line each, and how many more there are."""
    more = [f"and {len(errors) - MAX_NAMED_OBJECTS} more"] if len(errors) > MAX_NAMED_OBJECTS else []
    return "".join(f"\n  {line}" for line in [*errors[:MAX_NAMED_OBJECTS], *more])


def check_columns(scanned: ScannedObject, columns: Columns) -> None:
    """Refuse an object that lacks a column of the data set, or has it in a type that does not fit.

    The lines of JSONL need not all have the same keys: a title that none of its rows has is taken as
    missing in the rows, not in the object.

    Raises:
        CorpusError: names the object, the column and what is there instead.
    """
    if not scanned.spans:
        return
    _check_has(scanned, "corpus.id_column", columns.id)
    _check_has(scanned, "corpus.text_column", columns.text)
    if columns.title is not None and scanned.format != "jsonl":
        _check_has(scanned, "corpus.title_column", columns.title)
    for name in columns.kept:
        _check_has(scanned, f"corpus.keep_columns ({name})", name)
    if scanned.format == "parquet":
        check_types(scanned, columns)
    for field in columns.kept_schema():
        found = plain_type(scanned.columns[field.name].arrow())
        is_written = scanned.format != "parquet" and is_text(field.type)
        if not is_written and unify_types(field.type, found) != field.type:
            raise CorpusError(
                f"{scanned.info.uri}: kept column {field.name!r} is {found}, "
                f"elsewhere in the data set {field.type}; {_WAY_OUT}"
            )


def check_types(scanned: ScannedObject, columns: Columns) -> None:
    """Refuse an object whose ids or texts are of a type that no row of it could be accepted with.

    Raises:
        CorpusError: names the object, the column and its type.
    """
    for name in (columns.text, columns.title):
        if name is not None and not is_text_or_null(scanned.columns[name].arrow()):
            raise CorpusError(
                f"{scanned.info.uri}: column {name!r} is {scanned.columns[name].name}, expected text"
            )
    kind = scanned.columns[columns.id].arrow()
    is_number = pa.types.is_integer(plain_type(kind)) or pa.types.is_decimal(plain_type(kind))
    if not (is_text_or_null(kind) or is_number or isinstance(kind, pa.UuidType)):
        raise CorpusError(
            f"{scanned.info.uri}: id column {columns.id!r} is {scanned.columns[columns.id].name}, "
            "expected text, integers, decimals or UUIDs"
        )


def is_text_or_null(kind: pa.DataType) -> bool:
    """Tell whether a column of this type holds text, or nothing at all."""
    return is_text(kind) or pa.types.is_null(kind)


def _check_has(scanned: ScannedObject, setting: str, name: str) -> None:
    if name in scanned.columns:
        return
    where = " in any row" if scanned.format == "jsonl" else ""
    hint = ""
    if setting == "corpus.title_column":
        hint = (
            "; other objects have it: set corpus.title_column to null and choose another output.uri to embed "
            "texts alone"
        )
    raise CorpusError(
        f"{scanned.info.uri}: no column {name!r} ({setting}){where}; it has {sorted(scanned.columns)}{hint}"
    )


def read_units(
    storage: Storage, corpus_object: CorpusObject, span: Span, columns: Columns, todo: set[int]
) -> Iterator[tuple[Unit, RawRows]]:
    """Yield each unit of a span whose first row is in ``todo``, with its rows, in order.

    Raises:
        CorpusError: the object changed since it was planned, or cannot be decoded.
        StorageError: it cannot be fetched.
    """
    planned = {unit.first_row: unit for unit in span_units(corpus_object.object_no, span)}
    try:
        for first_row, rows in _read(storage, corpus_object, span, columns, todo):
            unit = planned[first_row]
            _check_count(corpus_object, unit, rows)
            # After the bytes are here: an object replaced before or meanwhile shows, and it is one request.
            _check_unchanged(storage, corpus_object)
            yield unit, rows
    except (CorpusError, StorageError):
        # What looks like damage may be a new content under the old plan; then that is the message.
        _check_unchanged(storage, corpus_object)
        raise


def _read(
    storage: Storage, corpus_object: CorpusObject, span: Span, columns: Columns, todo: set[int]
) -> Iterator[tuple[int, RawRows]]:
    uri, coding = corpus_object.uri, corpus_object.coding
    in_path = dict(corpus_object.partitions)
    own = replace(columns, kept={n: kind for n, kind in columns.kept.items() if n not in in_path})
    if coding.format == "parquet":
        found = read_parquet(storage, uri, corpus_object.size, span, own, todo)
    elif coding.format == "jsonl":
        found = read_jsonl(storage, uri, coding.compression, span, own, todo)
    else:
        found = read_delimited(storage, uri, coding, span, own, todo)
    for first_row, rows in found:
        placed = {
            name: rows.kept[name] if name in own.kept else pa.array([in_path[name]] * len(rows), pa.string())
            for name in columns.kept
        }
        yield first_row, replace(rows, kept=placed)


def _check_count(corpus_object: CorpusObject, unit: Unit, rows: RawRows) -> None:
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
    if not now.is_same(corpus_object.size, corpus_object.etag):
        hint = ""
        if corpus_object.uri.startswith("file:") and now.size == corpus_object.size:
            hint = "; if it did not, this node has a copy of another time: all nodes must see the same file"
        raise CorpusError(
            f"{corpus_object.uri}: changed since the run began; run again, the embed job first if it is the "
            f"corpus of a data set{hint}"
        )
