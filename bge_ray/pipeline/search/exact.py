"""The exact search: actors that hold embedding shards instead of an index."""

from collections.abc import Sequence

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
        self, storage: Storage, root: str, facts: Sequence[FileFact], threads: int, *, per_row: bool = False
    ) -> None:
        """Note which shards to search, and whether of the chunks of a row only the best counts.

        They are read at the first search.
        """
        from bge_ray.index.package import use_threads

        self._storage, self._root, self._facts = storage, root, facts
        self._per_row = per_row
        self._kept: dict[str, list[Vectors]] = {}
        self._kept_bytes = 0
        use_threads(threads)

    def search(self, queries: FloatArray, k: int, effort: int | None) -> Results:  # noqa: ARG002
        """Return the best k over all shards of this actor.

        Raises:
            StorageError: a shard is missing or damaged.
            IndexBuildError: a query is bad.
        """
        blocks = (block for fact in self._facts for block in self._blocks(fact))
        return exact_topk(queries, blocks, k, per_row=self._per_row)

    def _blocks(self, fact: FileFact) -> list[Vectors]:
        if fact.path in self._kept:
            return self._kept[fact.path]
        blocks = list(read_vectors(self._storage, self._root, fact))
        size = sum(vectors.nbytes + ids.nbytes for vectors, ids in blocks)
        if self._kept_bytes + size <= KEPT_VECTOR_BYTES:
            self._kept[fact.path] = blocks
            self._kept_bytes += size
        return blocks
