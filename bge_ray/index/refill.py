"""Results that fall together leave places empty: queries that lack some ask again, for more, and harder.

Chunks of one passage count once, as do passages that are in a corpus twice, and what a data set has no more
counts nothing. How many of them are among the best is known only afterwards.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from bge_ray.records.ids import IdArray

# Where results fell together, so many times as many are fetched, or lists probed, as before.
REFILL = 4
# Results of all queries that are asked at once: what ids, scores and their sorting take is some hundred
# megabytes. A single query looks at no more, whatever it lacks.
RESULTS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Ask:
    """How many results a query are asked for, and how hard they are looked for; effort None: exactly."""

    fetched: int
    effort: int | None


@dataclass(frozen=True)
class Reach:
    """What is asked at ``first``, and what there is: ``most`` results, and the effort that finds them all."""

    first: Ask
    most: int
    largest_effort: int

    def wider(self, ask: Ask, *, holes: bool) -> Ask | None:
        """Return what to ask next where results lack, or None where all was asked for.

        Args:
            ask: what was asked.
            holes: whether less was found than asked for, so that a greater effort finds more.
        """
        if holes and ask.effort is None:
            return None  # an exact search that found less found all
        fetched = max(ask.fetched, min(REFILL * ask.fetched, self.most, RESULTS_AT_ONCE))
        effort = ask.effort
        if holes and effort is not None:
            effort = min(REFILL * effort, max(effort, self.largest_effort))
        wider = Ask(fetched, effort)
        return None if wider == ask else wider


class Answer(Protocol):
    """What (m,) queries got: which ``lacking`` results they should have, and any ``holes``, see `Reach`."""

    @property
    def lacking(self) -> npt.NDArray[np.bool_]:
        """(m,) whether a query has fewer results than it should."""
        ...

    @property
    def holes(self) -> bool:
        """Whether a query was given fewer results than it asked for."""
        ...


A = TypeVar("A", bound=Answer)


@dataclass(frozen=True)
class Filled(Generic[A]):
    """An answer to what was asked of (m,) ``numbers`` of queries; it stands for those that are ``kept``."""

    ask: Ask
    numbers: IdArray
    kept: npt.NDArray[np.bool_]
    answer: A


def first_fetched(k: int, rescored: int, vectors: int, rows: int) -> int:
    """Return the results to ask for at first, for k distinct passages.

    Args:
        k: passages wanted.
        rescored: candidates to score again, 0 for none.
        vectors: of the data set.
        rows: passages that they are chunks of; as many as vectors where texts are whole.
    """
    return max(k * min(REFILL, -(-vectors // rows)), rescored)


def refill(n_queries: int, reach: Reach, ask_for: Callable[[IdArray, Ask], A]) -> Iterator[Filled[A]]:
    """Ask for queries until none lacks a result that can be had; each is kept once.

    A query is asked a few times at most: what it fetches, or its effort, grows by REFILL each time.

    Args:
        n_queries: how many there are, named by their numbers.
        reach: how much to ask for, at first and at most.
        ask_for: answers (m,) ascending numbers.
    """
    todo = [(np.arange(n_queries), reach.first)] if n_queries else []
    while todo:
        numbers, ask = todo.pop()
        step = max(1, RESULTS_AT_ONCE // ask.fetched)
        if len(numbers) > step:
            todo += [(numbers[start : start + step], ask) for start in range(0, len(numbers), step)]
            continue
        answer = ask_for(numbers, ask)
        wider = reach.wider(ask, holes=answer.holes)
        again = answer.lacking if wider is not None else np.zeros(len(numbers), np.bool_)
        if wider is not None and again.any():
            todo.append((numbers[again], wider))
        yield Filled(ask, numbers, ~again, answer)
