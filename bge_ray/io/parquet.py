"""Parquet corpora: units planned from the footer, read by row groups."""

import contextlib
import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.errors import CorpusError
from bge_ray.io.rows import Rows
from bge_ray.io.storage import Storage
from bge_ray.manifest import Columns, Span, UnitLimits

READ_ROWS = 8192


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
    with _open(storage, uri, size) as file:
        metadata = file.metadata
        columns = {f.name: kept_type(f.type) for f in file.schema_arrow}
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

    Raises:
        CorpusError: a page cannot be decoded, or a column is missing.
    """
    names = list(
        dict.fromkeys([columns.id, columns.text, *([columns.title] if columns.title else []), *columns.kept])
    )
    with _open(storage, uri, size) as file:
        batches = file.iter_batches(READ_ROWS, row_groups=range(span.start, span.stop), columns=names)
        held: list[pa.RecordBatch] = []
        first = span.first_row
        for n_rows in span.unit_rows:
            have = sum(map(len, held))
            while have < n_rows and (batch := next(batches, None)) is not None:
                held.append(batch)
                have += len(batch)
            table = pa.Table.from_batches(held)
            rest = table.slice(n_rows)
            held = rest.to_batches() if len(rest) else []
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
def _open(storage: Storage, uri: str, size: int) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(pa.PythonFile(storage.open(uri, size), mode="r"), pre_buffer=True) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{uri}: unreadable Parquet: {error}") from error


def _text_bytes(group: pq.RowGroupMetaData, text_columns: tuple[str, ...]) -> int:
    chunks = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema in text_columns)


def _even_cut(rows: int, pieces: int) -> tuple[int, ...]:
    return tuple(rows * (i + 1) // pieces - rows * i // pieces for i in range(pieces))


def _to_rows(table: pa.Table, columns: Columns) -> Rows:
    kept = {name: _keep(table[name], kind) for name, kind in columns.kept.items()}
    return Rows(
        ids=table[columns.id].to_pylist(),
        texts=table[columns.text].to_pylist(),
        titles=table[columns.title].to_pylist() if columns.title is not None else None,
        kept=kept,
        faults={},
    )


def _keep(column: pa.ChunkedArray, kind: str) -> pa.Array:
    if kind == "string" and kept_type(column.type) == "string" and not _is_text(column.type):
        return pa.array(
            [None if v is None else json.dumps(v, default=str) for v in column.to_pylist()], pa.string()
        )
    cast = column.cast(pa.type_for_alias(kind))
    return pa.concat_arrays(cast.chunks) if cast.num_chunks else pa.array([], cast.type)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
