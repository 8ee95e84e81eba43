"""Which rows of a data set pass filters: settled once a shard and filter, one bit a row.

A filter reads kept columns alone, which all chunks of a row share, so that rows pass, and not chunks.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bge_ray.dataset.filters import AT_ONCE, Filter, compute, connect
from bge_ray.dataset.lookup import PARALLEL_SHARDS, ShardMap
from bge_ray.dataset.read import read_columns
from bge_ray.errors import StorageError
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import CHUNK_BITS, IdArray
from bge_ray.storage.objects import Storage, join

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

BitArray: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Passes:
    """How many vectors, and rows that they are of, pass a filter; ``fault`` says why that cannot be told."""

    vectors: int
    rows: int
    fault: str | None = None


@dataclass(frozen=True)
class ShardPasses:
    """What of one shard passes: a bit a row of its unit, lowest first, and none at all where no row does."""

    bits: BitArray
    vectors: int
    rows: int


@dataclass(frozen=True)
class Passing:
    """The rows of a data set that pass a filter.

    ``bits`` (total,) uint8 hold those of shard i of ``shards`` from ``offsets[i]`` to ``offsets[i + 1]``,
    (n + 1,) int64; see `ShardPasses`.
    """

    shards: ShardMap
    offsets: IdArray
    bits: BitArray
    passes: Passes

    @staticmethod
    def of(shards: ShardMap, parts: Sequence[ShardPasses]) -> "Passing":
        """Put together what passes of each shard, in their order."""
        sizes = np.array([0, *(len(part.bits) for part in parts)], np.int64)
        bits = np.concatenate([np.empty(0, np.uint8), *(part.bits for part in parts)])
        passes = Passes(sum(part.vectors for part in parts), sum(part.rows for part in parts))
        return Passing(shards, np.cumsum(sizes), bits, passes)

    def has(self, ids: IdArray) -> npt.NDArray[np.bool_]:
        """Tell of vector ids of any shape whether their rows pass; ids of no row do not."""
        found = np.zeros(ids.shape, np.bool_)
        if not len(self.bits):
            return found
        places = np.searchsorted(self.shards.starts, ids, side="right") - 1
        asked = (places >= 0) & (ids < self.shards.stops[places])
        asked &= np.diff(self.offsets)[places] > 0
        rows, places = ids[asked], places[asked]
        rows = (rows - self.shards.starts[places]) >> CHUNK_BITS
        found[asked] = (self.bits[self.offsets[places] + (rows >> 3)] >> (rows & 7)) & 1
        return found

    def some_of(self, path: str) -> bool:
        """Tell whether any row of the shard at a path passes."""
        number = self._numbers[path]
        return bool(self.offsets[number] < self.offsets[number + 1])

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {fact.path: number for number, fact in enumerate(self.shards.facts)}


# For each filter, in their order, what passes of one shard, or why that cannot be told.
Marked: TypeAlias = list[ShardPasses | str]


def mark_shards(storage: Storage, root: str, shards: ShardMap, filters: Sequence[Filter]) -> list[Marked]:
    """Read the columns of some filters of some shards, each once, and settle which rows pass.

    Memory: the columns of one shard, and a bit a row and filter.

    Raises:
        StorageError: a shard is missing or damaged, or lacks a column.
    """
    database = connect()
    places = zip(shards.facts, shards.starts.tolist(), shards.stops.tolist(), strict=True)
    return [_mark(database, storage, root, place, filters) for place in places]


def mark_all(
    storage: Storage, root: str, shards: ShardMap, filters: Sequence[Filter]
) -> dict[str, Passing | str]:
    """Settle which rows of all shards pass, in this process; by the SQL of each filter."""
    with ThreadPoolExecutor(PARALLEL_SHARDS) as pool:
        found = pool.map(
            lambda part: mark_shards(storage, root, part, filters), shards.dealt(PARALLEL_SHARDS)
        )
        return put_together(shards, filters, itertools.chain.from_iterable(found))


def put_together(
    shards: ShardMap, filters: Sequence[Filter], marked: Iterable[Marked]
) -> dict[str, Passing | str]:
    """Return for each filter, by its SQL, what passes of all shards, or why that cannot be told of one."""
    by_shard = list(marked)
    found: dict[str, Passing | str] = {}
    for number, one in enumerate(filters):
        parts = [marks[number] for marks in by_shard]
        faults = [part for part in parts if isinstance(part, str)]
        told = [part for part in parts if isinstance(part, ShardPasses)]
        found[one.sql] = faults[0] if faults else Passing.of(shards, told)
    return found


def _mark(
    database: "DuckDBPyConnection",
    storage: Storage,
    root: str,
    place: tuple[FileFact, int, int],
    filters: Sequence[Filter],
) -> Marked:
    """Settle which rows of one shard pass, whose ids are from a first one up to but without the last."""
    fact, first, stop = place
    uri = join(root, fact.path)
    names = list(dict.fromkeys(["vector_id", *(name for one in filters for name in one.columns)]))
    tables = list(read_columns(storage, root, fact, names))
    if lacking := {*names} - {name for table in tables for name in table.column_names}:
        raise StorageError(f"{uri}: lacks the columns {', '.join(sorted(lacking))}; run bge-ray embed again")
    rows = [(table["vector_id"].to_numpy() - first) >> CHUNK_BITS for table in tables]
    found: Marked = []
    for start in range(0, len(filters), AT_ONCE):
        some = filters[start : start + AT_ONCE]
        by_table = [compute(database, table, some) for table in tables]
        for marks in zip(*by_table, strict=True):
            fault = next((part for part in marks if isinstance(part, str)), None)
            n_rows = (stop - first) >> CHUNK_BITS
            found.append(_packed(rows, marks, n_rows) if fault is None else f"{fault} (in {uri})")
    return found


def _packed(rows: Sequence[IdArray], marks: Sequence[Any], n_rows: int) -> ShardPasses:
    passes = np.zeros(n_rows, np.bool_)
    for some, marked in zip(rows, marks, strict=True):
        passes[some[marked]] = True
    bits = np.packbits(passes, bitorder="little") if passes.any() else np.empty(0, np.uint8)
    vectors = sum(int(np.count_nonzero(marked)) for marked in marks)
    return ShardPasses(bits, vectors, int(np.count_nonzero(passes)))
