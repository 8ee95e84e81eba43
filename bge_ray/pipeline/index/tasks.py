"""What the index job does in other processes: sample, train, add, merge, finish, exact search.

Each task reserves one CPU and uses one, except training, which is told how many it has.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bge_ray.dataset.read import Vectors, read_vectors, sample_vectors
from bge_ray.errors import IndexBuildError
from bge_ray.index.add import Assign, add_part, build_shard, complete_shard
from bge_ray.index.factory import IndexSpec, Metric
from bge_ray.index.files import merged_file, rebuild
from bge_ray.index.header import ivf_header
from bge_ray.index.merge import CHUNK_BYTES, ListRange, merged_range
from bge_ray.index.package import use_threads
from bge_ray.index.part import Part, PartHead, ReadRange, open_part, read_blocks, read_table
from bge_ray.index.search import set_default_effort
from bge_ray.index.topk import Results, exact_topk, merge_topk
from bge_ray.index.train import KMEANS_ITERATIONS, KMeans, TrainedIndex, centroids, load_trained, train
from bge_ray.index.vectors import check_rows
from bge_ray.pipeline.index.heldout import held_rows
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import FloatArray, IdArray
from bge_ray.storage.concatenate import Piece, concatenate, write_large
from bge_ray.storage.objects import Storage, join

READ_BYTES = 32 << 20
PARALLEL_READS = 16


@dataclass(frozen=True)
class TrainedFile:
    """A trained index as it is stored."""

    uri: str
    sha256: str
    factory: str
    metric: str
    dim: int

    def is_sound(self, storage: Storage) -> bool:
        """Tell whether it is the one that was trained."""
        try:
            self.load(storage)
        except IndexBuildError:
            return False
        return True

    def load(self, storage: Storage) -> TrainedIndex:
        """Read it.

        Raises:
            IndexBuildError: it is not the one that was trained.
        """
        data = storage.read(self.uri)
        try:
            return load_trained(data, self.factory, Metric(self.metric), self.dim, self.sha256)
        except IndexBuildError as error:
            raise IndexBuildError(
                f"{self.uri}: {error}; run index.py with index.verify, which trains anew"
            ) from error


@dataclass(frozen=True)
class StoredPart:
    """A part as it is stored, with its head."""

    uri: str
    head: PartHead

    def open(self, storage: Storage) -> Part:
        """Return it for reading; reads nothing."""
        return Part(self.uri, self.head, _reader(storage, self.uri))


@dataclass(frozen=True)
class WrittenFile:
    """One file of an index; ``rows`` vectors are in it."""

    path: str
    bytes: int
    sha256: str
    rows: int


class ShardReader:
    """Row groups of some embedding shards in order; knows which it is at, for messages.

    Without the rows that a graph is measured with, or those rows alone, or all; see `heldout`.
    """

    def __init__(
        self,
        storage: Storage,
        root: str,
        facts: Sequence[FileFact],
        rows: Literal["all", "held", "others"] = "all",
    ) -> None:
        self._storage, self._root, self._facts, self._rows = storage, root, facts, rows
        self._at = root

    def __iter__(self) -> Iterator[Vectors]:
        """Yield (n, dim) vectors and (n,) ids of each row group."""
        held: Sequence[IdArray | None] = [None] * len(self._facts)
        if self._rows != "all":
            held = held_rows(self._facts)
        for fact, some in zip(self._facts, held, strict=True):
            first = 0
            for vectors, ids in read_vectors(self._storage, self._root, fact):
                self._at = f"{join(self._root, fact.path)} from row {first} on"
                if some is None:
                    yield vectors, ids
                else:
                    wanted = np.isin(np.arange(first, first + len(ids)), some) == (self._rows == "held")
                    yield vectors[wanted], ids[wanted]
                first += len(ids)

    @contextlib.contextmanager
    def named(self) -> Iterator["ShardReader"]:
        """Put the place in front of an error about a vector."""
        try:
            yield self
        except IndexBuildError as error:
            raise IndexBuildError(f"{self._at}: {error}") from error


def sample_task(storage: Storage, root: str, fact: FileFact, groups: dict[int, list[int]]) -> Vectors:
    """Return (n, dim) float16 or float32 rows of one shard, and their (n,) ids."""
    vectors, ids = sample_vectors(storage, root, fact, groups)
    check_rows(vectors, vectors.shape[1], join(root, fact.path))
    return vectors, ids


def train_task(
    storage: Storage, uri: str, spec: IndexSpec, threads: int, device: str | None, *samples: Vectors
) -> str:
    """Train on samples, store the trained index, and return its sha256.

    Centroids are found by FAISS, or through torch on a ``device``.

    Memory: the sample in float32, and what k-means adds to it, beside the object store's own copy.
    """
    use_threads(threads)
    rows = np.empty((sum(len(ids) for _, ids in samples), spec.dim), np.float32)
    start = 0
    for vectors, ids in samples:
        rows[start : start + len(ids)] = vectors
        start += len(ids)
    trained = train(rows, spec.factory, spec.metric, kmeans=None if device is None else _kmeans_on(device))
    write_large(storage, uri, trained.data)
    return trained.sha256


def add_task(
    storage: Storage,
    root: str,
    trained: TrainedFile,
    facts: tuple[FileFact, ...],
    uri: str,
    device: str | None,
) -> int:
    """Encode some shards into one part; returns its bytes.

    Lists are chosen by FAISS, or through torch on a ``device``, with the same outcome.

    Memory: twice the part, one shard as it is stored, and the trained index.
    """
    use_threads(1)
    index = trained.load(storage)
    with ShardReader(storage, root, facts).named() as shards:
        data = add_part(index, shards, assign=None if device is None else _assign_on(device, index))
    write_large(storage, uri, data)
    return len(data)


def _kmeans_on(device: str) -> KMeans:
    from bge_ray.index.nearest import kmeans  # torch is loaded only where a device is used

    def find(points: FloatArray, nlist: int, spherical: bool) -> FloatArray:
        return kmeans(points, nlist, spherical=spherical, iterations=KMEANS_ITERATIONS, device=device)

    return find


def _assign_on(device: str, trained: TrainedIndex) -> Assign:
    from bge_ray.index.nearest import find_nearest

    found, spherical = centroids(trained), trained.spec.metric is Metric.INNER_PRODUCT
    return lambda rows: find_nearest(rows, found, spherical=spherical, device=device)


def shard_index_task(
    storage: Storage, root: str, trained: TrainedFile, facts: tuple[FileFact, ...], uri: str
) -> int:
    """Build one HNSW index over some shards, without the rows that it is measured with; returns its bytes."""
    use_threads(1)
    with ShardReader(storage, root, facts, "others").named() as shards:
        data = build_shard(trained.load(storage), shards)
    write_large(storage, uri, data)
    return len(data)


def piece_task(storage: Storage, parts: Sequence[StoredPart], lists: ListRange, uri: str) -> int:
    """Merge one range of lists, without a header; returns its bytes.

    Memory: the range, and a constant; see `merged_range`.
    """
    data = merged_range([part.open(storage) for part in parts], lists)
    write_large(storage, uri, data)
    return lists.n_bytes


def finish_task(
    storage: Storage,
    trained: TrainedFile,
    sizes_uri: str,
    lists: ListRange,
    pieces: Sequence[Piece],
    nprobe: int,
    uri: str,
) -> WrittenFile:
    """Put a header in front of merged ranges that together hold ``lists``; memory: the header.

    The finished file is read once more to note its hash; that also proves that it can be read.
    """
    inside = sizes_inside(read_sizes(storage, sizes_uri), lists)
    header = ivf_header(trained.load(storage), inside, nprobe=nprobe)
    head = f"{uri}.head"
    write_large(storage, head, header)
    concatenate(storage, [Piece(head, len(header)), *pieces], uri)
    return file_facts(storage, uri, int(inside.sum()))


def flat_task(
    storage: Storage, trained: TrainedFile, parts: Sequence[StoredPart], piece_bytes: int, uri: str
) -> WrittenFile:
    """Merge an index without lists, by way of pieces of bounded size; memory: three pieces."""
    opened = [part.open(storage) for part in parts]
    rows = sum(part.head.rows for part in parts)
    pieces: list[Piece] = []
    for data in _regroup(merged_file(trained.load(storage), opened, np.array([rows], np.int64)), piece_bytes):
        pieces.append(Piece(f"{uri}.piece-{len(pieces):05d}", len(data)))
        write_large(storage, pieces[-1].uri, data)
    concatenate(storage, pieces, uri)
    return file_facts(storage, uri, rows)


def rebuild_task(
    storage: Storage, trained: TrainedFile, parts: Sequence[StoredPart], lists: ListRange, uri: str
) -> WrittenFile:
    """Build a file by FAISS's own functions, where its layout is not known here; memory: three times it."""
    data = rebuild(trained.load(storage), [part.open(storage) for part in parts], lists)
    entry = parts[0].head.entry_bytes
    return _store(storage, uri, data, lists.n_bytes // entry)


def set_effort_task(storage: Storage, file: WrittenFile, effort: int, uri: str) -> WrittenFile:
    """Copy an index file with another nprobe or efSearch in it; memory: three times the file."""
    return _store(storage, uri, set_default_effort(storage.read(file.path), effort), file.rows)


def complete_graph_task(
    storage: Storage, root: str, file: WrittenFile, facts: tuple[FileFact, ...], effort: int, uri: str
) -> WrittenFile:
    """Copy an HNSW index with the rows that were left out of it, and its efSearch; memory: three times it."""
    use_threads(1)
    with ShardReader(storage, root, facts, "held").named() as shards:
        data, rows = complete_shard(storage.read(file.path), shards)
    return _store(storage, uri, set_default_effort(data, effort), rows)


def exact_task(
    storage: Storage,
    root: str,
    groups: tuple[tuple[FileFact, ...], ...],
    queries: FloatArray,
    k: int,
    rows: Literal["all", "others"],
    results: Literal["vectors", "passages"],
) -> Results:
    """Search groups of shards exactly; memory: one shard as it is stored, and (queries, k) results.

    The chunks of a passage, which lie in one shard, count once where passages are the results.
    """
    use_threads(1)
    best: list[Results] = []
    for facts in groups:
        with ShardReader(storage, root, facts, rows).named() as shards:
            found = exact_topk(queries, shards, k, per_row=results == "passages")
            best = [merge_topk([*best, found], k)]
    return best[0]


def is_sound_task(storage: Storage, uri: str) -> bool:
    """Tell whether all of a part is as it was written; memory: a block of it."""
    try:
        part = open_part(uri, _reader(storage, uri))
        for _ in read_blocks(part, read_table(part, 0, part.head.nlist), CHUNK_BYTES):
            pass
    except IndexBuildError:
        return False
    return True


def facts_task(storage: Storage, uri: str, rows: int) -> WrittenFile:
    """Return `file_facts`."""
    return file_facts(storage, uri, rows)


def open_stored(storage: Storage, uris: Sequence[str]) -> list[StoredPart]:
    """Read the heads of stored parts.

    Raises:
        IndexBuildError: one is no part, or damaged.
    """

    def opened(uri: str) -> StoredPart:
        return StoredPart(uri, open_part(uri, _reader(storage, uri)).head)

    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        return list(pool.map(opened, uris))


def write_sizes(storage: Storage, uri: str, sizes: IdArray) -> None:
    """Store (nlist,) list sizes."""
    write_large(storage, uri, sizes.astype("<i8").tobytes())


def read_sizes(storage: Storage, uri: str) -> IdArray:
    """Read what `write_sizes` stored."""
    return np.frombuffer(storage.read(uri), "<i8").astype(np.int64)


def sizes_inside(sizes: IdArray, lists: ListRange) -> IdArray:
    """Return (nlist,) list sizes that are 0 outside of a range."""
    inside = np.zeros_like(sizes)
    inside[lists.start : lists.stop] = sizes[lists.start : lists.stop]
    return inside


def file_facts(storage: Storage, uri: str, rows: int) -> WrittenFile:
    """Read a finished file once, in pieces, to note its size and hash."""
    info = storage.info(uri)
    digest, place, size = hashlib.sha256(), 0, info.size if info else 0
    while place < size:
        block = storage.read_range(uri, place, min(size, place + READ_BYTES))
        if not block:
            raise IndexBuildError(f"{uri}: ends at byte {place} of {size}")
        digest.update(block)
        place += len(block)
    return WrittenFile(uri, size, digest.hexdigest(), rows)


def _reader(storage: Storage, uri: str) -> ReadRange:
    return lambda offset, length: storage.read_range(uri, offset, offset + length)


def _store(storage: Storage, uri: str, data: bytes, rows: int) -> WrittenFile:
    write_large(storage, uri, data)
    return WrittenFile(uri, len(data), hashlib.sha256(data).hexdigest(), rows)


def _regroup(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    held = bytearray()
    for chunk in chunks:
        held += chunk
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)
