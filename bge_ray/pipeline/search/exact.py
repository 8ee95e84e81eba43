"""The exact search: actors that hold embedding shards instead of an index."""

from collections.abc import Iterator, Mapping, Sequence

from bge_ray.dataset.passing import Passing
from bge_ray.dataset.read import Vectors, read_vectors
from bge_ray.index.topk import Results, exact_topk
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import FloatArray
from bge_ray.storage.objects import Storage

# Vectors that an exact searcher keeps from one group of queries to the next.
KEPT_VECTOR_BYTES = 256 << 20


class ShardSearcher:
    """Searches embedding shards exactly, side by side with others of its kind; stands in for a Searcher."""

    def __init__(
        self,
        storage: Storage,
        root: str,
        facts: Sequence[FileFact],
        threads: int,
        *,
        per_row: bool = False,
        filters: Mapping[str, Passing] | None = None,
    ) -> None:
        """Note which shards to search, and what passes filters, by their SQL.

        With ``per_row`` of the chunks of a row only the best counts.
        Shards are read when they are first searched; one of which nothing passes is not.
        """
        from bge_ray.index.package import use_threads

        self._storage, self._root, self._facts = storage, root, facts
        self._per_row, self._filters = per_row, {} if filters is None else filters
        self._kept: dict[str, list[Vectors]] = {}
        self._kept_bytes = 0
        use_threads(threads)

    def search(
        self,
        queries: FloatArray,
        k: int,
        effort: int | None,  # noqa: ARG002
        sql: str | None = None,
    ) -> Results:
        """Return the best k over all shards of this actor; with the SQL of a filter, of what passes it.

        Raises:
            StorageError: a shard is missing or damaged.
            IndexBuildError: a query is bad.
        """
        return exact_topk(queries, self._searched(sql), k, per_row=self._per_row)

    def _searched(self, sql: str | None) -> Iterator[Vectors]:
        passing = None if sql is None else self._filters[sql]
        for fact in self._facts:
            if passing is None:
                yield from self._blocks(fact)
            elif passing.some_of(fact.path):
                for vectors, ids in self._blocks(fact):
                    marks = passing.has(ids)
                    yield vectors[marks], ids[marks]

    def _blocks(self, fact: FileFact) -> list[Vectors]:
        if fact.path in self._kept:
            return self._kept[fact.path]
        blocks = list(read_vectors(self._storage, self._root, fact))
        size = sum(vectors.nbytes + ids.nbytes for vectors, ids in blocks)
        if self._kept_bytes + size <= KEPT_VECTOR_BYTES:
            self._kept[fact.path] = blocks
            self._kept_bytes += size
        return blocks
