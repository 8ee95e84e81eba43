"""What the index job does in other processes: sample, train, add, merge, finish, exact search."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from bge_ray.index.add import add_part, build_shard
from bge_ray.index.factory import Metric
from bge_ray.index.files import merged_file
from bge_ray.index.header import ivf_header
from bge_ray.index.merge import ListRange, merge_range
from bge_ray.index.part import Part, open_part
from bge_ray.index.topk import Results, exact_topk
from bge_ray.index.train import TrainedIndex, load_trained, train
from bge_ray.io.storage import Storage
from bge_ray.io.vectors import read_vectors, sample_vectors
from bge_ray.manifest import FileFact
from bge_ray.schema import FloatArray, IdArray


@dataclass(frozen=True)
class TrainedFile:
    """A trained index as it is stored."""

    uri: str
    sha256: str
    factory: str
    metric: str
    dim: int

    def load(self, storage: Storage) -> TrainedIndex:
        """Read it, and refuse it if it is not the one that was trained."""
        return load_trained(storage.read(self.uri), self.factory, Metric(self.metric), self.dim, self.sha256)


@dataclass(frozen=True)
class WrittenFile:
    """One file of an index; ``rows`` vectors are in it."""

    path: str
    bytes: int
    sha256: str
    rows: int


def sample_task(
    storage: Storage, root: str, fact: FileFact, groups: dict[int, list[int]]
) -> tuple[FloatArray, IdArray]:
    """Return (n, dim) float32 rows of one shard, and their ids."""
    vectors, ids = sample_vectors(storage, root, fact, groups)
    return vectors.astype(np.float32), ids


def train_task(storage: Storage, uri: str, factory: str, metric: str, *sample: FloatArray) -> str:
    """Train on the sample, store the trained index, and return its sha256."""
    trained = train(np.concatenate(sample), factory, Metric(metric))
    storage.write(uri, trained.data)
    return trained.sha256


def add_task(storage: Storage, root: str, trained: TrainedFile, facts: tuple[FileFact, ...], uri: str) -> int:
    """Encode some shards into one part; returns its bytes."""
    data = add_part(trained.load(storage), (read_vectors(storage, root, fact) for fact in facts))
    storage.write(uri, data)
    return len(data)


def shard_index_task(
    storage: Storage, root: str, trained: TrainedFile, facts: tuple[FileFact, ...], uri: str
) -> WrittenFile:
    """Build one HNSW index over some shards."""
    data = build_shard(trained.load(storage), (read_vectors(storage, root, fact) for fact in facts))
    return _store(storage, uri, data, sum(fact.rows for fact in facts))


def piece_task(storage: Storage, part_uris: tuple[str, ...], lists: ListRange, uri: str) -> int:
    """Merge one range of lists, without a header; returns its bytes."""
    storage.write(uri, b"".join(merge_range(open_parts(storage, part_uris), lists)))
    return lists.n_bytes


def headed_task(
    storage: Storage, trained: TrainedFile, piece: str, sizes: IdArray, nprobe: int | None, uri: str
) -> WrittenFile:
    """Put a header in front of a merged range; ``sizes`` are 0 outside of what the file holds."""
    header = ivf_header(trained.load(storage), sizes, nprobe=nprobe)
    return _store(storage, uri, header + storage.read(piece), int(sizes.sum()))


def flat_task(
    storage: Storage, trained: TrainedFile, part_uris: tuple[str, ...], piece_bytes: int, uri: str
) -> list[str]:
    """Merge an index without lists as a sequence of pieces of bounded size; returns their URIs."""
    parts = open_parts(storage, part_uris)
    rows = np.array([sum(part.head.rows for part in parts)], np.int64)
    uris: list[str] = []
    for piece in _regroup(merged_file(trained.load(storage), parts, rows), piece_bytes):
        uris.append(f"{uri}-{len(uris):05d}")
        storage.write(uris[-1], piece)
    return uris


def exact_task(storage: Storage, root: str, fact: FileFact, queries: FloatArray, k: int) -> Results:
    """Search one shard exactly."""
    return exact_topk(queries, [read_vectors(storage, root, fact)], k)


def open_parts(storage: Storage, uris: Iterable[str]) -> list[Part]:
    """Open stored parts, which reads their heads."""

    def opened(uri: str) -> Part:
        return open_part(uri, lambda offset, length: storage.read_range(uri, offset, offset + length))

    return [opened(uri) for uri in uris]


def file_facts(storage: Storage, uri: str, path: str, rows: int) -> WrittenFile:
    """Read a finished file once, in pieces, to note its size and hash."""
    info = storage.info(uri)
    digest, place, size = hashlib.sha256(), 0, info.size if info else 0
    while place < size:
        block = storage.read_range(uri, place, min(size, place + (32 << 20)))
        digest.update(block)
        place += len(block)
    return WrittenFile(path, size, digest.hexdigest(), rows)


def _store(storage: Storage, uri: str, data: bytes, rows: int) -> WrittenFile:
    storage.write(uri, data)
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
