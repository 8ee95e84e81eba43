"""Vectors of queries to the best k passages of each, or chunks, with what the data set holds of them.

The one way from ids that an index or an exact search gives to passages, for the job and for `open_index`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.dataset.lookup import no_rows
from bge_ray.dataset.passing import Passes
from bge_ray.index.refill import Ask, Reach, first_fetched, refill
from bge_ray.index.selectors import effort_among, rescored_of_all
from bge_ray.index.topk import NO_RESULT, Results, best_rows, rescore
from bge_ray.pipeline.runs.holders import StoredRows
from bge_ray.pipeline.runs.source import Source
from bge_ray.records.arrays import SparseRows, whole
from bge_ray.records.ids import FloatArray, IdArray
from bge_ray.records.index import IndexDescription
from bge_ray.records.schemas import SPAN_COLUMNS

# (n, dim) queries, or n sparse ones.
Queries: TypeAlias = FloatArray | SparseRows
# Queries, results to fetch, effort -> results.
Search: TypeAlias = Callable[[Any, int, int | None], Results]
Group: TypeAlias = Literal["passage", "chunk"]


@dataclass(frozen=True)
class Retrieval:
    """What is looked for, and what is told of it.

    ``k`` results a query are kept: distinct passages, or chunks (``group``). ``per_row`` says that several
    vectors may be chunks of one passage. ``rescores`` has all that is fetched scored again from the stored
    vectors; ``columns`` of the shards come with each result. ``index`` is what is asked, None where it is the
    vectors themselves.
    """

    k: int
    group: Group
    per_row: bool
    reach: Reach
    rescores: bool
    columns: tuple[str, ...] = ()
    index: IndexDescription | None = None

    @property
    def compares_all(self) -> bool:
        """Whether all vectors that count are compared at once, so that nothing is missed but by the code."""
        effort = self.reach.first.effort
        if self.index is None or self.index.parameter is None or effort is None:
            return True
        return effort >= self.reach.largest_effort

    def among(self, passes: Passes) -> "Retrieval":
        """Return how to find results among what passes a filter.

        The less passes, the harder an index is looked through. Where that compares all that passes, the best
        are scored again from the stored vectors if the code of the index loses anything: it is exact.
        """
        most, first = min(self.reach.most, passes.vectors), self.reach.first
        effort = first.effort
        if self.index is not None and effort is not None and most:
            effort = effort_among(self.index, effort, passes.vectors)
        how = dataclasses.replace(
            self,
            k=min(self.k, passes.rows if self.per_row else passes.vectors),
            reach=Reach(Ask(min(first.fetched, most), effort), most, self.reach.largest_effort),
        )
        if self.index is None or not how.compares_all or not (again := rescored_of_all(self.index, how.k)):
            return how
        ask = Ask(min(max(first.fetched, again), most), effort)
        return dataclasses.replace(how, rescores=True, reach=dataclasses.replace(how.reach, first=ask))


@dataclass(frozen=True)
class Found:
    """The results of n queries, and what became of others.

    Results are (r,), by query, best first, ties by passage id: ``numbers`` of the queries, ``scores``, and
    ``rows`` with ``vector_id``, ``passage_id`` and the columns that were asked for. ``unknown`` results are
    not in the data set, ``doubled`` were the same passage as a better one without being a chunk of it,
    ``refilled`` queries asked again.
    """

    numbers: IdArray
    scores: FloatArray
    rows: pa.Table
    unknown: int
    doubled: int
    refilled: int


@dataclass(frozen=True)
class _Answer:
    """Results of m queries; see `Found` and `refill.Answer`."""

    numbers: IdArray
    scores: FloatArray
    rows: pa.Table
    lacking: npt.NDArray[np.bool_]
    unknown: IdArray
    doubled: IdArray
    holes: bool


def told_columns(source: Source) -> tuple[str, ...]:
    """Return the columns of the shards that are read for whatever is found."""
    return ("vector_id", "passage_id", *(SPAN_COLUMNS if source.chunked else ()))


def plan_retrieval(
    source: Source,
    index: IndexDescription | None,
    k: int,
    rescored: int,
    *,
    group: Group = "passage",
    effort: int | None = None,
    columns: Sequence[str] = (),
) -> Retrieval:
    """Settle how to find k results in a data set.

    Args:
        source: the data set.
        index: its index; None searches the vectors exactly.
        k: results a query.
        rescored: candidates of the index to score again; 0 for none.
        group: what counts as a result.
        effort: of the index; None takes the tuned one.
        columns: of the shards, to come with each result.
    """
    manifest = source.manifest
    held = manifest.vectors if index is None else index.ntotal
    group = group if source.chunked else "passage"
    per_row = source.chunked and group == "passage"
    # An exact search gives rows that are distinct already.
    rows = manifest.rows_out if per_row and index is not None else manifest.vectors
    fetched = min(first_fetched(k, rescored, manifest.vectors, rows), held)
    if index is None:
        reach = Reach(Ask(fetched, None), held, 1)
    else:
        reach = Reach(Ask(fetched, effort or index.effort), held, index.largest_effort)
    return Retrieval(
        k=min(k, manifest.rows_out if per_row else manifest.vectors),
        group=group,
        per_row=per_row,
        reach=reach,
        rescores=rescored > 0,
        columns=(*(SPAN_COLUMNS if source.chunked else ()), *columns),
        index=index,
    )


def retrieve(queries: Queries, search: Search, how: Retrieval, stored: StoredRows) -> Found:
    """Find the best k of each of n queries, and what is stored of them; sparse ones are searched exactly.

    Raises:
        IndexBuildError: what ``search`` raises.
        StorageError: a shard is missing or damaged, or lacks a column.
    """
    names = ["passage_id", *how.columns]

    def ask_for(numbers: IdArray, ask: Ask) -> _Answer:
        return _ask(queries, numbers, ask, search, how, stored)

    parts: list[tuple[IdArray, FloatArray, pa.Table]] = []
    unknown = doubled = refilled = 0
    for filled in refill(len(queries), how.reach, ask_for):
        answer, kept = filled.answer, filled.kept
        inside = np.isin(answer.numbers, filled.numbers[kept])
        parts.append((answer.numbers[inside], answer.scores[inside], answer.rows.filter(pa.array(inside))))
        unknown += int(answer.unknown[kept].sum())
        doubled += int(answer.doubled[kept].sum())
        refilled += int((~kept).sum()) if filled.ask == how.reach.first else 0
    if not parts:
        parts.append((np.empty(0, np.int64), np.empty(0, np.float32), no_rows(names)))
    numbers = np.concatenate([numbers for numbers, _, _ in parts])
    order = np.argsort(numbers, kind="stable")
    return Found(
        numbers=numbers[order],
        scores=np.concatenate([scores for _, scores, _ in parts])[order],
        # Where nothing was found, the types of the columns are not known.
        rows=pa.concat_tables([rows for _, _, rows in parts], promote_options="permissive").take(
            pa.array(order)
        ),
        unknown=unknown,
        doubled=doubled,
        refilled=refilled,
    )


def _ask(
    queries: Queries, numbers: IdArray, ask: Ask, search: Search, how: Retrieval, stored: StoredRows
) -> _Answer:
    """Search, score again, and resolve ids to passages."""
    asked = queries[numbers]
    scores, ids = search(asked, ask.fetched, ask.effort)
    holes = bool(((ids != NO_RESULT).sum(axis=1) < min(ask.fetched, how.reach.most)).any())
    if how.per_row and not how.rescores:
        scores, ids = best_rows((scores, ids), ids.shape[1])
    there = np.unique(ids[ids != NO_RESULT])
    places = stored.places(there, list(dict.fromkeys(["passage_id", *how.columns])))
    known = np.isin(ids, places["vector_id"].to_numpy())
    unknown = ((ids != NO_RESULT) & ~known).sum(axis=1)
    if how.rescores and isinstance(asked, np.ndarray):
        again = functools.partial(stored.exact_scores, asked)
        scores, ids = rescore(np.where(known, ids, NO_RESULT), again)
        if how.per_row:
            scores, ids = best_rows((scores, ids), ids.shape[1])
        known = ids != NO_RESULT
    positions = np.searchsorted(places["vector_id"].to_numpy(), ids[known])
    chosen, kept = _choose(known, scores[known], positions, places, how)
    return _Answer(
        numbers=numbers[np.nonzero(known)[0][chosen]],
        scores=scores[known][chosen],
        rows=places.take(pa.array(positions[chosen])),
        lacking=kept < how.k,
        unknown=unknown,
        doubled=known.sum(axis=1) - kept,
        holes=holes,
    )


def _choose(
    known: npt.NDArray[np.bool_], scores: FloatArray, positions: IdArray, places: pa.Table, how: Retrieval
) -> tuple[IdArray, IdArray]:
    """Choose the at most k results of each query, best first, ties by passage id.

    A passage id that was embedded twice (in two objects of the corpus) counts once, with its best score.

    Args:
        known: (m, w) where a query has a candidate.
        scores: (r,) of the candidates, query by query.
        positions: (r,) the row of each in ``places``.
        places: what the data set holds, by ascending vector id.
        how: k, and what counts as a result.

    Returns:
        Which (c,) of the r candidates, and (m,) how many distinct results each query had, k or more.
    """
    which, _ = np.nonzero(known)
    if not len(which):
        return np.empty(0, np.int64), np.zeros(len(known), np.int64)
    found = pa.table(
        [which, scores, places["passage_id"].take(pa.array(positions)), positions],
        names=["query", "score", "passage_id", "position"],
    )
    order = [("query", "ascending"), ("score", "descending"), ("passage_id", "ascending")]
    chosen = pc.sort_indices(found, [*order, ("position", "ascending")]).to_numpy().astype(np.int64)
    if how.group == "passage":
        names = whole(found["passage_id"]).dictionary_encode().indices.to_numpy()[chosen]
        _, first = np.unique(which[chosen] * len(found) + names, return_index=True)
        chosen = chosen[np.sort(first)]
    asked = which[chosen]
    rank = np.arange(len(chosen)) - np.searchsorted(asked, asked)
    return chosen[rank < how.k], np.bincount(asked, minlength=len(known))
