"""Asking again: every query is kept once, with all that is to be had, after a few questions."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.index.refill import REFILL, RESULTS_AT_ONCE, Ask, Reach, first_fetched, refill


@dataclass(frozen=True)
class Given:
    """Who lacks results, of some queries."""

    lacking: np.ndarray
    holes: bool


@given(
    needs=st.lists(st.integers(1, 500_000), min_size=1, max_size=40),
    most=st.integers(1, 600_000),
    first=st.integers(1, 50),
)
def test_each_query_is_kept_once_when_it_has_enough_or_there_is_no_more(needs, most, first):
    """A query that needs so many candidates gets them in as few steps as doubling twice takes."""
    need, first = np.array(needs), min(first, most)
    asked: dict[int, list[int]] = {i: [] for i in range(len(needs))}

    def answer(numbers, ask):
        assert len(numbers) * ask.fetched <= max(RESULTS_AT_ONCE, ask.fetched)
        for number in numbers.tolist():
            asked[number].append(ask.fetched)
        return Given(need[numbers] > ask.fetched, holes=False)

    kept: list[int] = []
    for filled in refill(len(needs), Reach(Ask(first, 1), most, 1), answer):
        kept += filled.numbers[filled.kept].tolist()
    assert sorted(kept) == list(range(len(needs)))
    for number, widths in asked.items():
        assert widths[-1] >= min(needs[number], most)
        assert all(b == min(REFILL * a, most) for a, b in itertools.pairwise(widths))
        assert all(width < needs[number] for width in widths[:-1])


def test_holes_raise_the_effort_up_to_the_largest_and_end_an_exact_search():
    reach = Reach(Ask(10, 3), 1000, 40)
    assert reach.wider(Ask(10, 3), holes=True) == Ask(40, 12)
    assert reach.wider(Ask(10, 3), holes=False) == Ask(40, 3)
    assert reach.wider(Ask(1000, 12), holes=True) == Ask(1000, 40)
    assert reach.wider(Ask(1000, 40), holes=True) is None
    assert reach.wider(Ask(10, None), holes=True) is None
    # No query looks at more than this, and none at less than it was first to.
    assert (
        Reach(Ask(1, 1), 10**9, 1).wider(Ask(RESULTS_AT_ONCE - 1, 1), holes=False).fetched == RESULTS_AT_ONCE
    )
    assert Reach(Ask(1, 1), 10**9, 1).wider(Ask(RESULTS_AT_ONCE, 1), holes=False) is None


@pytest.mark.parametrize(
    ("vectors", "rows", "fetched"), [(70, 70, 10), (140, 70, 20), (141, 70, 30), (10**6, 10, 40)]
)
def test_as_many_chunks_are_asked_for_at_first_as_passages_have(vectors, rows, fetched):
    assert first_fetched(10, 0, vectors, rows) == fetched
    assert first_fetched(10, 200, vectors, rows) == 200


def test_nothing_is_asked_for_no_queries():
    assert list(refill(0, Reach(Ask(1, 1), 1, 1), None)) == []
