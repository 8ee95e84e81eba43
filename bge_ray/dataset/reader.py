"""A complete data set for those who read it: batches in order of place, and rows by id."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bge_ray.dataset.folder import read_complete
from bge_ray.dataset.lookup import PARALLEL_SHARDS, ShardMap, find_passages, read_places
from bge_ray.dataset.pointer import follow
from bge_ray.dataset.read import read_groups, shard_columns
from bge_ray.records.dataset import DatasetSpec, FileFact, Manifest
from bge_ray.records.ids import IdArray
from bge_ray.records.model import EMBEDDING
from bge_ray.storage.objects import Storage


@dataclass(frozen=True)
class Batch:
    """Rows in order of place.

    ``vectors`` is (n, dim) float16 or float32 as stored, read-only, and (n, 0) float32 where the data set has
    no output `embedding`. ``vector_ids`` (n,) int64, ascending,
    ``passage_ids`` an Arrow array of n strings, ``metadata`` a table of n rows with the columns asked for.
    """

    vectors: npt.NDArray[np.floating[Any]]
    vector_ids: IdArray
    passage_ids: pa.Array
    metadata: pa.Table

    def __len__(self) -> int:
        return len(self.vector_ids)


class DatasetReader:
    """A data set as its manifest was when it was opened; see `bge_ray.open_dataset`."""

    def __init__(self, storage: Storage, uri: str, spec: DatasetSpec, manifest: Manifest) -> None:
        """Take a data set that `open_reader` found to be complete."""
        self.uri = uri
        self.spec = spec
        self.manifest = manifest
        self._storage = storage
        self._shards = ShardMap.of(manifest)

    def __len__(self) -> int:
        """Return the number of vectors."""
        return self.manifest.vectors

    @property
    def dim(self) -> int:
        """Length of a vector; 0 where the data set has none."""
        return self.spec.model.dim if self._dense else 0

    @property
    def _dense(self) -> tuple[str, ...]:
        """The column of the vectors, if there is one."""
        return tuple(output.name for output in self.spec.model.outputs if output.name == EMBEDDING)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metadata columns that were kept of the corpus."""
        return tuple(self.spec.columns.kept)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """Yield all rows in order of place.

        Memory: one shard and one batch, which is a row group of at most 16,384 rows.

        Args:
            columns: of the shards, beside ids and vectors; None takes the metadata that was kept.

        Raises:
            StorageError: a shard is missing, or its bytes are not those that the manifest vouches for.
            KeyError: there is no such column.
        """
        names = self._checked(columns)
        for fact in self._shards.facts:
            wanted = dict.fromkeys(["vector_id", "passage_id", *self._dense, *names])
            for table in read_groups(self._storage, self.uri, fact, tuple(wanted)):
                yield self._batch(table, names)

    def lookup(self, passage_ids: Sequence[str], columns: Sequence[str] | None = None) -> Batch:
        """Return the rows of passages, in order of place; reads the passage ids of every shard.

        A passage that is in several objects of the corpus has several rows, one that was rejected or never
        was has none.

        Args:
            passage_ids: those wanted.
            columns: as in `batches`.

        Raises:
            StorageError: a shard is missing or damaged.
            KeyError: there is no such column.
        """
        wanted = pa.array(list(dict.fromkeys(passage_ids)), pa.string())

        def found_in(fact: FileFact) -> IdArray:
            return find_passages(self._storage, self.uri, fact, wanted)[1]

        with ThreadPoolExecutor(PARALLEL_SHARDS) as pool:
            found = list(pool.map(found_in, self._shards.facts)) if len(wanted) else []
        return self.rows(np.concatenate([np.empty(0, np.int64), *found]), columns)

    def rows(self, vector_ids: npt.ArrayLike, columns: Sequence[str] | None = None) -> Batch:
        """Return the rows of (n,) vector ids, in order of place; an id that is not there has none.

        Only the row groups that hold them are read.

        Raises:
            StorageError: a shard is missing or damaged.
            KeyError: there is no such column.
        """
        names = self._checked(columns)
        ids = np.unique(np.asarray(vector_ids, dtype=np.int64))
        wanted = dict.fromkeys(["passage_id", *self._dense, *names])
        table = read_places(self._storage, self.uri, self._shards, ids, tuple(wanted))
        return self._batch(table, names)

    def _checked(self, columns: Sequence[str] | None) -> tuple[str, ...]:
        if columns is None:
            return self.columns
        known = shard_columns(self.spec)
        for name in columns:
            if name not in known:
                raise KeyError(f"{self.uri}: has no column {name!r}; it has {', '.join(sorted(known))}")
        return tuple(columns)

    def _batch(self, table: pa.Table, names: Sequence[str]) -> Batch:
        table = table.combine_chunks()
        if not len(table):
            vectors = np.empty(
                (0, self.dim), self.spec.model.output(EMBEDDING).dtype if self._dense else "f4"
            )
            return Batch(vectors, np.empty(0, np.int64), pa.array([], pa.string()), table.select(list(names)))
        vectors = np.empty((len(table), 0), np.float32)
        if self._dense:
            flat = pa.concat_arrays(table[EMBEDDING].chunks).flatten().to_numpy(zero_copy_only=True)
            vectors = flat.reshape(len(table), self.dim)
        return Batch(
            vectors,
            table["vector_id"].to_numpy(),
            pa.concat_arrays(table["passage_id"].chunks),
            table.select(list(names)).replace_schema_metadata(None),
        )


def open_reader(uri: str) -> DatasetReader:
    """Open a data set; see `bge_ray.open_dataset`."""
    storage = Storage()
    root = follow(storage, uri)
    return DatasetReader(storage, root, *read_complete(storage, root))
