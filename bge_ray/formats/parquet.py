"""Parquet corpora: units planned from the footer, read by row groups."""

import contextlib
import decimal
import itertools
import uuid
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bge_ray.errors import CorpusError
from bge_ray.formats.rows import RawRows
from bge_ray.formats.sought import Sought
from bge_ray.formats.types import is_text, rebuild
from bge_ray.formats.units import UnitCutter
from bge_ray.records.columns import Columns
from bge_ray.records.plan import Span, UnitLimits
from bge_ray.storage.objects import Storage

READ_ROWS = 8192
# What is fetched at once of each column of a row group that is streamed.
STREAM_BYTES = 8 << 20
# A column of text whose values seem so many times longer than a row's share of it is looked at: whole if it
# is no larger than this, else its first rows.
LARGEST_RATIO, LOOK_BYTES, LOOK_ROWS = 2.0, 8 << 20, 1024


def scan_parquet(
    storage: Storage, uri: str, size: int, sought: Sought, limits: UnitLimits
) -> tuple[list[Span], dict[str, pa.DataType]]:
    """Plan the units of a Parquet object from its footer; texts that repeat are looked at, see `_text_bytes`.

    Neighbouring row groups share a unit while they fit; a row group that is too large for one
    unit is read once, as a stream of units.

    Args:
        storage: where to read.
        uri: the object.
        size: its bytes.
        sought: the columns whose bytes count for the size of a unit.
        limits: when a unit is full.

    Returns:
        Its spans, and all its columns with the types that it gives them.

    Raises:
        CorpusError: not a Parquet file, or a truncated one.
    """
    cutter = UnitCutter(limits, size)
    with open_parquet(storage, uri, size) as file:
        columns = {f.name: f.type for f in file.schema_arrow}
        if len(columns) != len(file.schema_arrow):
            raise CorpusError(f"{uri}: a column name stands twice among {file.schema_arrow.names}")
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        whole = sum(group.total_byte_size for group in groups) or 1
        for number, group in enumerate(groups):
            source = pa.PythonFile(storage.open(uri, size), mode="r")
            n_bytes = _text_bytes(source, file.metadata, number, sought.texts_of_units)
            stored = size * group.total_byte_size // whole
            cutter.add(number, number + 1, group.num_rows, n_bytes, stored)
    return cutter.as_pieces(), columns


def read_parquet(
    storage: Storage, uri: str, size: int, span: Span, columns: Columns, todo: set[int]
) -> Iterator[tuple[int, RawRows]]:
    """Yield (first row, rows) of each unit of a span whose first row is in ``todo``, in order.

    One unit at a time is in memory, however large a row group is.

    Raises:
        CorpusError: a page cannot be decoded, or a column or row group is missing.
    """
    titles = [columns.title] if columns.title is not None else []
    names = list(dict.fromkeys([columns.id, columns.text, *titles, *columns.kept]))
    with open_parquet(storage, uri, size, stream=len(span.unit_rows) > 1) as file:
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing or file.metadata.num_row_groups < span.stop:
            raise CorpusError(
                f"{uri}: row groups {span.start} to {span.stop} with columns {names} were planned, it has "
                f"{file.metadata.num_row_groups} and {file.schema_arrow.names}"
            )
        # A batch is decoded as a whole: with long texts it must not hold more rows than a unit.
        rows = max(1, min(READ_ROWS, *span.unit_rows))
        schema = pa.schema([file.schema_arrow.field(name) for name in names])
        batches = itertools.chain.from_iterable(
            file.iter_batches(rows, row_groups=groups, columns=names) for groups in _at_a_time(span, schema)
        )
        held = pa.Table.from_batches([], schema)
        first = span.first_row
        last = max(todo, default=-1)
        for n_rows in span.unit_rows:
            if first > last:
                return
            parts = [held]
            have = len(held)
            while have < n_rows and (batch := next(batches, None)) is not None:
                parts.append(pa.Table.from_batches([batch]).select(names))
                have += len(batch)
            table = pa.concat_tables(parts, promote_options="permissive")
            held = table.slice(n_rows)
            if first in todo:
                yield first, _to_rows(uri, table.slice(0, n_rows), columns)
            first += n_rows


@contextlib.contextmanager
def open_parquet(storage: Storage, uri: str, size: int, *, stream: bool = False) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, to be read in few large requests or, as a stream, in small memory.

    Without ``stream`` the column chunks of a row group are fetched whole, neighbours in one request.
    """
    options = {"pre_buffer": False, "buffer_size": STREAM_BYTES} if stream else {"pre_buffer": True}
    try:
        with pq.ParquetFile(pa.PythonFile(storage.open(uri, size), mode="r"), **options) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{uri}: unreadable Parquet: {error}") from error


def _at_a_time(span: Span, schema: pa.Schema) -> list[range]:
    """Return the row groups to ask pyarrow for together: all, so that neighbours come in one request."""
    if any(_has_nested_dictionary(field.type) for field in schema):
        # pyarrow reads a dictionary below a list or struct of one row group only: each has its own.
        return [range(group, group + 1) for group in range(span.start, span.stop)]
    return [range(span.start, span.stop)]


def _has_nested_dictionary(kind: pa.DataType) -> bool:
    fields = [kind.field(i) for i in range(kind.num_fields)]
    return any(pa.types.is_dictionary(f.type) or _has_nested_dictionary(f.type) for f in fields)


def _text_bytes(
    source: pa.NativeFile, metadata: pq.FileMetaData, number: int, text_columns: tuple[str, ...]
) -> int:
    """Return the bytes of the texts of a row group as they will be in memory.

    The footer counts a text once that a dictionary has many rows refer to. Where its smallest and largest
    value are much longer than that leaves for a row, or it does not tell them, the column is looked at.
    """
    group = metadata.row_group(number)
    n_bytes = 0
    for chunk in (group.column(i) for i in range(group.num_columns)):
        path = chunk.path_in_schema
        if path not in text_columns and path.partition(".")[0] not in text_columns:
            continue
        told = chunk.total_uncompressed_size
        looks = _may_repeat(chunk)
        n_bytes += max(told, _spelled_out(source, metadata, number, path)) if looks else told
    return n_bytes


def _may_repeat(chunk: pq.ColumnChunkMetaData) -> bool:
    is_flat = chunk.physical_type == "BYTE_ARRAY" and "." not in chunk.path_in_schema
    if not is_flat or not any("DICTIONARY" in encoding for encoding in chunk.encodings):
        return False
    known = chunk.statistics
    if known is None or not known.has_min_max:
        return True
    typical = sum(len(v.encode() if isinstance(v, str) else v) for v in (known.min_raw, known.max_raw)) / 2
    return bool(typical * chunk.num_values > LARGEST_RATIO * chunk.total_uncompressed_size)


def _spelled_out(source: pa.NativeFile, metadata: pq.FileMetaData, number: int, name: str) -> int:
    """Return the bytes of a column of a row group, every value counted: of a large one by its first rows."""
    group = metadata.row_group(number)
    chunks = {c.path_in_schema: c for c in map(group.column, range(group.num_columns))}
    rows = group.num_rows if chunks[name].total_uncompressed_size <= LOOK_BYTES else LOOK_ROWS
    with pq.ParquetFile(
        source, metadata=metadata, read_dictionary=[name], pre_buffer=False, buffer_size=LOOK_BYTES
    ) as coded:
        batch = next(coded.iter_batches(rows, row_groups=[number], columns=[name]), None)
    if batch is None or not batch.num_rows:
        return 0
    column = batch.column(0)
    lengths = pc.binary_length(column.dictionary).take(column.indices)
    return int((pc.sum(lengths).as_py() or 0) * group.num_rows / batch.num_rows)


def _to_rows(uri: str, table: pa.Table, columns: Columns) -> RawRows:
    return RawRows(
        ids=_ids(table[columns.id]),
        texts=_texts(table[columns.text]),
        titles=_texts(table[columns.title]) if columns.title is not None else None,
        kept={field.name: _keep(uri, table[field.name], field) for field in columns.kept_schema()},
        faults={},
    )


def _ids(column: pa.ChunkedArray) -> list[object]:
    """Return the ids; UUIDs and decimals as they are written, integers as they are."""
    if is_text(column.type):
        return _texts(column)
    return [_written(value) for value in column.to_pylist()]


def _written(value: object) -> object:
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    return str(value) if isinstance(value, uuid.UUID) else value


def _texts(column: pa.ChunkedArray) -> list[object]:
    """Return the texts; bytes that are not UTF-8 become lone surrogates, which the row check names."""
    if not is_text(column.type):
        return list(column.to_pylist())
    plain = column.cast(pa.string())
    try:
        return list(plain.to_pylist())
    except UnicodeDecodeError:
        found = plain.cast(pa.binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in found]


def _keep(uri: str, column: pa.ChunkedArray, field: pa.Field) -> pa.Array:
    """Return a metadata column in its type, its text valid; nothing else of a value may change."""
    try:
        chunks = column.cast(field.type).chunks
    except pa.ArrowException as error:
        raise CorpusError(
            f"{uri}: kept column {field.name!r} is {column.type} here and {field.type} in the data set: "
            f"{error}; leave it out of corpus.keep_columns and choose another output.uri"
        ) from error
    array = pa.concat_arrays(chunks) if chunks else pa.array([], field.type)
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        found = array.cast(_with_bytes(field.type)).to_pylist()
        return pa.array([_decoded(value, field.type) for value in found], field.type)
    return array


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    return pa.binary() if pa.types.is_string(kind) else rebuild(kind, _with_bytes)


def _decoded(value: Any, kind: pa.DataType) -> Any:
    """Return a value of `_with_bytes` of the type as one of the type."""
    if value is None:
        return None
    if pa.types.is_string(kind):
        return value.decode("utf-8", "replace")
    if pa.types.is_struct(kind):
        return {f.name: _decoded(value[f.name], f.type) for f in kind.fields}
    if pa.types.is_map(kind):
        return [(_decoded(key, kind.key_type), _decoded(item, kind.item_type)) for key, item in value]
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_decoded(item, kind.value_type) for item in value]
    return value
