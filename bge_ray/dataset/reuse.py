"""Texts that have vectors already: which of them some shards hold, and what they hold of each.

Which shards are worth a look is the caller's to say. That a vector is the right one is proved here: by the
hash of what the model read, by the sha256 of the shard, and by the vector fingerprint that stands in it. A
shard that fails one of these gives nothing, and is named.
"""

import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.dataset.commit import VECTOR_FINGERPRINT_KEY
from bge_ray.dataset.read import open_shard, read_verified
from bge_ray.errors import DamagedShardError, StorageError
from bge_ray.records.arrays import whole
from bge_ray.records.dataset import DatasetSpec, FileFact
from bge_ray.records.ids import IdArray
from bge_ray.records.schemas import TEXT_HASH_BYTES
from bge_ray.storage.objects import Storage, join

logger = logging.getLogger(__name__)

PARALLEL_SHARDS = 8
# What is taken over of a known text, beside its outputs: the same text has the same tokens.
TEXT_FACTS = ("n_tokens", "truncated")

# (n,) hashes of 16 bytes each.
HashArray = npt.NDArray[np.bytes_]


def hash_array(column: pa.Array | pa.ChunkedArray) -> HashArray:
    """Return the (n,) hashes of a column without nulls."""
    array = whole(column)
    data = array.buffers()[1]
    if data is None or not len(array):
        return np.empty(0, f"S{TEXT_HASH_BYTES}")
    return np.frombuffer(data, f"S{TEXT_HASH_BYTES}", len(array), array.offset * TEXT_HASH_BYTES)


def hash_column(hashes: HashArray) -> pa.Array:
    """Return (n,) hashes as a column; the way back from `hash_array`."""
    data = pa.py_buffer(np.ascontiguousarray(hashes).tobytes())
    return pa.Array.from_buffers(pa.binary(TEXT_HASH_BYTES), len(hashes), [None, data])


def find_hashes(known: HashArray, wanted: HashArray) -> IdArray:
    """Return for (m,) hashes which of (n,) ascending ones each is; -1 for none."""
    if not len(known):
        return np.full(len(wanted), -1, np.int64)
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[places] == wanted, places, -1).astype(np.int64)


@dataclass(frozen=True)
class KnownTexts:
    """The texts of some shards: n distinct ``hashes``, ascending, and where the first of each stands.

    ``shards`` (n,) count in ``facts``, ``rows`` (n,) in the shard.
    """

    facts: tuple[FileFact, ...]
    hashes: HashArray
    shards: IdArray
    rows: IdArray

    @staticmethod
    def of(facts: Sequence[FileFact], hashes: Sequence[HashArray]) -> "KnownTexts":
        """Put the hashes of shards, in the order of their rows, into order."""
        together = np.concatenate([np.empty(0, f"S{TEXT_HASH_BYTES}"), *hashes])
        shards = np.repeat(np.arange(len(hashes), dtype=np.int64), [len(part) for part in hashes])
        rows = np.concatenate([np.empty(0, np.int64), *(np.arange(len(part)) for part in hashes)])
        distinct, first = np.unique(together, return_index=True)
        return KnownTexts(tuple(facts), distinct, shards[first], rows[first])

    def find(self, wanted: HashArray) -> IdArray:
        """Return for (m,) hashes which of the known ones each is; -1 for none."""
        return find_hashes(self.hashes, wanted)


def read_hashes(storage: Storage, root: str, facts: Sequence[FileFact]) -> list[HashArray]:
    """Return the text hashes of some shards, row by row; none of a shard that cannot be read."""

    def read(fact: FileFact) -> HashArray:
        try:
            with open_shard(storage, join(root, fact.path), fact) as file:
                return hash_array(file.read(columns=["text_hash"], use_threads=False)["text_hash"])
        except (OSError, KeyError, StorageError, pa.ArrowException) as error:
            _warn(root, fact, error)
            return hash_array(pa.array([], pa.binary(TEXT_HASH_BYTES)))

    if not facts:
        return []
    with ThreadPoolExecutor(min(PARALLEL_SHARDS, len(facts))) as pool:
        return list(pool.map(read, facts))


def take_known(
    storage: Storage, root: str, spec: DatasetSpec, known: KnownTexts, wanted: HashArray
) -> tuple[IdArray, pa.Table]:
    """Read what shards hold of some texts.

    Memory: the bytes of one shard, one row group of it, and what is returned.

    Args:
        storage: where to read.
        root: folder of the data set.
        spec: of it; says which outputs there are.
        known: the texts of its shards.
        wanted: (m,) hashes.

    Returns:
        (k,) places in ``wanted`` of the texts that were found, ascending, and a table of k rows with
        every output of the model and TEXT_FACTS.
    """
    names = [*(output.name for output in spec.model.outputs), *TEXT_FACTS]
    found = known.find(wanted)
    places, parts = [], []
    for shard in np.unique(known.shards[found[found >= 0]]).tolist():
        of_shard = np.flatnonzero((found >= 0) & (known.shards[found] == shard))
        try:
            got, table = _take_rows(
                storage, root, known.facts[shard], spec, known.rows[found[of_shard]], names, wanted[of_shard]
            )
        except (OSError, KeyError, StorageError, pa.ArrowException) as error:
            _warn(root, known.facts[shard], error)
            continue
        places.append(of_shard[got])
        parts.append(table)
    if not parts:
        return np.empty(0, np.int64), pa.table({})
    at = np.concatenate(places)
    order = np.argsort(at, kind="stable")
    return at[order], pa.concat_tables(parts).take(pa.array(order))


def _take_rows(
    storage: Storage,
    root: str,
    fact: FileFact,
    spec: DatasetSpec,
    rows: IdArray,
    names: list[str],
    hashes: HashArray,
) -> tuple[IdArray, pa.Table]:
    """Return columns of (m,) rows of a shard: which of them are of the text they should be, and those."""
    data = read_verified(storage, root, fact)
    taken, places = [], []
    with pq.ParquetFile(io.BytesIO(data)) as file:
        fingerprint = (file.schema_arrow.metadata or {}).get(VECTOR_FINGERPRINT_KEY, b"").decode()
        if fingerprint != spec.vector_fingerprint:
            raise StorageError(f"{join(root, fact.path)}: holds vectors of another data set")
        first = 0
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            inside = np.flatnonzero((rows >= first) & (rows < first + n_rows))
            if len(inside):
                table = file.read_row_group(group, columns=["text_hash", *names], use_threads=False)
                table = table.take(pa.array(rows[inside] - first))
                right = np.flatnonzero(hash_array(table["text_hash"]) == hashes[inside])
                places.append(inside[right])
                taken.append(table.take(pa.array(right)).select(names))
            first += n_rows
    return np.concatenate(places), pa.concat_tables(taken).replace_schema_metadata(None)


def _warn(root: str, fact: FileFact, error: Exception) -> None:
    why = error.found if isinstance(error, DamagedShardError) else error
    uri = join(root, fact.path)
    logger.warning("%s: no vector is taken from it, its texts are embedded anew: %s", uri, why)
