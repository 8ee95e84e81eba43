"""From vector ids to what the embedding shards hold of them: passage ids, vectors, kept columns.

An id is a place, so the manifest alone says which shard holds it; of that shard only the row groups and
columns that are asked for are read.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bge_ray.dataset.read import open_shard, vouched_for
from bge_ray.records.dataset import FileFact, Manifest
from bge_ray.records.ids import IdArray, id_range
from bge_ray.storage.objects import Storage, join

PARALLEL_SHARDS = 8


@dataclass(frozen=True)
class ShardMap:
    """The shards of a manifest in order of their ids; shard i has ids in [starts[i], stops[i]).

    ``starts`` and ``stops`` are (n,) int64.
    """

    starts: IdArray
    stops: IdArray
    facts: tuple[FileFact, ...]

    @staticmethod
    def of(manifest: Manifest) -> "ShardMap":
        """Return the map of all shards that have vectors."""
        live = [(m.unit, m.shard) for m in manifest.shards if m.shard is not None]
        live.sort(key=lambda entry: entry[0])
        ranges = np.array([id_range(u.object_no, u.first_row, u.n_rows) for u, _ in live], dtype=np.int64)
        ranges = ranges.reshape(-1, 2)
        return ShardMap(ranges[:, 0].copy(), ranges[:, 1].copy(), tuple(fact for _, fact in live))

    def dealt(self, parts: int) -> list["ShardMap"]:
        """Return the shards in at most so many parts, neighbours together, none of them empty."""
        step = max(1, -(-len(self.facts) // parts))
        return [
            ShardMap(self.starts[at : at + step], self.stops[at : at + step], self.facts[at : at + step])
            for at in range(0, len(self.facts), step)
        ]

    def every(self, step: int, first: int) -> "ShardMap":
        """Return shard ``first`` and every so-many-th one behind it."""
        some = slice(first, None, step)
        return ShardMap(self.starts[some], self.stops[some], self.facts[some])

    def numbers(self, ids: IdArray) -> IdArray:
        """Return the number of the shard that may hold each of (n,) ids, -1 where none does."""
        if not len(self.starts):
            return np.full(len(ids), -1)
        places = np.searchsorted(self.starts, ids, side="right") - 1
        return np.where(ids < self.stops[np.maximum(places, 0)], places, -1)

    def split(self, ids: IdArray) -> Iterator[tuple[FileFact, IdArray]]:
        """Yield each shard that may hold some of the (n,) ascending ids, with those; others are left out."""
        places = self.numbers(ids)
        ids, places = ids[places >= 0], places[places >= 0]
        edges = np.flatnonzero(np.diff(places, prepend=-1, append=-1))
        for start, stop in itertools.pairwise(edges):
            yield self.facts[int(places[start])], ids[start:stop]


def read_places(
    storage: Storage, root: str, shards: ShardMap, ids: IdArray, columns: Sequence[str]
) -> pa.Table:
    """Read columns of the rows with the given vector ids.

    Args:
        storage: where to read.
        root: folder of the data set.
        shards: of its manifest.
        ids: (n,) int64, ascending, without repetition.
        columns: of the embedding shards, beside ``vector_id``.

    Returns:
        ``vector_id`` and the columns, in order of the ids; an id that no shard holds has no row.

    Raises:
        StorageError: a shard is missing or damaged.
    """
    with ThreadPoolExecutor(PARALLEL_SHARDS) as pool:
        parts = shards.split(ids)
        tables = list(pool.map(lambda part: read_shard(storage, root, part[0], part[1], columns), parts))
    return pa.concat_tables(tables) if tables else no_rows(columns)


def no_rows(columns: Sequence[str]) -> pa.Table:
    """Return what `read_places` does of no id, without the types of the columns."""
    return pa.table({"vector_id": pa.array([], pa.int64()), **{name: pa.nulls(0) for name in columns}})


def read_shard(storage: Storage, root: str, fact: FileFact, ids: IdArray, columns: Sequence[str]) -> pa.Table:
    """Read columns of some rows of one shard; see `read_places`."""
    uri = join(root, fact.path)
    with vouched_for(uri), open_shard(storage, uri, fact) as file:
        ranges = group_ranges(file.metadata)
        return take_rows(file.schema_arrow, ranges, functools.partial(_read_group, file), ids, columns)


def find_passages(
    storage: Storage, root: str, fact: FileFact, wanted: pa.Array, column: str = "passage_id"
) -> tuple[IdArray, IdArray]:
    """Look for passages in one shard, by their ids or by another column.

    Args:
        storage: where to read.
        root: folder of the data set.
        fact: path and size of the shard.
        wanted: (n,) distinct values of the column.
        column: of the shard, such as ``text_hash``.

    Returns:
        Positions in ``wanted`` of those that are there, and their vector ids, both (m,) int64.

    Raises:
        StorageError: the shard is missing or damaged.
    """
    uri = join(root, fact.path)
    with vouched_for(uri), open_shard(storage, uri, fact) as file:
        groups = (_read_group(file, n, ["vector_id", column]) for n in range(file.num_row_groups))
        return find_in(groups, wanted, column)


def _read_group(file: pq.ParquetFile, number: int, columns: Sequence[str]) -> pa.Table:
    return file.read_row_group(number, columns=list(columns), use_threads=False)


def group_ranges(metadata: pq.FileMetaData) -> list[tuple[int, int]]:
    """Return the first and last vector id of each row group of a shard."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    statistics = (group.column(0).statistics for group in groups)
    return [(found.min, found.max) for found in statistics]


def take_rows(
    schema: pa.Schema,
    ranges: Sequence[tuple[int, int]],
    group: Callable[[int, Sequence[str]], pa.Table],
    ids: IdArray,
    columns: Sequence[str],
) -> pa.Table:
    """Return columns of the rows of a shard with the given ids, and ``vector_id``.

    Args:
        schema: of the shard.
        ranges: see `group_ranges`.
        group: reads columns of a row group, by its number.
        ids: (n,) ascending.
        columns: beside ``vector_id``.
    """
    names = ["vector_id", *columns]
    tables = [schema.empty_table().select(names)]
    for number, (first, last) in enumerate(ranges):
        wanted = ids[(ids >= first) & (ids <= last)]
        if len(wanted):
            table = group(number, names)
            tables.append(table.take(pa.array(_positions(table["vector_id"].to_numpy(), wanted))))
    return pa.concat_tables(table.replace_schema_metadata(None) for table in tables)


def find_in(groups: Iterable[pa.Table], wanted: pa.Array, column: str) -> tuple[IdArray, IdArray]:
    """Look for values of a column in the row groups of a shard; see `find_passages`."""
    positions, found = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for table in groups:
        places = pc.index_in(table[column], value_set=wanted)
        hit = pc.is_valid(places).to_numpy()
        positions.append(places.drop_null().to_numpy().astype(np.int64))
        found.append(table["vector_id"].to_numpy()[hit])
    return np.concatenate(positions), np.concatenate(found)


def _positions(there: IdArray, wanted: IdArray) -> IdArray:
    """Return where in ``there`` (ascending) those of ``wanted`` stand that are there at all."""
    places = np.searchsorted(there, wanted)
    found = places < len(there)
    found[found] = there[places[found]] == wanted[found]
    return places[found].astype(np.int64)
