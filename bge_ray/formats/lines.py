"""JSONL and CSV: one streaming pass numbers the rows, later reads go straight to a unit.

Plain JSONL is cut at byte offsets, so that each unit can be read alone. Compressed files and CSV
(a quoted field may hold a newline) can only be streamed from their beginning.
"""

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from bge_ray.errors import CorpusError
from bge_ray.formats.rows import Rows
from bge_ray.records.dataset import Columns
from bge_ray.records.plan import Span, UnitLimits
from bge_ray.storage.objects import Storage

READ_BYTES = 8 << 20
# A line longer than this is rejected unread: no text of this size is a passage.
MAX_LINE_BYTES = 64 << 20
COLUMN_SAMPLE_ROWS = 100
BOM = b"\xef\xbb\xbf"


def scan_jsonl(
    storage: Storage, uri: str, size: int, compression: str, limits: UnitLimits
) -> tuple[list[Span], dict[str, str]]:
    """Number the rows of a JSONL object and cut it into units.

    Args:
        storage: where to read.
        uri: the object.
        size: its bytes.
        compression: "", "gzip" or "zstd".
        limits: when a unit is full.

    Returns:
        Its spans, and the keys of its first rows, each with type "string".

    Raises:
        CorpusError: the compressed stream is broken.
    """
    cutter = _Cutter(limits)
    keys: dict[str, str] = {}
    with open_lines(storage, uri, size, compression) as file:
        for start, stop, line in iter_lines(file):
            if line is not None and not line.strip():
                continue
            if cutter.total < COLUMN_SAMPLE_ROWS and line is not None:
                record = _parse(line)[0]
                keys |= dict.fromkeys(record or {}, "string")
            cutter.add(start, stop, stop - start)
    if compression:
        return cutter.as_stream(size), keys
    return cutter.as_pieces(), keys


def scan_csv(
    storage: Storage, uri: str, size: int, compression: str, limits: UnitLimits
) -> tuple[list[Span], dict[str, str]]:
    """Number the rows of a CSV or TSV object; see `scan_jsonl`. The first row names the columns."""
    cutter = _Cutter(limits)
    with _open_csv(storage, uri, size, compression) as (header, rows):
        for record in rows:
            cutter.add(0, 0, sum(len(value.encode("utf-8", "surrogateescape")) for value in record))
    return cutter.as_stream(size), dict.fromkeys(header, "string")


def read_jsonl(
    storage: Storage, uri: str, compression: str, span: Span, columns: Columns, todo: set[int]
) -> Iterator[tuple[int, Rows]]:
    """Yield (first row, rows) of each unit of a span whose first row is in ``todo``, in order."""
    # A compressed object has one span, from its first byte to its last.
    start = span.start
    with open_lines(storage, uri, span.stop, compression, start) as file:
        lines = (line for _, _, line in iter_lines(file, start) if line is None or line.strip())
        first = span.first_row
        last = max(todo, default=-1)
        for n_rows in span.unit_rows:
            if first > last:
                return
            if first in todo:
                parsed = [_parse(line) for line in itertools.islice(lines, n_rows)]
                yield first, _to_rows(parsed, columns)
            else:
                _skip(lines, n_rows)
            first += n_rows


def read_csv(
    storage: Storage, uri: str, compression: str, span: Span, columns: Columns, todo: set[int]
) -> Iterator[tuple[int, Rows]]:
    """Yield (first row, rows) of each unit of a span whose first row is in ``todo``, in order."""
    with _open_csv(storage, uri, span.stop, compression) as (header, rows):
        first = span.first_row
        last = max(todo, default=-1)
        for n_rows in span.unit_rows:
            if first > last:
                return
            if first in todo:
                parsed = [_name_fields(header, record) for record in itertools.islice(rows, n_rows)]
                yield first, _to_rows(parsed, columns)
            else:
                _skip(rows, n_rows)
            first += n_rows


def iter_lines(file: io.BufferedIOBase, start: int = 0) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (start, stop, line) by byte offsets; the line is None where it exceeds MAX_LINE_BYTES.

    Args:
        file: positioned at ``start``.
        start: offset in the object; a byte order mark is dropped at 0 only.
    """
    while line := file.readline(MAX_LINE_BYTES):
        stop = start + len(line)
        whole: bytes | None = line
        while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
            stop += len(line)
            whole = None
        if start == 0 and whole is not None:
            whole = whole.removeprefix(BOM)
        yield start, stop, whole
        start = stop


class _Cutter:
    """Closes a unit when it is full by rows or by bytes."""

    def __init__(self, limits: UnitLimits) -> None:
        self._limits = limits
        self._units: list[tuple[int, int, int]] = []  # start byte, stop byte, rows
        self._start, self._stop, self._rows, self._bytes = 0, 0, 0, 0
        self.total = 0

    def add(self, start: int, stop: int, n_bytes: int) -> None:
        cost = n_bytes + self._limits.vector_bytes
        full = self._rows >= self._limits.max_rows or self._bytes + cost > self._limits.max_bytes
        if self._rows and full:
            self._close()
        if not self._rows:
            self._start = start
        self._stop = stop
        self._rows += 1
        self._bytes += cost
        self.total += 1

    def _close(self) -> None:
        if self._rows:
            self._units.append((self._start, self._stop, self._rows))
        self._rows, self._bytes = 0, 0

    def as_stream(self, size: int) -> list[Span]:
        self._close()
        return [Span(0, size, 0, tuple(rows for _, _, rows in self._units))] if self._units else []

    def as_pieces(self) -> list[Span]:
        self._close()
        spans, first = [], 0
        for start, stop, rows in self._units:
            spans.append(Span(start, stop, first, (rows,)))
            first += rows
        return spans


@contextlib.contextmanager
def open_lines(
    storage: Storage, uri: str, stop: int, compression: str, start: int = 0
) -> Iterator[io.BufferedReader]:
    """Open bytes [start, stop) of an object as a buffered stream, decompressed."""
    raw: Any = storage.open(uri, stop)
    raw.seek(start)
    if compression:
        # Unlike Python's zstd reader, Arrow's fails on a truncated stream, and reads every member of one.
        raw = pa.CompressedInputStream(
            pa.PythonFile(io.BufferedReader(raw, READ_BYTES), mode="r"), compression
        )
    try:
        with io.BufferedReader(raw, READ_BYTES) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{uri}: broken {compression or 'stream'}: {error}") from error


@contextlib.contextmanager
def _open_csv(
    storage: Storage, uri: str, size: int, compression: str
) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    name = uri.lower().removesuffix(".gz").removesuffix(".zst")
    csv.field_size_limit(MAX_LINE_BYTES)
    with open_lines(storage, uri, size, compression) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter="\t" if name.endswith(".tsv") else ",", strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise CorpusError(f"{uri}: a column name stands twice in the header {header}")
            yield header, _iter_records(reader, uri)
        except csv.Error as error:
            raise CorpusError(f"{uri}: the header is not valid CSV: {error}") from error


def _iter_records(reader: Any, uri: str) -> Iterator[list[str]]:
    """Yield the records that are not blank; where a bad one ends is unknown, so it ends the reading."""
    first_line = reader.line_num + 1
    try:
        for record in reader:
            if record:
                yield record
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise CorpusError(
            f"{uri}: not valid CSV in the record that begins at line {first_line}: {error}"
            + (" (is a quote left open?)" if reader.line_num > first_line else "")
        ) from error


def _skip(items: Iterator[Any], count: int) -> None:
    for _ in itertools.islice(items, count):
        pass


def _parse(line: bytes | None) -> tuple[dict[str, Any] | None, str]:
    """Return the record of a JSONL line, or None and what is wrong with it."""
    if line is None:
        return None, f"the line exceeds {MAX_LINE_BYTES} bytes"
    try:
        # Undecodable bytes become lone surrogates, which the row check then names.
        record = json.loads(line.decode("utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    if not isinstance(record, dict):
        return None, f"expected a JSON object, got {type(record).__name__}"
    return record, ""


def _name_fields(header: list[str], record: list[str]) -> tuple[dict[str, Any] | None, str]:
    if len(record) != len(header):
        return None, f"{len(record)} fields, the header has {len(header)}"
    return dict(zip(header, record, strict=True)), ""


def _to_rows(parsed: list[tuple[dict[str, Any] | None, str]], columns: Columns) -> Rows:
    records = [record or {} for record, _ in parsed]
    kept = {name: pa.array([_plain(r.get(name)) for r in records], pa.string()) for name in columns.kept}
    return Rows(
        ids=[r.get(columns.id) for r in records],
        texts=[r.get(columns.text) for r in records],
        titles=[r.get(columns.title) for r in records] if columns.title is not None else None,
        kept=kept,
        faults={
            row: ("malformed_line", wrong) for row, (record, wrong) in enumerate(parsed) if record is None
        },
    )


def _plain(value: object) -> str | None:
    """Metadata of line formats is kept as text: strings as they are, anything else as JSON."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", errors="replace").decode()
