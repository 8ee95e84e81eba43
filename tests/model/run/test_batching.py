"""Batches: every row once, within the budget, longest first, the same each time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.model.run.batching import longest_rows, token_budget_batches

LENGTHS = st.lists(st.integers(1, 600), max_size=80)


@given(LENGTHS, st.integers(1, 2000), st.booleans())
def test_batches(lengths: list[int], budget: int, packed: bool) -> None:
    array = np.asarray(lengths, dtype=np.int32)
    batches = token_budget_batches(array, budget, packed=packed)
    flat = np.concatenate(batches) if batches else np.zeros(0, np.int64)
    assert sorted(flat) == list(range(len(lengths)))
    assert list(flat) == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)), (
        "longest first, ties in order"
    )
    for batch, following in zip(batches, [*batches[1:], np.zeros(0, np.int64)], strict=False):
        assert batch.dtype == np.int64
        cost = array[batch].sum() if packed else len(batch) * array[batch].max()
        assert cost <= budget or len(batch) == 1
        if len(following):  # greedy: one row more would not have fitted
            more = np.append(batch, following[0])
            assert (array[more].sum() if packed else len(more) * array[more].max()) > budget
    again = token_budget_batches(array, budget, packed=packed)
    assert [list(b) for b in again] == [list(b) for b in batches]


def test_many_tokens_do_not_overflow() -> None:
    lengths = np.full(70_000, 60_000, dtype=np.int32)  # 4.2e9 tokens
    batches = token_budget_batches(lengths, 60_000 * 50_000, packed=True)
    assert [len(b) for b in batches] == [50_000, 20_000]


@given(st.integers(1, 600), st.integers(1, 5000))
def test_a_warm_up_fills_the_budget_with_the_longest_rows(length: int, budget: int) -> None:
    tokens = longest_rows(length, budget)
    assert set(tokens.lengths) == {length}
    assert len(tokens) == max(1, budget // length)
    assert len(token_budget_batches(tokens.lengths, budget)) == 1
