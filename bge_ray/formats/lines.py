"""What formats of lines share: the stream of an object, its lines, and parsed records as rows."""

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa

from bge_ray.errors import CorpusError
from bge_ray.formats.endings import ending_of
from bge_ray.formats.rows import RawRows
from bge_ray.records.columns import Columns
from bge_ray.storage.objects import ObjectInfo, Storage

READ_BYTES = 8 << 20
# A line longer than this is rejected unread: no text of this size is a passage.
MAX_LINE_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"

# A record and "", or None and what is wrong with it.
Parsed: TypeAlias = tuple[dict[str, Any] | None, str]
# Makes an array of a type out of the values of one column.
ToArray: TypeAlias = Callable[[Sequence[Any], pa.DataType], pa.Array]


@dataclass(frozen=True)
class TextLine:
    """One line that is not blank, stripped; ``text`` is None where ``fault`` says what is wrong with it."""

    number: int
    text: str | None
    fault: str

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"line {self.number}"


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


def read_text_lines(storage: Storage, info: ObjectInfo) -> Iterator[TextLine]:
    """Yield the lines of a text file that are not blank; its name says how it is compressed.

    Raises:
        CorpusError: the compressed stream is broken.
        StorageError: it cannot be fetched.
    """
    with open_lines(storage, info.uri, info.size, ending_of(info.uri).compression) as file:
        for number, (_, _, line) in enumerate(iter_lines(file), 1):
            if line is None:
                yield TextLine(number, None, f"too long, over {MAX_LINE_BYTES} bytes")
                continue
            try:
                text = line.decode().strip()
            except UnicodeDecodeError as error:
                yield TextLine(number, None, f"not UTF-8: {error.reason}")
                continue
            if text:
                yield TextLine(number, text, "")


def read_units_of(
    records: Iterator[Any], unit_rows: Sequence[int], first_row: int, todo: set[int]
) -> Iterator[tuple[int, list[Any]]]:
    """Yield (first row, records) of each unit in ``todo``, in order, and skip what lies before them."""
    last = max(todo, default=-1)
    for n_rows in unit_rows:
        if first_row > last:
            return
        unit = itertools.islice(records, n_rows)
        if first_row in todo:
            yield first_row, list(unit)
        else:
            for _ in unit:
                pass
        first_row += n_rows


def to_rows(uri: str, parsed: Sequence[Parsed], columns: Columns, to_array: ToArray) -> RawRows:
    """Return parsed records as rows of the columns.

    Raises:
        CorpusError: a value of a kept column is not of its type; names the column, the row and the value.
    """
    records = [record or {} for record, _ in parsed]
    faults = {row: ("malformed_line", wrong) for row, (record, wrong) in enumerate(parsed) if record is None}
    return RawRows(
        ids=[r.get(columns.id) for r in records],
        texts=[r.get(columns.text) for r in records],
        titles=[r.get(columns.title) for r in records] if columns.title is not None else None,
        kept={
            field.name: _kept_array(uri, field, [r.get(field.name) for r in records], to_array)
            for field in columns.kept_schema()
        },
        faults=faults,
    )


def _kept_array(uri: str, field: pa.Field, values: Sequence[Any], to_array: ToArray) -> pa.Array:
    try:
        return to_array(values, field.type)
    except (ValueError, TypeError, OverflowError, pa.ArrowException):
        raise CorpusError(_name_misfit(uri, field, values, to_array)) from None


def _name_misfit(uri: str, field: pa.Field, values: Sequence[Any], to_array: ToArray) -> str:
    for row, value in enumerate(values):
        try:
            to_array([value], field.type)
        except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
            return (
                f"{uri}: kept column {field.name!r} is {field.type} in the data set, and row {row} of a unit "
                f"holds {value!r:.100}: {error}; leave the column out of "
                "corpus.keep_columns and choose another output.uri"
            )
    return f"{uri}: kept column {field.name!r} cannot be read as {field.type}"
