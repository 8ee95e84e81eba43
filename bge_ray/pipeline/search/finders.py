"""What finds candidates by one output of a data set: its vectors, or the inverted lists of a sparse one."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from ray.actor import ActorHandle

from bge_ray.dataset.passing import Passes
from bge_ray.index.bm25 import Saturation, TermStats
from bge_ray.index.topk import Results
from bge_ray.pipeline.engine.tasks import wait_for
from bge_ray.pipeline.index.searchers import search_all
from bge_ray.pipeline.runs.holders import StoredRows
from bge_ray.pipeline.search.filtering import by_filter
from bge_ray.pipeline.search.retrieve import Found, Queries, Retrieval, retrieve
from bge_ray.records.arrays import dense_rows, sparse_rows
from bge_ray.records.ids import IdArray
from bge_ray.records.model import EMBEDDING
from bge_ray.records.sparse import Pruning, SparseChoice


@dataclass(frozen=True)
class Weighing:
    """How BM25 weighs counts in a data set: what its tokens are worth, and how a count loses weight."""

    stats: TermStats
    saturation: Saturation


@dataclass(frozen=True)
class Finder:
    """Actors that hold an output of all vectors, once or several times, and what they are asked for.

    Each of ``replicas`` are actors that hold all of it together. ``weighing`` is that of counts, and None
    where what is stored is compared as it is. ``sparse`` says how weights are searched; None: exactly.
    """

    output: str
    replicas: tuple[tuple[ActorHandle, ...], ...]
    retrieval: Retrieval
    weighing: Weighing | None = None
    sparse: SparseChoice | None = None

    def find(
        self, queries: pa.Table, filters: Mapping[str, Passes], stored: StoredRows, turn: int
    ) -> tuple[Found, float]:
        """Find the best of each query of a table with a column of this output, and say what asking took.

        Args:
            queries: n of them; those of one filter are asked together.
            filters: how much passes each of their filters, by its SQL.
            stored: what the data set holds of results.
            turn: number of the group of queries, which says who is asked.

        Returns:
            What was found, and seconds that searchers were waited for.

        Raises:
            IndexBuildError, StorageError: see `retrieve`.
        """
        spent = 0.0
        vectors = self._queries(queries)
        searchers, chooser = self._asked(turn)
        parts: list[tuple[IdArray, Found]] = []
        for sql, numbers in by_filter(queries):
            retrieval = self.among(sql, filters)
            # For those whose filter nothing passes, nobody is asked.
            asked = numbers if retrieval.k else numbers[:0]

            def search(some: Any, fetched: int, effort: int | None, sql: str | None = sql) -> Results:
                nonlocal spent
                began = time.time()
                how = self._how(fetched, effort)
                found = search_all(searchers, some, fetched, how, lambda: None, sql, chooser=chooser)
                spent += time.time() - began
                return found

            parts.append((asked, retrieve(vectors[asked], search, retrieval, stored)))
        return _side_by_side(parts), spent

    def among(self, sql: str | None, filters: Mapping[str, Passes]) -> Retrieval:
        """Return what is asked for the queries that have a filter, or none."""
        return self.retrieval if sql is None else self.retrieval.among(filters[sql])

    def _asked(self, turn: int) -> tuple[tuple[ActorHandle, ...], ActorHandle | None]:
        """Return a replica, and who of several that hold ranges of an index chooses the lists to probe."""
        round_no, number = divmod(turn, len(self.replicas))
        searchers, index = self.replicas[number], self.retrieval.index
        chooses = index is not None and index.parameter == "nprobe"
        return searchers, searchers[round_no % len(searchers)] if chooses else None

    def _how(self, fetched: int, effort: int | None) -> int | Saturation | Pruning | None:
        """Return how so many results are looked for, as `search_all` takes it."""
        if self.weighing is not None:
            return self.weighing.saturation
        return effort if self.sparse is None else self.sparse.for_results(fetched)

    def _queries(self, table: pa.Table) -> Queries:
        if self.output == EMBEDDING:
            return dense_rows(table[EMBEDDING])
        rows = sparse_rows(table[self.output])
        return rows if self.weighing is None else self.weighing.stats.weigh(rows)


def _side_by_side(parts: Sequence[tuple[IdArray, Found]]) -> Found:
    """Return what was found for different queries as one, each part with the numbers of its queries."""
    numbers = np.concatenate([asked[found.numbers] for asked, found in parts])
    order = np.argsort(numbers, kind="stable")
    rows = pa.concat_tables([found.rows for _, found in parts], promote_options="permissive")
    return Found(
        numbers=numbers[order],
        scores=np.concatenate([found.scores for _, found in parts])[order],
        rows=rows.take(pa.array(order)),
        unknown=sum(found.unknown for _, found in parts),
        doubled=sum(found.doubled for _, found in parts),
        refilled=sum(found.refilled for _, found in parts),
    )


def weigh_terms(searchers: Sequence[ActorHandle], k1: float, b: float, watch: Callable[[], None]) -> Weighing:
    """Add up what BM25 must know of a data set, which its searchers hold together.

    Raises:
        StorageError, IndexBuildError: a shard is missing or damaged.
    """
    stats = TermStats.merged(wait_for([searcher.terms.remote() for searcher in searchers], watch))
    return Weighing(stats, stats.saturation(k1, b))


def score_column(output: str) -> str:
    """Return the column of a run that holds the score by one output."""
    return f"{output}_score"
