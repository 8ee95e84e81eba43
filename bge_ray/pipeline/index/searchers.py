"""Actors that hold the files of an index side by side, and answer as one."""

import functools
import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import ray
from ray.actor import ActorHandle

from bge_ray.dataset.passing import Passing
from bge_ray.errors import DamagedIndexError, StorageError
from bge_ray.index.bm25 import Saturation
from bge_ray.index.header import ivf_header
from bge_ray.index.merge import ListRange
from bge_ray.index.package import Index, use_threads
from bge_ray.index.probes import Probes, choose_probes
from bge_ray.index.search import load_index, search
from bge_ray.index.selectors import Among, select
from bge_ray.index.topk import Results, merge_topk
from bge_ray.pipeline.engine.tasks import largest_node, wait_for
from bge_ray.pipeline.index.tasks import TrainedFile, WrittenFile, read_sizes, sizes_inside
from bge_ray.records.arrays import SparseRows
from bge_ray.records.ids import FloatArray
from bge_ray.records.sparse import Pruning
from bge_ray.storage.objects import Storage

DOWNLOAD_BYTES = 32 << 20
# Of the filters asked for last an actor keeps what FAISS is told, up to so many ids: some 250 MB.
KEPT_IDS = 5_000_000
MAX_RESTARTS = 5


@dataclass(frozen=True)
class RangePiece:
    """A merged range of lists without a header, which the searcher puts in front.

    ``sizes_uri`` holds the (nlist,) list sizes of the whole index, which headers are made from.
    """

    trained: TrainedFile
    uri: str
    lists: ListRange
    sizes_uri: str


IndexSource: TypeAlias = WrittenFile | RangePiece
# (start, stop) -> these bytes.
ReadRange: TypeAlias = Callable[[int, int], bytes]


class Searcher:
    """Holds index files on its machine's disk, mapped into memory; lists are read as they are probed."""

    def __init__(
        self,
        storage: Storage,
        sources: Sequence[IndexSource],
        threads: int,
        filters: Mapping[str, Passing] | None = None,
        peers: Mapping[str, ActorHandle] | None = None,
    ) -> None:
        """Note what to hold, how many threads a search may use, and what passes filters, by their SQL.

        Files are fetched at the first search, from ``peers`` by their path where one holds them, else from
        the store; what tells FAISS of a filter is made at its first.
        """
        self._storage, self._sources = storage, sources
        self._peers = {} if peers is None else peers
        self._files: list[BinaryIO] = []
        self._indexes: list[Index] = []
        self._filters = {} if filters is None else filters
        # By the SQL, for each file; the last asked for is the last.
        self._among: OrderedDict[str, list[Among]] = OrderedDict()
        use_threads(threads)

    def probes(self, queries: FloatArray, effort: int | None) -> Probes | None:
        """Return which lists (n, dim) queries are looked for in, for all that hold ranges of this index.

        Raises:
            IndexBuildError: see `search`.
        """
        return choose_probes(self._opened(1)[0], queries, effort)

    def search(
        self,
        queries: FloatArray,
        k: int,
        effort: int | None,
        sql: str | None = None,
        probes: Probes | None = None,
    ) -> Results:
        """Return the best k over all files of this actor; see `index.search.search`.

        Args:
            queries: (n, dim).
            k: results a query.
            effort: of each file.
            sql: of one of the filters, which results must pass; None: any are.
            probes: of these queries; None has them chosen here, once for all files.

        Raises:
            DamagedIndexError: a file is missing, or not the one that was written.
            IndexBuildError: a query is bad.
        """
        indexes = self._opened(len(self._sources))
        among = [None] * len(indexes) if sql is None else self._chosen(sql)
        if probes is None and len(indexes) > 1:
            probes = choose_probes(indexes[0], queries, effort)
        return merge_topk(
            [
                search(index, queries, k, effort=effort, among=some, probes=probes)
                for index, some in zip(indexes, among, strict=True)
            ],
            k,
        )

    def _opened(self, count: int) -> list[Index]:
        """Return the files that are open, at least so many."""
        while len(self._indexes) < count:
            # The name goes as soon as the file is mapped: an actor ends by being killed, and would leave it.
            with tempfile.TemporaryDirectory(prefix="bge-ray-index-") as folder:
                path = Path(folder) / "index.faiss"
                self._fetch(self._sources[len(self._indexes)], path)
                file = path.open("rb")
                self._indexes.append(load_index(path))
            self._files.append(file)
        return self._indexes

    def block(self, path: str, start: int, stop: int) -> bytes:
        """Return bytes of a file, for another that is to hold it.

        Raises:
            IndexBuildError: see `search`.
        """
        names = [source.path if isinstance(source, WrittenFile) else None for source in self._sources]
        number = names.index(path)
        self._opened(number + 1)
        return os.pread(self._files[number].fileno(), stop - start, start)

    def _chosen(self, sql: str) -> list[Among]:
        """Return which vectors of each file pass a filter; those of the last few filters are kept."""
        if sql not in self._among:
            self._among[sql] = [select(index, self._filters[sql].has) for index in self._indexes]
        self._among.move_to_end(sql)
        while len(self._among) > 1 and sum(map(_held, self._among.values())) > KEPT_IDS:
            self._among.popitem(last=False)
        return self._among[sql]

    def _fetch(self, source: IndexSource, path: Path) -> None:
        with path.open("wb") as target:
            if isinstance(source, WrittenFile):
                found = _download(self._reader(source.path), source.path, source.bytes, target)
                if found != source.sha256:
                    raise DamagedIndexError(
                        source.path, f"is damaged, its sha256 is {found}, not {source.sha256}"
                    )
                return
            inside = sizes_inside(read_sizes(self._storage, source.sizes_uri), source.lists)
            target.write(ivf_header(source.trained.load(self._storage), inside))
            _download(self._reader(source.uri), source.uri, source.lists.n_bytes, target)

    def _reader(self, uri: str) -> ReadRange:
        peer = self._peers.get(uri)
        if peer is None:
            return functools.partial(self._storage.read_range, uri)
        return lambda start, stop: wait_for([peer.block.remote(uri, start, stop)], lambda: None)[0]


def _held(among: Sequence[Among]) -> int:
    return sum(some.held for some in among)


def start_searchers(storage: Storage, sources: Sequence[IndexSource], at_once: int) -> list[ActorHandle]:
    """Start actors that share the sources evenly; together they are the index.

    Args:
        storage: where the sources are.
        sources: whole files, or pieces.
        at_once: CPUs that the actors may reserve together.
    """
    count = max(1, min(at_once, len(sources)))
    threads = max(1, min(at_once // count, int(largest_node("CPU"))))
    # Spread, because each of them holds its share of the index on its machine's disk.
    actor = ray.remote(
        num_cpus=threads,
        max_restarts=MAX_RESTARTS,
        max_task_retries=MAX_RESTARTS,
        scheduling_strategy="SPREAD",
    )(Searcher)
    return [actor.remote(storage, sources[i::count], threads) for i in range(count)]


def search_all(
    searchers: Sequence[ActorHandle],
    queries: FloatArray | SparseRows,
    k: int,
    how: int | Saturation | Pruning | None,
    watch: Callable[[], None],
    sql: str | None = None,
    *,
    chooser: ActorHandle | None = None,
) -> Results:
    """Search all actors and merge what they find.

    Args:
        searchers: which have different vectors.
        queries: as their search takes them.
        k: results a query.
        how: the effort of an index, what becomes of counts in lists, or what a search of weights leaves out.
        watch: called while they work.
        sql: of a filter that the actors know, which results must pass.
        chooser: the one of them which chooses the lists to probe, for all; alone it does so anyway.
    """
    shared = ray.put(queries)
    probes = {} if chooser is None or len(searchers) == 1 else {"probes": chooser.probes.remote(shared, how)}
    return merge_topk(wait_for([s.search.remote(shared, k, how, sql, **probes) for s in searchers], watch), k)


def _download(read: ReadRange, uri: str, size: int, target: BinaryIO) -> str:
    """Append an object to an open file in bounded memory; returns its sha256 in hex."""
    digest = hashlib.sha256()
    for start in range(0, size, DOWNLOAD_BYTES):
        stop = min(size, start + DOWNLOAD_BYTES)
        try:
            block = read(start, stop)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise DamagedIndexError(uri, "is not there") from error
            raise
        if len(block) != stop - start:
            raise DamagedIndexError(uri, f"ends at byte {start + len(block)} of {size}")
        digest.update(block)
        target.write(block)
    return digest.hexdigest()
