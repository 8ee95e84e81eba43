"""Embedding shards read back as arrays, whole and verified, or some rows of some row groups."""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.errors import StorageError
from bge_ray.io.storage import Storage, join
from bge_ray.manifest import FileFact
from bge_ray.schema import IdArray

COLUMNS = ["vector_id", "embedding"]


def read_vectors(storage: Storage, root: str, fact: FileFact) -> tuple[npt.NDArray[np.floating], IdArray]:
    """Read one embedding shard.

    Args:
        storage: where to read.
        root: folder of the data set.
        fact: path, size and sha256 of the shard, from the manifest.

    Returns:
        (n, dim) float16 or float32, and (n,) int64 vector ids.

    Raises:
        StorageError: it is missing, or its bytes are not those that the manifest vouches for.
    """
    uri = join(root, fact.path)
    data = storage.read(uri)
    if len(data) != fact.bytes or hashlib.sha256(data).hexdigest() != fact.sha256:
        raise StorageError(
            f"{uri}: {len(data)} bytes that are not the {fact.bytes} the manifest vouches for; "
            "run embed.py again to make it anew"
        )
    return _arrays(pq.read_table(pa.BufferReader(data), columns=COLUMNS))


def sample_vectors(
    storage: Storage, root: str, fact: FileFact, groups: dict[int, list[int]]
) -> tuple[npt.NDArray[np.floating], IdArray]:
    """Read some rows of some row groups of a shard.

    Args:
        storage: where to read.
        root: folder of the data set.
        fact: path and size of the shard.
        groups: row numbers within each row group, by its number.

    Returns:
        (n, dim) vectors and (n,) int64 ids, in the order of groups and rows.
    """
    uri = join(root, fact.path)
    parts = []
    with pq.ParquetFile(pa.PythonFile(storage.open(uri, fact.bytes), mode="r"), pre_buffer=True) as file:
        for group, rows in sorted(groups.items()):
            vectors, ids = _arrays(file.read_row_group(group, columns=COLUMNS))
            parts.append((vectors[rows], ids[rows]))
    return np.concatenate([v for v, _ in parts]), np.concatenate([i for _, i in parts])


def _arrays(table: pa.Table) -> tuple[npt.NDArray[np.floating], IdArray]:
    column = table["embedding"]
    dim = column.type.list_size
    flat = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), dim) for chunk in column.chunks]
    vectors = flat[0] if len(flat) == 1 else np.concatenate([np.empty((0, dim), np.float32), *flat])
    return vectors, table["vector_id"].to_numpy()
