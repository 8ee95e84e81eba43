"""Input rows of any format to groups and units: read once, as a stream, and stored in one form.

Groups are named by their content, so that a rerun finds what it left, and an input that grew keeps all
of its groups but the last.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bge_ray.errors import StorageError
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.runs.groups import GroupTask, GroupUnit
from bge_ray.records.canonical import digest
from bge_ray.records.reports import RejectedRow
from bge_ray.storage.objects import Storage, join

# Texts of a group that came inline, in characters; more are cut into several groups.
GROUP_CHARS = 64 << 20

# Columns of which many rows have the same value.
REPEATED = ("query_id", "query", "filter")

# Rows that must stay together (the candidates of one query), as columns.
Block: TypeAlias = dict[str, list[Any]]


@dataclass(frozen=True)
class Limits:
    """When a unit and a group are full, in rows; a block that is larger makes a unit of its own."""

    unit_rows: int
    group_rows: int


@dataclass
class Rejections:
    """Input that was left out, each with its reason, in four lists of equal length."""

    query_ids: list[str | None] = field(default_factory=list)
    passage_ids: list[str | None] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    def add(self, query_id: str | None, passage_id: str | None, reason: str, detail: str) -> None:
        """Note one query, or one passage of a query, that is left out."""
        self.query_ids.append(query_id)
        self.passage_ids.append(passage_id)
        self.reasons.append(reason)
        self.details.append(detail[:300])

    def examples(self) -> Iterator[RejectedRow]:
        """Yield what was left out as a report shows it."""
        for query_id, passage_id, reason, detail in zip(
            self.query_ids, self.passage_ids, self.reasons, self.details, strict=True
        ):
            yield RejectedRow(reason, detail, query_id=query_id, passage_id=passage_id)

    def __len__(self) -> int:
        return len(self.reasons)


@dataclass(frozen=True)
class Intake:
    """All units of a run in order, and the groups with something to do."""

    units: tuple[GroupUnit, ...]
    groups: tuple[GroupTask, ...]

    @property
    def rows(self) -> int:
        """Input rows of all units."""
        return sum(unit.n_rows for unit in self.units)

    @property
    def todo_units(self) -> int:
        """Units with something to do."""
        return sum(len(group.todo) for group in self.groups)

    @property
    def todo_rows(self) -> int:
        """Input rows of the units to do."""
        return sum(unit.n_rows for group in self.groups for unit in group.todo)


def take_in(
    storage: Storage,
    folder: str,
    blocks: Iterable[Block],
    schema: pa.Schema,
    limits: Limits,
    key: str,
) -> Intake:
    """Cut input into units and groups, and store the groups that are not done.

    Memory: one group.

    Args:
        storage: where to write.
        folder: work folder of the run.
        blocks: columns of ``schema`` but ``row_no``.
        schema: of the stored rows.
        limits: when a unit and a group are full.
        key: of all that decides the outcome of a row beside the row itself.
    """
    finished = finished_parts(storage, folder)
    units: list[GroupUnit] = []
    groups: list[GroupTask] = []
    for number, (table, edges) in enumerate(_cut(blocks, schema, limits)):
        found = [
            GroupUnit(start, stop - start, digest(key, _content(table.slice(start, stop - start))))
            for start, stop in itertools.pairwise(edges)
        ]
        units += found
        todo = tuple(unit for unit in found if unit.fingerprint not in finished)
        if todo:
            name = digest(key, [unit.fingerprint for unit in found])
            uri = join(folder, "groups", f"{number:08d}-{name[:32]}.parquet")
            sink = pa.BufferOutputStream()
            repeated = [name for name in REPEATED if name in table.column_names]
            pq.write_table(table, sink, compression="zstd", use_dictionary=repeated)
            storage.write(uri, bytes(sink.getvalue()))
            groups.append(GroupTask(number, uri, todo))
    return Intake(tuple(units), tuple(groups))


def finished_parts(storage: Storage, folder: str) -> set[str]:
    """Return the fingerprints of the units whose parts are there."""
    listed = storage.list_files(join(folder, "parts"))
    return {info.uri.rpartition("/")[2].removesuffix(".parquet") for info in listed}


def read_group_stage(batch: pa.Table, storage: Storage) -> pa.Table:
    """Read the rows of a group that are to do."""
    parcel = Parcel.from_batch(batch)
    try:
        return parcel.filled(read_group(storage, parcel.task_as(GroupTask))).to_batch()
    except StorageError as error:
        return parcel.failed(str(error)).to_batch()


def read_group(storage: Storage, task: GroupTask) -> pa.Table:
    """Return the rows of the units to do; ``row_no`` tells which rows those are."""
    table = pq.read_table(pa.BufferReader(storage.read(task.uri)), use_threads=False)
    parts = [table.slice(unit.first_row, unit.n_rows) for unit in task.todo]
    return pa.concat_tables(parts)


def _cut(blocks: Iterable[Block], schema: pa.Schema, limits: Limits) -> Iterator[tuple[pa.Table, list[int]]]:
    """Yield the rows of each group, and the borders of its units, from 0 to its number of rows."""
    names = [name for name in schema.names if name != "row_no"]
    held: dict[str, list[Any]] = {name: [] for name in names}
    edges = [0]
    size = chars = 0

    def close() -> tuple[pa.Table, list[int]]:
        columns = {"row_no": list(range(size)), **held}
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
        return pa.table(arrays, schema=schema), [*edges, size]

    for block in blocks:
        n_rows = len(block[names[0]])
        if size > edges[-1] and size - edges[-1] + n_rows > limits.unit_rows:
            if size + n_rows > limits.group_rows or chars > GROUP_CHARS:
                yield close()
                held, edges, size, chars = {name: [] for name in names}, [0], 0, 0
            else:
                edges.append(size)
        for name in names:
            held[name].extend(block[name])
        size += n_rows
        chars += sum(len(text) for text in block.get("text", ()) if text)
    if size:
        yield close()


def _content(table: pa.Table) -> bytes:
    """Return a hash of the rows of a table, wherever they lie in it and whatever their ``row_no``."""
    sha = hashlib.sha256()
    for name in table.column_names:
        if name != "row_no":
            for piece in _pieces(table[name].combine_chunks()):
                sha.update(len(piece).to_bytes(8, "little"))
                sha.update(piece)
    return sha.digest()


def _pieces(array: pa.Array) -> Iterator[bytes]:
    """Yield what the values of an array come to: which are there, their lengths, and themselves."""
    yield np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes()
    if array.null_count == len(array):
        return
    if pa.types.is_list(array.type):
        yield pc.list_value_length(array).fill_null(0).to_numpy().tobytes()
        yield from _pieces(array.flatten())
    elif pa.types.is_string(array.type):
        yield pc.binary_length(array).fill_null(0).to_numpy().tobytes()
        _, offsets, data = array.buffers()
        ends = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
        yield memoryview(data)[ends[0] : ends[-1]].tobytes() if data is not None else b""
    else:
        nothing = pa.scalar(0).cast(array.type)
        yield array.fill_null(nothing).to_numpy(zero_copy_only=False).tobytes()
