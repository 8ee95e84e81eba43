"""The filters of a search: one for all queries, one of each query's own, or both; settled once each."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pyarrow as pa

from bge_ray.dataset.filters import Filter, FilterReader
from bge_ray.dataset.lookup import ShardMap
from bge_ray.dataset.passing import Marked, Passes, Passing, mark_shards, put_together
from bge_ray.errors import SettingsError
from bge_ray.pipeline.engine.tasks import run_tasks
from bge_ray.pipeline.runs.source import Source
from bge_ray.records.ids import IdArray
from bge_ray.settings.sections import SearchSettings

# Of a query on its way: the SQL that passages must pass to be found for it, null where all are.
FILTER = "filter"
# Bits of rows that all filters of a run may take together; they lie in Ray's shared memory, once a node.
MARKS_BYTES = 1 << 30
# Tasks for each that runs at once, so that none is waited for long.
ROUNDS = 4


class Filtering:
    """Which passages may be found for each query of a run."""

    def __init__(self, asked: SearchSettings, source: Source) -> None:
        """Check the filter that all queries have.

        Raises:
            SettingsError: it is none, or the data set has no columns to filter by.
        """
        self._source, self._shards = source, ShardMap.of(source.manifest)
        self._used: dict[str, Filter] = {}
        self._common: Filter | None = None
        self._reader: FilterReader | None = None
        if not is_filtered(asked):
            return
        key = "search.filter_column" if asked.filter is None else f"search.filter {asked.filter!r}"
        try:
            self._reader = FilterReader(source.spec, f"output.uri {source.root}")
            if asked.filter is not None:
                self._common = self._reader.read(asked.filter)
        except SettingsError as error:
            raise SettingsError(f"{key}: {error}") from error

    def read(self, own: str | None) -> Filter | None:
        """Return what passages must pass for a query with a filter of its own, or none; None: nothing.

        Raises:
            SettingsError: its own filter is none.
        """
        if own is None or not own.strip() or self._reader is None:
            return self._common
        mine = self._reader.read(own)
        return mine if self._common is None else self._common.both(mine)

    def note(self, found: Filter | None) -> str | None:
        """Note that a query has a filter, and return its SQL.

        Raises:
            SettingsError: all that were noted take too much memory.
        """
        if found is None:
            return None
        self._used.setdefault(found.sql, found)
        rows = self._source.manifest.rows_in
        if len(self._used) > 1 and len(self._used) * rows > 8 * MARKS_BYTES:
            raise SettingsError(
                f"search.filter_column: queries have more than {len(self._used) - 1:,} different filters, "
                f"and a bit for each of them and of {rows:,} rows takes more than {MARKS_BYTES >> 20:,} MB; "
                "split the queries by their filters into several runs"
            )
        return found.sql

    def settle(self, at_once: int, watch: Callable[[], None]) -> dict[str, Passing | str]:
        """Settle by tasks which rows pass each filter that was noted, by its SQL, or why that cannot be told.

        Raises:
            SettingsError: the filter that all queries have cannot be computed of some row.
            StorageError: a shard is missing or damaged.
        """
        if self._common is not None:
            self._used.setdefault(self._common.sql, self._common)
        if not self._used:
            return {}
        source, filters = self._source, list(self._used.values())
        parts = self._shards.dealt(max(1, at_once * ROUNDS))
        marked: list[list[Marked]] = [[] for _ in parts]
        arguments = ((source.storage, source.root, part, filters) for part in parts)
        for number, found in run_tasks(mark_shards, arguments, at_once=at_once, watch=watch):
            marked[number] = found
        settled = put_together(self._shards, filters, (marks for some in marked for marks in some))
        if self._common is not None and isinstance(fault := settled[self._common.sql], str):
            raise SettingsError(f"search.filter {self._common.sql}: {fault}")
        return settled

    def passing(self, settled: Mapping[str, Passing | str]) -> int | None:
        """Return how many vectors pass the filter that all queries have; None if there is none."""
        found = None if self._common is None else settled[self._common.sql]
        return found.passes.vectors if isinstance(found, Passing) else None


def is_filtered(asked: SearchSettings) -> bool:
    """Tell whether any query may have a filter."""
    return asked.filter is not None or asked.filter_column is not None


def by_filter(queries: pa.Table) -> Iterator[tuple[str | None, IdArray]]:
    """Yield each filter of n queries, None for none, and the ascending numbers of those that have it."""
    if FILTER not in queries.column_names or not len(queries):
        yield None, np.arange(len(queries))
        return
    numbers: dict[str | None, list[int]] = {}
    for number, sql in enumerate(queries[FILTER].to_pylist()):
        numbers.setdefault(sql, []).append(number)
    for sql, some in numbers.items():
        yield sql, np.array(some, np.int64)


def passes_of(settled: Mapping[str, Passing | str]) -> dict[str, Passes]:
    """Return how much passes each filter, or why that cannot be told."""
    return {sql: Passes(0, 0, one) if isinstance(one, str) else one.passes for sql, one in settled.items()}
