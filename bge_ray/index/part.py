"""The file that an add task leaves behind: encoded vectors sorted by list.

    offset          bytes                content
    0               HEAD_BYTES           magic, crc32 and length of the JSON, the JSON, zeros
    HEAD_BYTES      12 * (nlist + 1)     table: rows in all lists before this one, crc32 of this list
    lists_offset    rows * (code + 8)    per list: codes, then int64 ids

All numbers are little-endian. A range of lists is one range of bytes, and the table says where
it starts, so a merge task reads two ranges of each part and checks what it read. Codes then ids
per list is how FAISS writes an IVF list, too: merging copies bytes and understands none.
"""

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bge_ray.errors import IndexBuildError
from bge_ray.index.factory import ID_BYTES
from bge_ray.records.ids import IdArray

MAGIC = b"BGEPART1"
HEAD_BYTES = 4096
# Of a damaged part: its name says what it was made from, so it can be made again.
WAY_OUT = "; run index.py with index.verify, which makes damaged parts anew"
_PREFIX = struct.Struct("<8sII")  # magic, crc32 of the JSON, length of the JSON
_ENTRY = np.dtype([("start", "<u8"), ("crc", "<u4")])

# (offset, length) -> that many bytes of one stored part.
ReadRange: TypeAlias = Callable[[int, int], bytes]


@dataclass(frozen=True)
class PartHead:
    """What a part says of itself.

    ``training_sha256`` names the trained index, ``ids_sha256`` the hash of its ids in list order
    (two parts with the same are the same rows), ``min_id`` and ``max_id`` are -1 in an empty part.
    """

    training_sha256: str
    nlist: int
    code_size: int
    rows: int
    min_id: int
    max_id: int
    ids_sha256: str
    table_crc32: int

    @property
    def entry_bytes(self) -> int:
        """Bytes of one vector: its code and its id."""
        return self.code_size + ID_BYTES

    @property
    def lists_offset(self) -> int:
        """Where the lists begin."""
        return HEAD_BYTES + _ENTRY.itemsize * (self.nlist + 1)


@dataclass(frozen=True)
class Part:
    """A stored part: ``name`` for messages, ``read`` for its bytes."""

    name: str
    head: PartHead
    read: ReadRange

    def read_exactly(self, offset: int, length: int) -> bytes:
        """Read a range.

        Raises:
            IndexBuildError: the part is shorter than it says.
        """
        data = self.read(offset, length) if length else b""
        if len(data) != length:
            raise IndexBuildError(
                f"index part {self.name}: {len(data)} of {length} bytes at {offset}, it is truncated{WAY_OUT}"
            )
        return data


def write_part(
    training_sha256: str,
    nlist: int,
    lists: npt.NDArray[np.int64],
    codes: npt.NDArray[np.uint8],
    ids: IdArray,
) -> bytes:
    """Lay encoded vectors out as a part.

    Args:
        training_sha256: hash of the trained index that encoded them.
        nlist: number of lists of that index.
        lists: (n,) list of each vector, in [0, nlist).
        codes: (n, code_size) uint8, in C order.
        ids: (n,) int64.

    Returns:
        The file; within a list, vectors keep their order.
    """
    order = np.argsort(lists, kind="stable")
    ids = ids[order].astype("<i8")
    table = np.zeros(nlist + 1, _ENTRY)
    table["start"][1:] = np.cumsum(np.bincount(lists, minlength=nlist))
    start = table["start"].tolist()
    out = io.BytesIO()
    out.seek(HEAD_BYTES + table.nbytes)
    for number in np.flatnonzero(np.diff(table["start"])).tolist():
        begin, end = start[number], start[number + 1]
        # Copy the codes of one list at a time; a single list is in order as it stands.
        for column in (codes if nlist == 1 else codes[order[begin:end]], ids[begin:end]):
            table["crc"][number] = zlib.crc32(column.data, table["crc"][number])
            out.write(column.data)
    head = PartHead(
        training_sha256=training_sha256,
        nlist=nlist,
        code_size=codes.shape[1],
        rows=len(ids),
        min_id=int(ids.min()) if len(ids) else -1,
        max_id=int(ids.max()) if len(ids) else -1,
        ids_sha256=hashlib.sha256(ids.tobytes()).hexdigest(),
        table_crc32=zlib.crc32(table.tobytes()),
    )
    text = json.dumps(asdict(head), sort_keys=True).encode()
    out.seek(0)
    out.write((_PREFIX.pack(MAGIC, zlib.crc32(text), len(text)) + text).ljust(HEAD_BYTES, b"\0"))
    out.write(table.tobytes())
    return out.getvalue()


def open_part(name: str, read: ReadRange) -> Part:
    """Read the head of a stored part.

    Args:
        name: used in messages, for instance its URI.
        read: called with (offset, length); may return fewer bytes at the end of the file.

    Raises:
        IndexBuildError: this is no part, or its head is damaged.
    """
    data = read(0, HEAD_BYTES)
    if len(data) != HEAD_BYTES or not data.startswith(MAGIC):
        raise IndexBuildError(f"{name} is no index part, or a truncated one{WAY_OUT}")
    _, crc, length = _PREFIX.unpack_from(data)
    text = data[_PREFIX.size : _PREFIX.size + length]
    if zlib.crc32(text) != crc:
        raise IndexBuildError(f"index part {name}: its head is damaged{WAY_OUT}")
    fields: dict[str, Any] = json.loads(text)
    return Part(name, PartHead(**fields), read)


def part_sizes(part: Part) -> IdArray:
    """Read the (nlist,) int64 number of vectors in each list.

    Raises:
        IndexBuildError: the table is truncated or damaged.
    """
    data = part.read_exactly(HEAD_BYTES, part.head.lists_offset - HEAD_BYTES)
    if zlib.crc32(data) != part.head.table_crc32:
        raise IndexBuildError(f"index part {part.name}: its table is damaged{WAY_OUT}")
    starts = np.frombuffer(data, _ENTRY)["start"].astype(np.int64)
    return starts[1:] - starts[:-1]


@dataclass(frozen=True)
class Table:
    """Where the lists [first, first + len(sizes)) of one part lie, and their checksums.

    ``starts`` is (lists + 1,) int64 rows before each list, ``crcs`` one number a list.
    """

    first: int
    starts: IdArray
    crcs: list[int]

    @property
    def sizes(self) -> IdArray:
        """(lists,) int64 vectors in each list."""
        return self.starts[1:] - self.starts[:-1]


@dataclass(frozen=True)
class ListRows:
    """The bytes of lists [first, first + len(sizes)) of one part, checked."""

    data: memoryview
    sizes: list[int]


def read_table(part: Part, first: int, stop: int) -> Table:
    """Read where a range of lists lies.

    Raises:
        IndexBuildError: the part is truncated, or its table makes no sense.
    """
    entries = np.frombuffer(
        part.read_exactly(HEAD_BYTES + _ENTRY.itemsize * first, _ENTRY.itemsize * (stop - first + 1)), _ENTRY
    )
    table = Table(first, entries["start"].astype(np.int64), entries["crc"].tolist())
    if (table.sizes < 0).any() or table.starts[-1] > part.head.rows:
        raise IndexBuildError(f"index part {part.name}: its table is damaged{WAY_OUT}")
    return table


def read_blocks(part: Part, table: Table, max_bytes: int) -> Iterator[tuple[int, ListRows]]:
    """Read the lists of a table in blocks of whole lists, and check each.

    Args:
        part: where from.
        table: of `read_table`.
        max_bytes: most bytes of a block; a longer list makes a block of its own.

    Yields:
        (number of the block's first list within the table, its lists).

    Raises:
        IndexBuildError: the part is truncated, or a list does not have the checksum it was written with.
    """
    head = part.head
    starts = table.starts
    begin = 0
    while begin < len(starts) - 1:
        most = starts[begin] + max_bytes // head.entry_bytes
        stop = max(begin + 1, int(np.searchsorted(starts, most, side="right")) - 1)
        place = head.lists_offset + int(starts[begin]) * head.entry_bytes
        data = memoryview(part.read_exactly(place, int(starts[stop] - starts[begin]) * head.entry_bytes))
        ends = ((starts[begin : stop + 1] - starts[begin]) * head.entry_bytes).tolist()
        for number in range(begin, stop):
            rows = data[ends[number - begin] : ends[number - begin + 1]]
            if len(rows) and zlib.crc32(rows) != table.crcs[number]:
                raise IndexBuildError(
                    f"index part {part.name}: list {table.first + number} is damaged{WAY_OUT}"
                )
        yield begin, ListRows(data, (starts[begin + 1 : stop + 1] - starts[begin:stop]).tolist())
        begin = stop


def read_lists(part: Part, first: int, stop: int) -> ListRows:
    """Read a range of lists in one piece, and check it.

    Args:
        part: where from.
        first: first list.
        stop: one past the last list, at most ``nlist``.

    Raises:
        IndexBuildError: the part is truncated, or a list does not have the checksum it was written with.
    """
    table = read_table(part, first, stop)
    everything = int(table.starts[-1] - table.starts[0]) * part.head.entry_bytes
    [(_, found)] = read_blocks(part, table, everything)
    return found


def list_crc(part: Part, number: int) -> int:
    """Read the checksum of one list: of its codes, then its ids."""
    entry = part.read_exactly(HEAD_BYTES + _ENTRY.itemsize * number, _ENTRY.itemsize)
    return int(np.frombuffer(entry, _ENTRY)["crc"][0])
