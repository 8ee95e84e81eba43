"""CSV and TSV: rows numbered in one streaming pass, and streamed again when they are read.

A quoted field may hold a newline, so there is no place in the middle from which one could read.
"""

import contextlib
import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from bge_ray.errors import CorpusError
from bge_ray.formats import lines
from bge_ray.formats.endings import ending_of
from bge_ray.formats.inference import MAX_EXACT_INT, CsvValues, is_written_double
from bge_ray.formats.lines import Parsed, open_lines, read_units_of, to_rows
from bge_ray.formats.rows import RawRows
from bge_ray.formats.sought import Sought
from bge_ray.formats.units import UnitCutter
from bge_ray.records.columns import Columns
from bge_ray.records.plan import Coding, Span, UnitLimits
from bge_ray.storage.objects import Storage


def scan_delimited(
    storage: Storage, uri: str, size: int, coding: Coding, sought: Sought, limits: UnitLimits
) -> tuple[list[Span], dict[str, pa.DataType]]:
    """Number the rows of a CSV or TSV object; see `scan_jsonl`. The first row names the columns.

    Raises:
        CorpusError: the stream is broken, a record cannot be told from the next, or the header is not
            UTF-8 or names a column twice.
    """
    cutter = UnitCutter(limits, size)
    with _open_records(storage, uri, size, coding) as (header, records):
        # What is embedded is text, though every field of it may look like a number.
        inferred = [n for n in sought.kept if n in header and n not in sought.texts and n != sought.title]
        kept = {header.index(name): CsvValues() for name in inferred}
        for record in records:
            cutter.add(0, 0, 1, sum(len(value.encode("utf-8", "surrogateescape")) for value in record))
            if len(record) == len(header):
                for place, values in kept.items():
                    values.add(record[place])
    types = {header[place]: values.arrow_type() for place, values in kept.items()}
    return cutter.as_stream(size), dict.fromkeys(header, pa.string()) | types


def read_delimited(
    storage: Storage, uri: str, coding: Coding, span: Span, columns: Columns, todo: set[int]
) -> Iterator[tuple[int, RawRows]]:
    """Yield (first row, rows) of each unit of a span whose first row is in ``todo``, in order."""
    with _open_records(storage, uri, span.stop, coding) as (header, records):
        for first, unit in read_units_of(records, span.unit_rows, span.first_row, todo):
            yield first, to_rows(uri, [_name_fields(header, record) for record in unit], columns, field_array)


def field_array(fields: Sequence[str | None], kind: pa.DataType) -> pa.Array:
    """Return the fields of a column as an array of a type; an empty field is null but in a column of text.

    Raises:
        ValueError, OverflowError: a field is not of the type.
    """
    if pa.types.is_string(kind):
        return pa.array([f if f is None else f.encode(errors="replace").decode() for f in fields], kind)
    return pa.array([_field_value(f, kind) if f else None for f in fields], kind)


@contextlib.contextmanager
def _open_records(
    storage: Storage, uri: str, size: int, coding: Coding
) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    csv.field_size_limit(lines.MAX_LINE_BYTES)
    delimiter = ending_of(uri).delimiter
    with open_lines(storage, uri, size, coding.compression) as file:
        # Where quotes are plain characters a record is a line, and only a line feed ends one.
        newline = "\n" if coding.quoting == "none" else ""
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
        if coding.quoting == "none":
            records = _iter_plain(text, uri, delimiter)
        else:
            one_line = coding.quoting == "auto" and delimiter == "\t"
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            records = _iter_quoted(reader, uri, one_line=one_line)
        header = list(coding.header) or next(records, [])
        _check_header(uri, header)
        yield header, _checked(records, uri, header) if coding.header else records


def _check_header(uri: str, header: list[str]) -> None:
    try:
        "".join(header).encode()
    except UnicodeEncodeError:
        named = [name.encode(errors="surrogateescape") for name in header]
        raise CorpusError(
            f"{uri}: the header {named!r:.200} is not UTF-8; write the file anew as UTF-8"
        ) from None
    if len(set(header)) != len(header):
        raise CorpusError(f"{uri}: a column name stands twice in the header {header}")


def _iter_quoted(reader: Any, uri: str, *, one_line: bool) -> Iterator[list[str]]:
    """Yield the records that are not blank; where a bad one ends is unknown, so it ends the reading."""
    first_line = 1
    try:
        for record in reader:
            if one_line and reader.line_num > first_line:
                raise CorpusError(
                    f"{uri}: a quote that opens in line {first_line} closes in line {reader.line_num}, which "
                    "makes one row of these lines: set corpus.csv_quoting to none if quotes are plain "
                    "characters there, or to csv if a field may hold line breaks"
                )
            if record:
                yield record
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise CorpusError(
            f"{uri}: not valid CSV in the record that begins at line {first_line}: {error}"
            + (" (is a quote left open?)" if reader.line_num > first_line else "")
            + "; set corpus.csv_quoting to none if quotes are plain characters there"
        ) from error


def _iter_plain(text: io.TextIOWrapper, uri: str, delimiter: str) -> Iterator[list[str]]:
    """Yield the fields of each line that is not blank, quotes and all."""
    for number, line in enumerate(text, 1):
        if len(line) > lines.MAX_LINE_BYTES:
            raise CorpusError(f"{uri}: line {number} has more than {lines.MAX_LINE_BYTES} characters")
        fields = line.removesuffix("\n").removesuffix("\r")
        if fields:
            yield fields.split(delimiter)


def _checked(records: Iterator[list[str]], uri: str, header: list[str]) -> Iterator[list[str]]:
    """Yield the records, if the first of them fits a header that was given."""
    first = next(records, None)
    if first is None:
        return
    if len(first) != len(header):
        raise CorpusError(
            f"{uri}: its first record has {len(first)} fields, corpus.header names {len(header)} columns"
        )
    yield first
    yield from records


def _name_fields(header: list[str], record: list[str]) -> Parsed:
    if len(record) != len(header):
        return None, f"{len(record)} fields, the header has {len(header)}"
    return dict(zip(header, record, strict=True)), ""


def _field_value(field: str, kind: pa.DataType) -> Any:
    if pa.types.is_boolean(kind):
        if field.lower() not in ("true", "false"):
            raise ValueError("neither true nor false")
        return field.lower() == "true"
    if pa.types.is_integer(kind):
        return int(field)
    if is_written_double(field):
        return float(field)
    if abs(int(field)) > MAX_EXACT_INT:
        raise ValueError("no double is exactly this integer")
    return float(field)
