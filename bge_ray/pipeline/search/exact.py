"""The exact search: actors that hold embedding shards instead of an index."""

from collections.abc import Iterator, Mapping

from bge_ray.dataset.held import HeldShards, MappedTables
from bge_ray.dataset.lookup import ShardMap
from bge_ray.dataset.passing import Passing
from bge_ray.dataset.read import COLUMNS, Vectors, arrays_of
from bge_ray.index.topk import Results, exact_topk
from bge_ray.pipeline.runs.holders import Handover
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import FloatArray
from bge_ray.storage.objects import Storage


class ShardSearcher:
    """Searches embedding shards exactly, side by side with others of its kind; stands in for a Searcher."""

    def __init__(
        self,
        storage: Storage,
        root: str,
        shards: ShardMap,
        threads: int,
        *,
        per_row: bool = False,
        filters: Mapping[str, Passing] | None = None,
        handover: Handover | None = None,
    ) -> None:
        """Note which shards to search, and what passes filters, by their SQL.

        With ``per_row`` of the chunks of a row only the best counts.
        A shard is read when it is first searched, whole, and its vectors then lie on this machine's disk; one
        of which nothing passes is not. What else of it is asked for goes to ``handover``.
        """
        from bge_ray.index.package import use_threads

        self._held = HeldShards(storage, root, shards, MappedTables())
        self._per_row, self._filters = per_row, {} if filters is None else filters
        self._handover = handover
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
        for fact in self._held.shards.facts:
            if passing is None:
                yield from self._blocks(fact)
            elif passing.some_of(fact.path):
                for vectors, ids in self._blocks(fact):
                    marks = passing.has(ids)
                    yield vectors[marks], ids[marks]

    def _blocks(self, fact: FileFact) -> Iterator[Vectors]:
        if self._handover is None:
            return map(arrays_of, self._held.whole(fact, COLUMNS))
        return map(arrays_of, self._held.whole(fact, COLUMNS, self._handover.columns, self._handover.take))
