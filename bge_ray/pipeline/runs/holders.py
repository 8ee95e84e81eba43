"""Who holds what is stored of a data set while a run asks for it, so that each byte of it is fetched once.

Shards, and the spans of the corpus that texts lie in, are dealt to actors. Each keeps on its machine's disk
what it fetched, and answers by vector id.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import ray
from ray.actor import ActorHandle

from bge_ray.dataset.held import HeldShards, MappedTables
from bge_ray.dataset.lookup import ShardMap, no_rows
from bge_ray.errors import CorpusError, DamagedShardError
from bge_ray.index.topk import pair_scores
from bge_ray.pipeline.engine.tasks import wait_for
from bge_ray.pipeline.runs.passages import TEXT_SCHEMA, span_texts
from bge_ray.pipeline.runs.stored_scores import score_stored
from bge_ray.records.arrays import dense_rows
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import FloatArray, IdArray, vector_ids
from bge_ray.records.model import EMBEDDING
from bge_ray.records.outputs import Output
from bge_ray.records.plan import CorpusObject, Span, span_units
from bge_ray.storage.objects import Storage, join

# A holder that dies is started again this often, and fetches anew what it is asked for.
HOLDER_RESTARTS = 20

# An object without its spans, one of them, and (n,) ascending ids of rows in it.
SpanRows: TypeAlias = tuple[CorpusObject, Span, IdArray]


@dataclass(frozen=True)
class SpanTexts:
    """TEXT_SCHEMA rows of a span; the ids of all that was asked for if it cannot be read, and why."""

    table: pa.Table
    unreadable: IdArray = field(default_factory=lambda: np.empty(0, np.int64))
    fault: str = ""


class StoredRows(Protocol):
    """What a data set holds of its vectors, by their ids."""

    def places(self, ids: IdArray, columns: Sequence[str]) -> pa.Table:
        """Return ``vector_id`` and columns of the rows with (n,) ascending distinct ids, in their order.

        An id that no shard holds has no row.
        """

    def exact_scores(self, queries: FloatArray, numbers: IdArray, ids: IdArray) -> FloatArray:
        """Score (p,) pairs of a query and a vector that is there, as an exact search scores them."""

    def output_scores(
        self, outputs: Sequence[Output], queries: pa.Table, numbers: IdArray, ids: IdArray
    ) -> dict[str, FloatArray]:
        """Score (p,) pairs by each of some outputs; see `stored_scores.score_stored`."""

    def find(self, wanted: pa.Array, column: str) -> tuple[IdArray, IdArray]:
        """Return positions of (n,) distinct values of a column that are there, and their vector ids."""

    def texts(self, spans: Sequence[SpanRows], columns: Columns) -> list[SpanTexts]:
        """Return the texts of rows of the corpus, by their spans."""

    def keep(self, fact: FileFact, number: int, table: pa.Table) -> None:
        """Take columns of a row group of a shard that somebody else has read."""


@dataclass(frozen=True)
class Handover:
    """Where columns go that a searcher reads and that are asked for again once it has answered.

    Of ``columns`` it hands over those that it reads anyway, and ``stored`` does not fetch them.
    """

    stored: StoredRows
    columns: tuple[str, ...]

    def take(self, fact: FileFact, number: int, table: pa.Table) -> None:
        """Hand over what is wanted of a table; see `StoredRows.keep`."""
        names = [name for name in table.column_names if name in self.columns]
        if names:
            self.stored.keep(fact, number, table.select(names))


class RowHolder:
    """Holds some shards, and the texts of whatever spans it is asked for; a `StoredRows` by itself."""

    def __init__(self, storage: Storage, root: str, shards: ShardMap) -> None:
        """Fetch nothing yet."""
        self._storage = storage
        self._tables = MappedTables()
        self._held = HeldShards(storage, root, shards, self._tables)

    def places(self, ids: IdArray, columns: Sequence[str]) -> pa.Table:
        """See `StoredRows`.

        Raises:
            StorageError: a shard is missing or damaged.
        """
        return self._held.places(ids, columns)

    def exact_scores(self, queries: FloatArray, numbers: IdArray, ids: IdArray) -> FloatArray:
        """See `StoredRows`. Memory: what one shard holds of the vectors that are asked for.

        Raises:
            StorageError: a shard is missing or damaged.
            IndexBuildError: a bad vector.
        """
        scores = np.full(len(ids), np.nan, np.float32)
        for pairs, places, table in self._pairs(ids, [EMBEDDING]):
            scores[pairs] = pair_scores(queries, dense_rows(table[EMBEDDING]), numbers[pairs], places)
        return scores

    def output_scores(
        self, outputs: Sequence[Output], queries: pa.Table, numbers: IdArray, ids: IdArray
    ) -> dict[str, FloatArray]:
        """See `StoredRows`. Memory: what one shard holds of the vectors that are asked for.

        Raises:
            StorageError: a shard is missing or damaged.
        """
        names = [output.name for output in outputs]
        scores = {name: np.full(len(ids), np.nan, np.float32) for name in names}
        for pairs, places, table in self._pairs(ids, names):
            found = score_stored(outputs, queries, table, numbers[pairs], places)
            for name in names:
                scores[name][pairs] = found[name]
        return scores

    def find(self, wanted: pa.Array, column: str) -> tuple[IdArray, IdArray]:
        """See `StoredRows`.

        Raises:
            StorageError: a shard is missing or damaged.
        """
        return self._held.find(wanted, column)

    def texts(self, spans: Sequence[SpanRows], columns: Columns) -> list[SpanTexts]:
        """See `StoredRows`.

        Raises:
            StorageError: a part of the corpus cannot be fetched.
        """
        return [self._span_texts(*span, columns) for span in spans]

    def keep(self, fact: FileFact, number: int, table: pa.Table) -> None:
        """See `StoredRows`."""
        self._held.keep(fact, number, table)

    def _pairs(self, ids: IdArray, columns: Sequence[str]) -> Iterator[tuple[IdArray, IdArray, pa.Table]]:
        """Yield the pairs of each shard, the places of their vectors in a table of it, and that table."""
        order = np.argsort(ids, kind="stable")
        for fact, wanted in self._held.shards.split(np.unique(ids)):
            table = self._held.rows(fact, wanted, columns)
            if len(table) != len(wanted):
                lacking = f"lacks {len(wanted) - len(table)} of {len(wanted)} vectors"
                raise DamagedShardError(join(self._held.root, fact.path), lacking)
            pairs = order[slice(*np.searchsorted(ids[order], [wanted[0], wanted[-1] + 1]))]
            yield pairs, np.searchsorted(wanted, ids[pairs]), table

    def _span_texts(
        self, corpus_object: CorpusObject, span: Span, ids: IdArray, columns: Columns
    ) -> SpanTexts:
        """Return texts of a span, all of which is read and held if any of them is not."""
        units = span_units(corpus_object.object_no, span)
        starts = vector_ids(corpus_object.object_no, np.array([unit.first_row for unit in units]))
        wanted = [units[place] for place in np.unique(np.searchsorted(starts, ids, side="right") - 1)]
        held = [self._tables.get(("texts", unit)) for unit in wanted]
        found = [_rows_of(table, ids) for table in held if table is not None]
        if len(found) < len(wanted):
            try:
                found = [
                    _rows_of(self._tables.put(("texts", unit), table), ids)
                    for unit, table in span_texts(self._storage, corpus_object, span, columns)
                ]
            except CorpusError as error:
                return SpanTexts(TEXT_SCHEMA.empty_table(), ids, str(error))
        return SpanTexts(pa.concat_tables(found))


def _rows_of(table: pa.Table, ids: IdArray) -> pa.Table:
    return table.filter(pa.array(np.isin(table["vector_id"].to_numpy(), ids)))


@dataclass(frozen=True)
class Holders:
    """Actors that hold a data set together, of n actors number i modulo n shard i of ``shards``."""

    actors: tuple[ActorHandle, ...]
    shards: ShardMap

    def places(self, ids: IdArray, columns: Sequence[str]) -> pa.Table:
        """See `StoredRows`."""
        parts = self._dealt(ids)
        tables = self._ask([self.actors[n].places.remote(ids[some], columns) for n, some in parts])
        if not tables:
            return no_rows(columns)
        table = pa.concat_tables(tables)
        return table.take(pa.array(np.argsort(table["vector_id"].to_numpy(), kind="stable")))

    def exact_scores(self, queries: FloatArray, numbers: IdArray, ids: IdArray) -> FloatArray:
        """See `StoredRows`."""
        shared, parts = ray.put(queries), self._dealt(ids)
        found = self._ask(
            [self.actors[n].exact_scores.remote(shared, numbers[some], ids[some]) for n, some in parts]
        )
        scores = np.full(len(ids), np.nan, np.float32)
        for (_, some), part in zip(parts, found, strict=True):
            scores[some] = part
        return scores

    def output_scores(
        self, outputs: Sequence[Output], queries: pa.Table, numbers: IdArray, ids: IdArray
    ) -> dict[str, FloatArray]:
        """See `StoredRows`."""
        shared, parts = ray.put(queries.select([output.name for output in outputs])), self._dealt(ids)
        found = self._ask(
            [
                self.actors[n].output_scores.remote(outputs, shared, numbers[some], ids[some])
                for n, some in parts
            ]
        )
        scores = {output.name: np.full(len(ids), np.nan, np.float32) for output in outputs}
        for (_, some), part in zip(parts, found, strict=True):
            for name, values in part.items():
                scores[name][some] = values
        return scores

    def find(self, wanted: pa.Array, column: str) -> tuple[IdArray, IdArray]:
        """See `StoredRows`."""
        shared = ray.put(wanted)
        found = self._ask([actor.find.remote(shared, column) for actor in self.actors])
        positions, ids = zip(*found, strict=True)
        return np.concatenate(positions), np.concatenate(ids)

    def texts(self, spans: Sequence[SpanRows], columns: Columns) -> list[SpanTexts]:
        """See `StoredRows`."""
        by_actor: dict[int, list[SpanRows]] = {}
        for span in spans:
            # To the same actor whenever it is asked for, and neighbours to different ones.
            owner = hash((span[0].object_no, span[1].first_row)) % len(self.actors)
            by_actor.setdefault(owner, []).append(span)
        asked = [self.actors[n].texts.remote(some, columns) for n, some in by_actor.items()]
        return [texts for part in self._ask(asked) for texts in part]

    def keep(self, fact: FileFact, number: int, table: pa.Table) -> None:
        """See `StoredRows`."""
        owner = self._owners[fact.path] % len(self.actors)
        self._ask([self.actors[owner].keep.remote(fact, number, table)])

    @functools.cached_property
    def _owners(self) -> dict[str, int]:
        return {fact.path: place for place, fact in enumerate(self.shards.facts)}

    def stop(self) -> None:
        """End the actors, and with them what they hold."""
        for actor in self.actors:
            ray.kill(actor)

    def _dealt(self, ids: IdArray) -> list[tuple[int, IdArray]]:
        """Return which (m,) of some ids each actor holds, without those that no shard holds."""
        places = self.shards.numbers(ids)
        owners = np.where(places >= 0, places % len(self.actors), -1)
        return [(int(n), np.flatnonzero(owners == n)) for n in np.unique(owners[places >= 0])]

    def _ask(self, calls: list[Any]) -> list[Any]:
        return wait_for(calls, lambda: None)


def start_holders(storage: Storage, root: str, shards: ShardMap, at_once: int) -> Holders:
    """Start actors that hold a data set together, about as many as tasks that ask them at once.

    They reserve nothing: one is at work only while a task that has a CPU waits for it.
    """
    count = max(1, min(at_once, len(shards.facts)))
    actor = ray.remote(
        num_cpus=0,
        max_restarts=HOLDER_RESTARTS,
        max_task_retries=HOLDER_RESTARTS,
        # Each holds its share on its own machine.
        scheduling_strategy="SPREAD",
    )(RowHolder)
    actors = [actor.remote(storage, root, shards.every(count, n)) for n in range(count)]
    return Holders(tuple(actors), shards)
