"""Columns of shards on this machine's disk: each is fetched once, however often it is asked for."""

import functools
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.dataset.lookup import (
    PARALLEL_SHARDS,
    ShardMap,
    find_in,
    group_ranges,
    no_rows,
    take_rows,
)
from bge_ray.dataset.read import open_shard, read_groups, vouched_for
from bge_ray.errors import StorageError
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import IdArray
from bge_ray.storage.objects import Storage, join

# Of a disk this share is left to others; what would not fit makes room first.
LEFT_FREE = 0.1
# Linux lets a process map 65,530 files. A column of 16,384 rows is one, so that these are a hundred million
# rows of five columns: of more a machine hardly has the disk.
MOST_TABLES = 30_000
# Of the shards asked for last it is known where their columns lie.
KEPT_FOOTERS = 2_000

# Takes columns of a row group, by its shard and its number in it.
Take: TypeAlias = Callable[[FileFact, int, pa.Table], None]


def free_bytes() -> int:
    """Return how many bytes may still be written to the disk of temporary files."""
    disk = shutil.disk_usage(tempfile.gettempdir())
    return int(disk.free - LEFT_FREE * disk.total)


class MappedTables:
    """Tables by their keys in files that are mapped into memory and have no name, so that they end with us.

    Where ``room`` has none for another, or there are ``most``, those that were not asked for the longest go.
    For several threads.
    """

    def __init__(self, room: Callable[[], int] = free_bytes, most: int = MOST_TABLES) -> None:
        """Start empty; ``room`` says how many bytes may still be written."""
        self._room, self._most = room, most
        self._tables: OrderedDict[Hashable, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> pa.Table | None:
        """Return the table of a key, if it is there."""
        with self._lock:
            table = self._tables.get(key)
            if table is not None:
                self._tables.move_to_end(key)
            return table

    def put(self, key: Hashable, table: pa.Table) -> pa.Table:
        """Hold a table, and return it as it is held; where there is no room for it, it is not."""
        with self._lock:
            while self._room() < table.nbytes:
                if not self._tables:
                    return table
                self._tables.popitem(last=False)
        held = _mapped(table)
        with self._lock:
            if len(self._tables) >= self._most:
                self._tables.popitem(last=False)
            self._tables[key] = held
        return held


def _mapped(table: pa.Table) -> pa.Table:
    """Return a table whose bytes are in a file of this machine and not in memory.

    Raises:
        StorageError: the disk is full.
    """
    try:
        with tempfile.NamedTemporaryFile(prefix="bge-ray-shard-") as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            return pa.ipc.open_file(pa.memory_map(file.name)).read_all()
    except OSError as error:
        raise StorageError(
            f"{tempfile.gettempdir()}: {table.nbytes:,} bytes of a shard could not be held there ({error}); "
            "make room, or name another folder with TMPDIR"
        ) from error


class HeldShards:
    """Some shards of a data set, of which only the row groups and columns are fetched that are asked for."""

    def __init__(self, storage: Storage, root: str, shards: ShardMap, tables: MappedTables) -> None:
        """Fetch nothing yet; ``tables`` is where what is fetched is held."""
        self.root, self.shards = root, shards
        self._storage, self._tables = storage, tables
        self._footer = functools.lru_cache(KEPT_FOOTERS)(self._read_footer)

    def places(self, ids: IdArray, columns: Sequence[str]) -> pa.Table:
        """Return columns of the rows with the given vector ids, as `lookup.read_places` does.

        Raises:
            StorageError: a shard is missing or damaged.
        """
        names = list(dict.fromkeys(columns))
        with ThreadPoolExecutor(PARALLEL_SHARDS) as pool:
            tables = list(pool.map(lambda part: self.rows(part[0], part[1], names), self.shards.split(ids)))
        return pa.concat_tables(tables) if tables else no_rows(names)

    def rows(self, fact: FileFact, ids: IdArray, columns: Sequence[str]) -> pa.Table:
        """Return columns of some rows of one shard; see `places`."""
        with vouched_for(join(self.root, fact.path)):
            schema, ranges, _ = self._footer(fact)
            return take_rows(schema, ranges, functools.partial(self._group, fact), ids, columns)

    def find(self, wanted: pa.Array, column: str) -> tuple[IdArray, IdArray]:
        """Look for (n,) distinct values of a column in all shards, as `lookup.find_passages` does in one.

        Raises:
            StorageError: a shard is missing or damaged.
        """

        def look(fact: FileFact) -> tuple[IdArray, IdArray]:
            with vouched_for(join(self.root, fact.path)):
                groups = range(len(self._footer(fact)[1]))
                return find_in((self._group(fact, n, ["vector_id", column]) for n in groups), wanted, column)

        with ThreadPoolExecutor(PARALLEL_SHARDS) as pool:
            found = list(pool.map(look, self.shards.facts))
        none = np.empty(0, np.int64)
        positions, ids = zip(*found, strict=True) if found else ((), ())
        return np.concatenate([none, *positions]), np.concatenate([none, *ids])

    def whole(
        self, fact: FileFact, columns: Sequence[str], others: Sequence[str] = (), take: Take | None = None
    ) -> list[pa.RecordBatch]:
        """Return columns of all rows of a shard whose bytes are those of the manifest, by its row groups.

        All of its bytes are read for that: ``others`` of its columns go to ``take`` whenever they are.

        Raises:
            StorageError: it is missing, or its bytes are others.
        """
        key = (fact.path, *columns)
        table = self._tables.get(key)
        if table is None:
            wanted = list(dict.fromkeys([*columns, *others]))
            parts = []
            for number, group in enumerate(read_groups(self._storage, self.root, fact, wanted)):
                if take is not None:
                    take(fact, number, group.select(list(others)))
                parts.append(group.select(list(columns)))
            table = self._tables.put(key, pa.concat_tables(parts))
        return [batch for batch in table.to_batches() if len(batch)]

    def keep(self, fact: FileFact, number: int, table: pa.Table) -> None:
        """Hold columns of a row group that somebody else has read, so that they are not fetched again."""
        for name in table.column_names:
            self._tables.put((fact.path, number, name), table.select([name]))

    def _group(self, fact: FileFact, number: int, columns: Sequence[str]) -> pa.Table:
        """Return columns of one row group; what is not held is fetched, together."""
        held = {name: self._tables.get((fact.path, number, name)) for name in columns}
        if missing := [name for name, table in held.items() if table is None]:
            uri, (_, _, metadata) = join(self.root, fact.path), self._footer(fact)
            with open_shard(self._storage, uri, fact, metadata) as file:
                fetched = file.read_row_group(number, columns=missing, use_threads=False)
            for name in missing:
                held[name] = self._tables.put((fact.path, number, name), fetched.select([name]))
        there = [table for table in held.values() if table is not None]
        return pa.table(
            [table.column(0) for table in there], pa.schema([table.schema.field(0) for table in there])
        )

    def _read_footer(self, fact: FileFact) -> tuple[pa.Schema, list[tuple[int, int]], pq.FileMetaData]:
        with open_shard(self._storage, join(self.root, fact.path), fact) as file:
            return file.schema_arrow, group_ranges(file.metadata), file.metadata
