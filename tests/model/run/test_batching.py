"""Batches: every row once, within the budget, longest first, the same each time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.model.run.batching import Card, longest_rows, settle_budget, token_budget_batches

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


H100, H200, A100 = Card(50 << 20, 132), Card(60 << 20, 132), Card(40 << 20, 108)
L4, A10, T4 = Card(48 << 20, 58), Card(6 << 20, 72), Card(4 << 20, 40)


@pytest.mark.parametrize(
    ("card", "hidden", "tokens"),
    [
        (H100, 768, 32_768),
        (H100, 384, 65_536),
        (H100, 1024, 32_768),
        (H200, 768, 32_768),
        (A100, 768, 32_768),
        (L4, 768, 8_192),
        (L4, 384, 16_384),
        (A10, 768, 16_384),
        (T4, 768, 8_192),
        (T4, 4096, 4_096),
        (None, 768, 1_024),
    ],
)
def test_a_budget_suits_card_and_model(card: Card | None, hidden: int, tokens: int) -> None:
    assert settle_budget("auto", card, hidden) == tokens
    assert settle_budget(300, card, hidden) == 300
