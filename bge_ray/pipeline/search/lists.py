"""Actors that hold a sparse column of embedding shards as inverted lists, side by side."""

from collections.abc import Iterator, Mapping

from bge_ray.dataset.lookup import ShardMap
from bge_ray.dataset.passing import Passing
from bge_ray.dataset.read import read_columns
from bge_ray.index.bm25 import Saturation, TermStats
from bge_ray.index.lists import Lists, blocks_of, on_disk, search_lists
from bge_ray.index.seismic import SeismicIndex
from bge_ray.index.topk import Results
from bge_ray.pipeline.runs.holders import Handover
from bge_ray.records.arrays import SparseRows, sparse_rows
from bge_ray.records.ids import IdArray
from bge_ray.records.sparse import Pruning
from bge_ray.storage.objects import Storage


class ListSearcher:
    """Searches one sparse column of some shards, exactly unless asked otherwise; lists lie on its disk.

    They are made of the column when they are first needed, which is once in the life of the actor, and
    nothing of them is kept beyond it: to read lists would cost what to read the column does, and they would
    have to be kept fresh.
    """

    def __init__(
        self,
        storage: Storage,
        root: str,
        shards: ShardMap,
        column: str,
        *,
        per_row: bool = False,
        filters: Mapping[str, Passing] | None = None,
        threads: int = 1,
        handover: Handover | None = None,
    ) -> None:
        """Note which shards to search.

        Args:
            storage: where they are.
            root: folder of the data set.
            shards: by ascending ids.
            column: sparse.
            per_row: of the chunks of a corpus row only the best counts.
            filters: what passes them, by their SQL.
            threads: that making an index of Seismic may use.
            handover: gets the column where it wants it.
        """
        self._storage, self._root, self._shards, self._threads = storage, root, shards, threads
        self._column, self._per_row, self._handover = column, per_row, handover
        self._filters = {} if filters is None else filters
        self._blocks: list[Lists] | None = None
        self._seismic: SeismicIndex | None = None

    def terms(self) -> TermStats:
        """Return what BM25 must know of these shards.

        Raises:
            StorageError: a shard is missing or damaged.
            IndexBuildError: what it holds is no sparse column of ascending ids.
        """
        return TermStats.merged(block.terms() for block in self._held())

    def build(self) -> float:
        """Make the lists and an index of Seismic of them, which is kept; return the seconds of the latter.

        Raises:
            StorageError, IndexBuildError: as `terms`.
            InstallationError: Seismic is missing.
        """
        return self._indexed().build_s

    def drop(self) -> None:
        """Let the index of Seismic go: its memory is not needed where searches are exact."""
        self._seismic = None

    def search(
        self, queries: SparseRows, k: int, how: Saturation | Pruning | None, sql: str | None = None
    ) -> Results:
        """Return the best k over all shards of this actor; see `index.lists.search_lists`.

        With the SQL of a filter results pass it; what a token is worth goes by all passages, as without one.

        Args:
            queries: sparse.
            k: results a query.
            how: what becomes of counts, or what a search by Seismic, which knows no filter, leaves out; None:
                weights are as they are, and nothing is left out.
            sql: of a filter.

        Raises:
            StorageError, IndexBuildError, InstallationError: as `build`.
        """
        if isinstance(how, Pruning):
            return self._indexed().search(queries, k, how, per_row=self._per_row)
        passes = None if sql is None else self._filters[sql].has
        return search_lists(queries, self._held(), k, saturation=how, per_row=self._per_row, passes=passes)

    def _held(self) -> list[Lists]:
        if self._blocks is None:
            self._blocks = [on_disk(block) for block in blocks_of(self._parts())]
        return self._blocks

    def _indexed(self) -> SeismicIndex:
        if self._seismic is None:
            self._seismic = SeismicIndex(self._held(), self._threads)
        return self._seismic

    def _parts(self) -> Iterator[tuple[SparseRows, IdArray]]:
        for fact in self._shards.facts:
            groups = read_columns(self._storage, self._root, fact, ["vector_id", self._column])
            for number, table in enumerate(groups):
                if self._handover is not None and self._column in self._handover.columns:
                    self._handover.take(fact, number, table)
                yield sparse_rows(table[self._column]), table["vector_id"].to_numpy()
