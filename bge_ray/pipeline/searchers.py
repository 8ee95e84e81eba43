"""Actors that hold the files of an index side by side, and answer as one."""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import ray
from ray.actor import ActorHandle

from bge_ray.errors import IndexBuildError
from bge_ray.index.header import ivf_header
from bge_ray.index.search import load_index, search
from bge_ray.index.topk import Results, merge_topk
from bge_ray.io.storage import Storage
from bge_ray.pipeline.index_tasks import TrainedFile, WrittenFile
from bge_ray.schema import FloatArray, IdArray

DOWNLOAD_BYTES = 32 << 20


@dataclass(frozen=True)
class RangePiece:
    """A merged range of lists without a header, which the searcher puts in front; ``sizes`` are 0 outside."""

    trained: TrainedFile
    piece: str
    bytes: int
    sizes: IdArray


IndexSource: TypeAlias = WrittenFile | RangePiece


class Searcher:
    """Holds index files on its machine's disk, mapped into memory; lists are read as they are probed."""

    def __init__(self, storage: Storage, sources: Sequence[IndexSource]) -> None:
        """Fetch and check the files.

        Raises:
            IndexBuildError: a file is not the one that was written.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="bge-ray-index-")
        self._indexes = []
        for number, source in enumerate(sources):
            path = Path(self._folder.name) / f"{number}.faiss"
            with path.open("wb") as target:
                if isinstance(source, RangePiece):
                    target.write(ivf_header(source.trained.load(storage), source.sizes))
                    _download(storage, source.piece, source.bytes, target)
                else:
                    found = _download(storage, source.path, source.bytes, target)
                    if found != source.sha256:
                        raise IndexBuildError(
                            f"{source.path}: is damaged, its sha256 is {found}, not {source.sha256}"
                        )
            self._indexes.append(load_index(path))

    def search(self, queries: FloatArray, k: int, effort: int | None) -> Results:
        """Return the best k over all files of this actor; see `index.search.search`."""
        return merge_topk([search(index, queries, k, effort=effort) for index in self._indexes], k)


def start_searchers(
    storage: Storage, sources: Sequence[IndexSource], count: int, num_cpus: float
) -> list[ActorHandle]:
    """Start actors that share the sources evenly; together they are the index."""
    count = max(1, min(count, len(sources)))
    actor = ray.remote(num_cpus=num_cpus, max_restarts=-1, max_task_retries=-1)(Searcher)
    return [actor.remote(storage, sources[i::count]) for i in range(count)]


def search_all(searchers: Sequence[ActorHandle], queries: FloatArray, k: int, effort: int | None) -> Results:
    """Search all actors and merge what they find."""
    shared = ray.put(queries)
    return merge_topk(ray.get([s.search.remote(shared, k, effort) for s in searchers]), k)


def _download(storage: Storage, uri: str, size: int, target: BinaryIO) -> str:
    """Append an object to an open file in bounded memory; returns its sha256 in hex."""
    digest = hashlib.sha256()
    for start in range(0, size, DOWNLOAD_BYTES):
        block = storage.read_range(uri, start, min(size, start + DOWNLOAD_BYTES))
        digest.update(block)
        target.write(block)
    return digest.hexdigest()
