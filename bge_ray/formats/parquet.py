"""Parquet corpora: units planned from the footer, read by row groups."""

import contextlib
import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.errors import CorpusError
from bge_ray.formats.rows import Rows
from bge_ray.records.dataset import Columns
from bge_ray.records.plan import Span, UnitLimits
from bge_ray.storage.objects import Storage

READ_ROWS = 8192
# What is fetched at once of each column of a row group that is streamed.
STREAM_BYTES = 8 << 20


def scan_parquet(
    storage: Storage, uri: str, size: int, text_columns: tuple[str, ...], limits: UnitLimits
) -> tuple[list[Span], dict[str, str]]:
    """Plan the units of a Parquet object from its footer alone.

    Neighbouring row groups share a unit while they fit; a row group that is too large for one
    unit is read once, as a stream of units.

    Args:
        storage: where to read.
        uri: the object.
        size: its bytes.
        text_columns: columns whose bytes count for the size of a unit.
        limits: when a unit is full.

    Returns:
        Its spans, and its columns with their Arrow types.

    Raises:
        CorpusError: not a Parquet file, or a truncated one.
    """
    with open_parquet(storage, uri, size) as file:
        metadata = file.metadata
        columns = {f.name: kept_type(f.type) for f in file.schema_arrow}
        if len(columns) != len(file.schema_arrow):
            raise CorpusError(f"{uri}: a column name stands twice among {file.schema_arrow.names}")
        groups = [
            (g.num_rows, _text_bytes(g, text_columns))
            for g in map(metadata.row_group, range(metadata.num_row_groups))
        ]
    spans: list[Span] = []
    first = start = rows = cost = 0

    def close(stop: int) -> None:
        nonlocal first, start, rows, cost
        if rows:
            n_units = max(1, -(-rows // limits.max_rows), -(-cost // limits.max_bytes))
            spans.append(Span(start, stop, first, _even_cut(rows, min(n_units, rows))))
        first, start, rows, cost = first + rows, stop, 0, 0

    for number, (n_rows, text_bytes) in enumerate(groups):
        group_cost = text_bytes + n_rows * limits.vector_bytes
        if rows and (rows + n_rows > limits.max_rows or cost + group_cost > limits.max_bytes):
            close(number)
        rows += n_rows
        cost += group_cost
    close(len(groups))
    return spans, columns


def read_parquet(
    storage: Storage, uri: str, size: int, span: Span, columns: Columns, todo: set[int]
) -> Iterator[tuple[int, Rows]]:
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
        batches = file.iter_batches(
            max(1, min(READ_ROWS, *span.unit_rows)), row_groups=range(span.start, span.stop), columns=names
        )
        held = pa.Table.from_batches([], pa.schema([file.schema_arrow.field(name) for name in names]))
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
                yield first, _to_rows(table.slice(0, n_rows), columns)
            first += n_rows


def kept_type(kind: pa.DataType) -> str:
    """Return the Arrow type a metadata column is kept in: itself where its name says all, else text."""
    if pa.types.is_dictionary(kind):
        return kept_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "string"
    try:
        return str(kind) if pa.type_for_alias(str(kind)) == kind else "string"
    except ValueError:
        return "string"


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


def _text_bytes(group: pq.RowGroupMetaData, text_columns: tuple[str, ...]) -> int:
    chunks = (group.column(i) for i in range(group.num_columns))
    return sum(
        c.total_uncompressed_size
        for c in chunks
        if c.path_in_schema in text_columns or c.path_in_schema.partition(".")[0] in text_columns
    )


def _even_cut(rows: int, pieces: int) -> tuple[int, ...]:
    return tuple(rows * (i + 1) // pieces - rows * i // pieces for i in range(pieces))


def _to_rows(table: pa.Table, columns: Columns) -> Rows:
    return Rows(
        ids=_values(table[columns.id]),
        texts=_values(table[columns.text]),
        titles=_values(table[columns.title]) if columns.title is not None else None,
        kept={name: _keep(table[name], kind) for name, kind in columns.kept.items()},
        faults={},
    )


def _values(column: pa.ChunkedArray) -> list[object]:
    """Return the values; text bytes that are not UTF-8 become lone surrogates, which the row check names."""
    if not _is_text(column.type):
        return list(column.to_pylist())
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [None if v is None else v.decode("utf-8", "surrogateescape") for v in _text_bytes_of(column)]


def _keep(column: pa.ChunkedArray, kind: str) -> pa.Array:
    if kind == "string" and not _is_text(column.type):
        return pa.array([_plain_text(v) for v in column.to_pylist()], pa.string())
    if kind == "string":
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            texts = [None if v is None else v.decode("utf-8", "replace") for v in _text_bytes_of(column)]
            return pa.array(texts, pa.string())
    cast = column.cast(pa.type_for_alias(kind))
    return pa.concat_arrays(cast.chunks) if cast.num_chunks else pa.array([], cast.type)


def _text_bytes_of(column: pa.ChunkedArray) -> list[bytes | None]:
    if pa.types.is_dictionary(column.type):
        chunks = (chunk.dictionary.cast(pa.large_binary()).take(chunk.indices) for chunk in column.chunks)
        return [value for chunk in chunks for value in chunk.to_pylist()]
    return list(column.cast(pa.large_binary()).to_pylist())


def _plain_text(value: object) -> str | None:
    """Nested values become JSON, any other its plain text."""
    if value is None:
        return None
    if isinstance(value, dict | list | bool):
        return json.dumps(value, default=str, ensure_ascii=False)
    return value.hex() if isinstance(value, bytes) else str(value)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
