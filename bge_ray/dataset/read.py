"""Embedding shards read back as arrays: whole and verified, or some rows of some row groups."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.dataset.commit import FINGERPRINT_KEY
from bge_ray.errors import DamagedShardError
from bge_ray.records.dataset import DatasetSpec, FileFact, ShardFact
from bge_ray.records.ids import IdArray
from bge_ray.records.schemas import embedding_schema
from bge_ray.storage.objects import Storage, join

COLUMNS = ["vector_id", "embedding"]

# (n, dim) float16 or float32 as stored, read-only, and (n,) int64 vector ids.
Vectors: TypeAlias = tuple[npt.NDArray[np.floating], IdArray]


def read_vectors(storage: Storage, root: str, fact: FileFact) -> Iterator[Vectors]:
    """Read one embedding shard, row group by row group.

    Memory: the bytes of the file, and one row group.

    Args:
        storage: where to read.
        root: folder of the data set.
        fact: path, size and sha256 of the shard, from the manifest.

    Raises:
        StorageError: it is missing.
        DamagedShardError: its bytes are not those that the manifest vouches for. Raised before the first
            row group.
    """
    return map(arrays_of, read_groups(storage, root, fact, COLUMNS))


def read_groups(storage: Storage, root: str, fact: FileFact, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read columns of one embedding shard, row group by row group; see `read_vectors`."""
    with pq.ParquetFile(pa.BufferReader(read_verified(storage, root, fact))) as file:
        for group in range(file.num_row_groups):
            # The task that reads has one CPU; Arrow would take all there are.
            yield file.read_row_group(group, columns=list(columns), use_threads=False)


def read_verified(storage: Storage, root: str, fact: FileFact) -> bytes:
    """Return the bytes of a shard.

    Raises:
        StorageError: it is missing.
        DamagedShardError: its bytes are not those that the manifest vouches for.
    """
    uri = join(root, fact.path)
    data = storage.read(uri)
    if len(data) != fact.bytes or hashlib.sha256(data).hexdigest() != fact.sha256:
        lengths = "" if len(data) == fact.bytes else f": {len(data)}, not {fact.bytes}"
        raise DamagedShardError(uri, f"holds other bytes than were written{lengths}")
    return data


@contextlib.contextmanager
def open_shard(
    storage: Storage, uri: str, fact: FileFact, metadata: pq.FileMetaData | None = None
) -> Iterator[pq.ParquetFile]:
    """Open a shard to read some row groups of it, each page against its checksum.

    With its metadata, its end is not read again.

    Raises:
        StorageError: it is missing.
        DamagedShardError: it is the shard of another unit, or of another state of its unit.
    """
    source = pa.PythonFile(storage.open(uri, fact.bytes), mode="r")
    with pq.ParquetFile(source, metadata=metadata, pre_buffer=True, page_checksum_verification=True) as file:
        if metadata is None and isinstance(fact, ShardFact):
            # A checksum a page tells nothing of a whole file in the place of another.
            found = (file.schema_arrow.metadata or {}).get(FINGERPRINT_KEY, b"").decode()
            if found != fact.fingerprint:
                raise DamagedShardError(uri, "is the shard of another unit, or of another state of its unit")
        yield file


@contextlib.contextmanager
def vouched_for(uri: str) -> Iterator[None]:
    """Say of what cannot be read that it is not what it should be, and the way out."""
    try:
        yield
    except (OSError, LookupError, AttributeError, pa.ArrowException) as error:
        found = f"is not the embedding shard that the manifest vouches for ({error!r})"
        raise DamagedShardError(uri, found) from error


def shard_columns(spec: DatasetSpec) -> set[str]:
    """Return the names of all columns that a data set's embedding shards have."""
    return {*embedding_schema(spec.model.outputs, pa.schema([]), spec.chunking).names, *spec.columns.kept}


def read_columns(storage: Storage, root: str, fact: FileFact, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read columns of one embedding shard, row group by row group, and no byte of the others.

    Raises:
        StorageError: it is missing.
        DamagedShardError: it is damaged.
    """
    uri = join(root, fact.path)
    with vouched_for(uri), open_shard(storage, uri, fact) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=list(columns), use_threads=False)


def sample_vectors(storage: Storage, root: str, fact: FileFact, groups: dict[int, list[int]]) -> Vectors:
    """Read some rows of some row groups of a shard, without reading the rest.

    Args:
        storage: where to read.
        root: folder of the data set.
        fact: path and size of the shard.
        groups: row numbers within each row group, by its number.

    Returns:
        (n, dim) vectors and (n,) int64 ids, in the order of groups and rows.

    Raises:
        StorageError: it is missing.
        DamagedShardError: it is damaged.
    """
    uri = join(root, fact.path)
    parts = []
    with vouched_for(uri), open_shard(storage, uri, fact) as file:
        for group, rows in sorted(groups.items()):
            vectors, ids = arrays_of(file.read_row_group(group, columns=COLUMNS, use_threads=False))
            parts.append((vectors[rows], ids[rows]))
    return np.concatenate([v for v, _ in parts]), np.concatenate([i for _, i in parts])


def arrays_of(rows: pa.Table | pa.RecordBatch) -> Vectors:
    """Return the vectors and ids of rows with COLUMNS."""
    column = rows["embedding"]
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    vectors = column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), column.type.list_size)
    return vectors, rows["vector_id"].to_numpy()
