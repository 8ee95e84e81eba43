"""From vector ids to what the embedding shards hold of them: passage ids, vectors, kept columns.

An id is a place, so the manifest alone says which shard holds it; of that shard only the row groups and
columns that are asked for are read.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.dataset.read import open_shard
from bge_ray.errors import StorageError
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
        live = [(m.unit, m.embeddings) for m in manifest.shards if m.embeddings is not None]
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

    def split(self, ids: IdArray) -> Iterator[tuple[FileFact, IdArray]]:
        """Yield each shard that may hold some of the (n,) ascending ids, with those; others are left out."""
        places = np.searchsorted(self.starts, ids, side="right") - 1
        inside = (places >= 0) & (ids < self.stops[np.maximum(places, 0)]) if len(self.starts) else ids < ids
        ids, places = ids[inside], places[inside]
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
    if not tables:
        return pa.table({"vector_id": pa.array([], pa.int64()), **{name: pa.nulls(0) for name in columns}})
    return pa.concat_tables(tables)


def read_shard(storage: Storage, root: str, fact: FileFact, ids: IdArray, columns: Sequence[str]) -> pa.Table:
    """Read columns of some rows of one shard; see `read_places`."""
    uri = join(root, fact.path)
    names = ["vector_id", *columns]
    try:
        with open_shard(storage, uri, fact) as file:
            tables = [file.schema_arrow.empty_table().select(names)]
            for group in range(file.num_row_groups):
                statistics = file.metadata.row_group(group).column(0).statistics
                wanted = ids[(ids >= statistics.min) & (ids <= statistics.max)]
                if len(wanted):
                    table = file.read_row_group(group, columns=names, use_threads=False)
                    tables.append(table.take(pa.array(_positions(table["vector_id"].to_numpy(), wanted))))
    except (OSError, KeyError, AttributeError, pa.ArrowException) as error:
        raise _not_vouched_for(uri, error) from error
    return pa.concat_tables(tables).replace_schema_metadata(None)


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
    positions, found = [], []
    try:
        with open_shard(storage, uri, fact) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["vector_id", column], use_threads=False)
                places = pc.index_in(table[column], value_set=wanted)
                hit = pc.is_valid(places).to_numpy()
                positions.append(places.drop_null().to_numpy().astype(np.int64))
                found.append(table["vector_id"].to_numpy()[hit])
    except (OSError, KeyError, pa.ArrowException) as error:
        raise _not_vouched_for(uri, error) from error
    none = np.empty(0, np.int64)
    return np.concatenate([none, *positions]), np.concatenate([none, *found])


def _positions(there: IdArray, wanted: IdArray) -> IdArray:
    """Return where in ``there`` (ascending) those of ``wanted`` stand that are there at all."""
    places = np.searchsorted(there, wanted)
    found = places < len(there)
    found[found] = there[places[found]] == wanted[found]
    return places[found].astype(np.int64)


def _not_vouched_for(uri: str, error: Exception) -> StorageError:
    return StorageError(
        f"{uri}: is not the embedding shard that the manifest vouches for ({error!r}); run bge-ray embed "
        "again"
    )
