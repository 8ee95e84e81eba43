"""Rows of tokens laid end to end."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.records.tokens import PackedTokens, TokenSpans

ROWS = st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=5)


def pack(rows: list[list[int]], *, types: bool = False) -> PackedTokens:
    return PackedTokens(
        np.array([i for row in rows for i in row], np.int32),
        np.cumsum([0, *map(len, rows)]).astype(np.int32),
        np.array([len(row) > 2 for row in rows], np.bool_),
        np.array([len(row) // 2 for row in rows], np.int32) if types else None,
        np.array([len(row) + 1 for row in rows], np.int32) if types else None,
    )


@given(st.lists(ROWS, max_size=4), st.booleans())
def test_parts_end_to_end_are_the_rows_of_all(parts: list[list[list[int]]], types: bool) -> None:
    rows = [row for part in parts for row in part]
    joined, whole = PackedTokens.concatenate([pack(p, types=types) for p in parts]), pack(rows, types=types)
    assert len(joined) == len(rows)
    for name in ("input_ids", "offsets", "truncated"):
        a, b = getattr(joined, name), getattr(whole, name)
        assert a.dtype == b.dtype and a.tolist() == b.tolist()
    if types and parts:
        assert joined.type_starts.tolist() == whole.type_starts.tolist()
        assert joined.prompt_tokens.tolist() == whole.prompt_tokens.tolist()
    chosen = np.arange(len(rows))[::-1]
    some, picked = joined.take(np.arange(len(rows))[1::2]), pack(rows[1::2], types=types)
    for name in ("input_ids", "offsets", "truncated"):
        assert getattr(some, name).tolist() == getattr(picked, name).tolist(), name
    if types and parts:
        assert some.type_starts.tolist() == picked.type_starts.tolist()
        assert some.prompt_tokens.tolist() == picked.prompt_tokens.tolist()
    assert joined.take(np.arange(len(rows))) is joined
    turned, expected = joined.take(chosen), pack(rows[::-1], types=types)
    assert turned.input_ids.tolist() == expected.input_ids.tolist()
    assert turned.offsets.tolist() == expected.offsets.tolist()
    assert joined.lengths_of(chosen).tolist() == [len(row) for row in rows][::-1]


def test_parts_of_two_models_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 parts have segments"):
        PackedTokens.concatenate([pack([[1]]), pack([[1]], types=True)])


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=3), max_size=6), st.data())
def test_results_of_spans_go_with_their_rows(drawn: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    borders = [np.asarray([sorted(span) for span in row], np.int32).reshape(-1, 2) for row in drawn]
    plain = pack([[n] * 4 for n in range(len(drawn))])
    tokens = dataclasses.replace(plain, spans=TokenSpans.of(borders))
    results = [(row, *sorted(span)) for row, spans in enumerate(drawn) for span in spans]

    def told(some: PackedTokens) -> list[tuple[int, int, int]]:
        names = some.input_ids[some.offsets[:-1]]
        rows = names[some.spans.rows].tolist()
        return [(row, a, b) for row, (a, b) in zip(rows, some.spans.borders.tolist(), strict=True)]

    assert tokens.n_results == len(results) and told(tokens) == results
    assert tokens.result_lengths.tolist() == [b - a for _, a, b in results]
    assert tokens.result_truncated.all()
    order = data.draw(st.permutations(range(len(drawn))))
    rows = np.asarray(order[: len(order) // 2 + 1] if order else [], np.int64)
    assert told(tokens.take(rows)) == [found for row in rows for found in results if found[0] == row]
    assert [results[n][0] for n in tokens.results_of(rows)] == [
        row for row in rows for found in results if found[0] == row
    ]
    some = sorted(data.draw(st.sets(st.sampled_from(range(len(results)))))) if results else []
    kept = tokens.take_results(np.asarray(some, np.int64))
    assert told(kept) == [results[n] for n in some]
    assert len(kept) == len({results[n][0] for n in some})
    if drawn:
        assert told(PackedTokens.concatenate([tokens, kept])) == [*results, *(results[n] for n in some)]


def test_parts_with_and_without_spans_do_not_mix() -> None:
    tokens = pack([[1, 2]])
    with_spans = dataclasses.replace(tokens, spans=TokenSpans.of([np.asarray([[0, 1]], np.int32)]))
    with pytest.raises(ValueError, match="1 of 2 parts have spans"):
        PackedTokens.concatenate([tokens, with_spans])
