"""JSONL: one streaming pass numbers the rows and finds their keys, later reads go straight to a unit.

A plain object is cut at byte offsets, so that each unit can be read alone. A compressed one can only
be streamed from its beginning.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from bge_ray.errors import CorpusError
from bge_ray.formats import lines
from bge_ray.formats.inference import JsonValues
from bge_ray.formats.lines import Parsed, iter_lines, open_lines, read_units_of, to_rows
from bge_ray.formats.rows import RawRows
from bge_ray.formats.sought import Sought
from bge_ray.formats.units import UnitCutter
from bge_ray.records.columns import Columns
from bge_ray.records.plan import Span, UnitLimits
from bge_ray.storage.objects import Storage

# The keys of so many rows are all noted. Further rows are parsed only if they may add something.
SAMPLE_ROWS = 100


def scan_jsonl(
    storage: Storage, uri: str, size: int, compression: str, sought: Sought, limits: UnitLimits
) -> tuple[list[Span], dict[str, pa.DataType]]:
    """Number the rows of a JSONL object, cut it into units and find its columns.

    Args:
        storage: where to read.
        uri: the object.
        size: its bytes.
        compression: "", "gzip" or "zstd".
        sought: the columns that are looked for in every row.
        limits: when a unit is full.

    Returns:
        Its spans, and its columns: those that any row has of the sought ones, and all that its first
        rows have. A kept column has the type of all its values; any other is taken as text.

    Raises:
        CorpusError: the compressed stream is broken, or no line looks like a record.
    """
    cutter = UnitCutter(limits, size)
    keys = _Keys(sought)
    row = 0
    first: bytes | None = None
    with open_lines(storage, uri, size, compression) as file:
        for start, stop, line in iter_lines(file):
            if line is not None and not line.strip():
                continue
            first = first or line
            if line is not None and (row < SAMPLE_ROWS or keys.may_grow_by(line)):
                keys.add(parse_line(line)[0] or {}, sample=row < SAMPLE_ROWS)
            cutter.add(start, stop, 1, stop - start, 0 if compression else stop - start)
            row += 1
    if first is not None and not keys.columns():
        raise CorpusError(f"{uri}: {_why_no_record(first)}")
    return cutter.as_stream(size) if compression else cutter.as_pieces(), keys.columns()


def read_jsonl(
    storage: Storage, uri: str, compression: str, span: Span, columns: Columns, todo: set[int]
) -> Iterator[tuple[int, RawRows]]:
    """Yield (first row, rows) of each unit of a span whose first row is in ``todo``, in order."""
    # A compressed object has one span, from its first byte to its last.
    with open_lines(storage, uri, span.stop, compression, span.start) as file:
        rows = (line for _, _, line in iter_lines(file, span.start) if line is None or line.strip())
        for first, unit in read_units_of(rows, span.unit_rows, span.first_row, todo):
            yield first, to_rows(uri, [parse_line(line) for line in unit], columns, json_array)


def parse_line(line: bytes | None) -> Parsed:
    """Return the record of a JSONL line, or None and what is wrong with it."""
    if line is None:
        return None, f"the line exceeds {lines.MAX_LINE_BYTES} bytes"
    try:
        # Undecodable bytes become lone surrogates, which the row check then names.
        record = json.loads(line.decode("utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    if not isinstance(record, dict):
        return None, f"expected a JSON object, got {type(record).__name__}"
    return record, ""


def _why_no_record(line: bytes) -> str:
    """Say what an object is of whose lines none was a record, by the first of them."""
    start = line.lstrip()[:1000]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        return "is UTF-16, or no text; write it anew as UTF-8"
    if start[:1] == b"[":
        return "is a JSON array, expected one object a line; write it anew, as jq -c '.[]' does"
    if b"\r" in start.rstrip():
        return "its lines end in a carriage return alone; write it anew with line feeds"
    wrong = parse_line(line)[1] or "an object without keys"
    return f"no line is a JSON object with keys, expected one a line; of the first: {wrong}"


def json_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return JSON values as an array of a type; in a column of text what is no string becomes JSON.

    Raises:
        ValueError, TypeError, OverflowError, pa.ArrowException: a value is not of the type.
    """
    if pa.types.is_string(kind):
        return pa.array([_plain(value) for value in values], kind)
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array([_without_surrogates(value) for value in values], kind)


class _Keys:
    """The keys of an object's rows, and what the values of the kept ones are."""

    def __init__(self, sought: Sought) -> None:
        self._names: dict[str, None] = {}
        self._missing = sought.groups
        self._kept = {name: JsonValues() for name in sought.kept}
        self._traces = self._find_traces()

    def may_grow_by(self, line: bytes) -> bool:
        """Tell whether the line must be parsed: types need every value, a missing key its first."""
        if self._kept:
            return True
        for trace in self._traces:  # noqa: SIM110 - a generator costs as much as the search
            if trace in line:
                return True
        return False

    def add(self, record: dict[str, Any], *, sample: bool) -> None:
        for name, values in self._kept.items():
            if name in record:
                values.add(record[name])
        if sample:
            self._names |= dict.fromkeys(record)
        # After the sample an id key that is there already is not joined by another that stands for it:
        # which one is taken must not depend on what else is looked for.
        found = [name for group in self._missing for name in group if name in record]
        if found:
            self._names |= dict.fromkeys(found)
            self._missing = [group for group in self._missing if not set(group) & set(found)]
            self._traces = self._find_traces()

    def columns(self) -> dict[str, pa.DataType]:
        # A key that is no Unicode can be no setting, and its name no JSON.
        columns = {name.encode(errors="replace").decode(): pa.string() for name in self._names}
        return columns | {name: values.arrow_type() for name, values in self._kept.items() if values.is_seen}

    def _find_traces(self) -> list[bytes]:
        """Return what a line with a missing key holds: the key as it is, or an escape that may hide it."""
        names = [json.dumps(name, ensure_ascii=False).encode() for group in self._missing for name in group]
        escapes = [b"\\u", b"\\/"] if any(b"/" in name for name in names) else [b"\\u"]
        return [*names, *escapes] if names else []


def _plain(value: object) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", errors="replace").decode()


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_surrogates(item) for name, item in value.items()}
    return _plain(value) if isinstance(value, str) else value
