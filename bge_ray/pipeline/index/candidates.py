"""What searches are given for held-out queries: results as an index orders them, and the truth among them.

Passages in chunks are named by corpus rows here: one that stands twice in a corpus counts twice.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from bge_ray.index.refill import Ask, Reach, first_fetched, refill
from bge_ray.index.topk import NO_RESULT, best_rows
from bge_ray.index.tune import rescored
from bge_ray.records.ids import FloatArray, IdArray, first_ids

# (m,) numbers of queries, results to fetch, effort -> (m, w) ids, best first.
SearchSome: TypeAlias = Callable[[IdArray, int, int | None], IdArray]


@dataclass(frozen=True)
class HeldOut:
    """Queries with their exact results.

    ``queries`` are (n, dim) float32, ``truth`` (n, up to MEASURED_K or the k that is tuned for) int64.
    ``own`` are the (n,) int64 ids of queries that are rows of the index, which count neither as results nor
    as truth; None for queries of the user, and for rows that are not in it. ``source`` says what they are.
    With ``per_row`` a result is a passage, named by the best of its chunks, and a row's own one all of its
    passage.
    """

    queries: FloatArray
    own: IdArray | None
    truth: IdArray
    source: str
    per_row: bool

    def first(self, count: int | None) -> "HeldOut":
        """Return the first queries alone."""
        own = None if self.own is None else self.own[:count]
        return dataclasses.replace(self, queries=self.queries[:count], own=own, truth=self.truth[:count])


@dataclass(frozen=True)
class Candidates:
    """What was fetched for n queries.

    ``listed`` (n, w) are the results in the order of the index, ``reached`` (n, k) the truth so far as it is
    among all candidates: what is found once these are scored again, see `tune.rescored`. Where passages
    count, both name them by their first chunk.
    """

    listed: IdArray
    reached: IdArray


@dataclass(frozen=True)
class Asked:
    """How searches ask for ``results`` passages, of so many vectors and passages; see `refill.Reach`."""

    results: int
    vectors: int
    passages: int
    largest_effort: int


@dataclass(frozen=True)
class _Answer:
    """See `refill.Answer`."""

    candidates: Candidates
    lacking: npt.NDArray[np.bool_]
    holes: bool


def all_at(search: SearchSome, effort: int, width: int, some: HeldOut) -> Candidates:
    """Search with an effort for ``width`` vectors a query."""
    ids = search(np.arange(len(some.queries)), width + (some.own is not None), effort)
    ids = ids if some.own is None else drop_own(ids, some.own)
    return Candidates(ids, rescored(ids, some.truth))


def passages_at(search: SearchSome, effort: int, width: int, some: HeldOut, asked: Asked) -> Candidates:
    """Search for passages among at least ``width`` vectors a query, asking again as searches do."""
    beside = some.own is not None
    results = min(asked.results, some.truth.shape[1])
    fetched = first_fetched(results + beside, width + beside, asked.vectors, asked.passages)
    reach = Reach(Ask(min(fetched, asked.vectors), effort), asked.vectors, asked.largest_effort)

    def ask_for(numbers: IdArray, ask: Ask) -> _Answer:
        ids = search(numbers, ask.fetched, ask.effort)
        holes = bool(((ids != NO_RESULT).sum(axis=1) < min(ask.fetched, asked.vectors)).any())
        order = np.broadcast_to(-np.arange(ids.shape[1], dtype=np.float32), ids.shape)
        _, listed = best_rows((order, ids), results + beside)
        if some.own is not None:
            listed = drop_own(listed, some.own[numbers], per_row=True)
        reached = first_chunks(rescored(ids, some.truth[numbers]))
        lacking = (listed == NO_RESULT).any(axis=1)
        return _Answer(Candidates(first_chunks(listed), reached), lacking, holes)

    listed = np.full((len(some.queries), results), NO_RESULT, np.int64)
    reached = np.full(some.truth.shape, NO_RESULT, np.int64)
    for filled in refill(len(some.queries), reach, ask_for):
        numbers = filled.numbers[filled.kept]
        listed[numbers] = filled.answer.candidates.listed[filled.kept]
        reached[numbers] = filled.answer.candidates.reached[filled.kept]
    return Candidates(listed, reached)


def first_chunks(ids: IdArray) -> IdArray:
    """Return for results of any shape the first chunk of each passage; holes stay."""
    named: IdArray = np.where(ids == NO_RESULT, NO_RESULT, first_ids(ids))
    return named


def drop_own(ids: IdArray, own: IdArray, *, per_row: bool = False) -> IdArray:
    """Return (n, k - 1) results without each query's own row, or passage, from (n, k) results."""
    keep: npt.NDArray[np.bool_] = ids != own[:, None]
    if per_row:
        keep = first_ids(ids) != first_ids(own)[:, None]
    # Where a query did not find itself, its last result goes instead.
    keep[keep.all(axis=1), -1] = False
    rest: IdArray = ids[keep].reshape(len(ids), -1)
    return rest
