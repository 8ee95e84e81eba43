"""Token ids and reasons as columns: nothing is copied that need not be, and no row is lost."""

import dataclasses

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.pipeline.engine.rows import packed_tokens, with_faults, with_tokens, without_tokens
from bge_ray.records.tokens import PackedTokens, TokenSpans

TEXTS = st.lists(st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=5), max_size=12)


def tokens_of(texts: list[list[int]], *, types: bool = False) -> PackedTokens:
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in texts])]).astype(np.int32)
    ids = np.array([i for text in texts for i in text], np.int32)
    starts = np.array([len(t) // 2 for t in texts], np.int32) if types else None
    prompts = np.array([len(t) + 1 for t in texts], np.int32) if types else None
    return PackedTokens(ids, offsets, np.zeros(len(texts), np.bool_), starts, prompts)


@given(TEXTS, st.booleans(), st.integers(0, 3))
def test_every_text_comes_back_under_its_row(texts: list, types: bool, cut: int) -> None:
    rows = np.array([i for i, text in enumerate(texts) if text is not None], np.int64)
    given_texts = [text for text in texts if text is not None]
    table = with_tokens(pa.table({"n": range(len(texts))}), rows, tokens_of(given_texts, types=types))
    for some, first in ((table, 0), (table.slice(cut), min(cut, len(texts)))):
        found, tokens = packed_tokens(some)
        back = [
            tokens.input_ids[a:b].tolist() for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)
        ]
        expected = [(i - first, text) for i, text in enumerate(texts) if text is not None and i >= first]
        assert list(zip(found.tolist(), back, strict=True)) == expected
        if types and expected:
            assert tokens.type_starts.tolist() == [len(text) // 2 for _, text in expected]
            assert tokens.prompt_tokens.tolist() == [len(text) + 1 for _, text in expected]
    assert without_tokens(table).column_names == ["n"]


def test_token_ids_travel_without_a_copy() -> None:
    tokens = tokens_of([[1, 2, 3], [4], [5, 6, 7]])
    table = with_tokens(pa.table({"n": [0, 1, 2]}), np.arange(3), tokens)
    _, back = packed_tokens(table)
    assert back.input_ids.ctypes.data == tokens.input_ids.ctypes.data


def test_faults_are_added_to_those_that_are_there() -> None:
    table = with_faults(pa.table({"n": [0, 1, 2]}), {})
    assert table["reason"].null_count == 3
    table = with_faults(with_faults(table, {1: ("a", "why")}), {2: ("b", "how")})
    assert table["reason"].to_pylist() == [None, "a", "b"]
    assert table["detail"].to_pylist() == [None, "why", "how"]


@given(st.lists(st.none() | st.integers(0, 3), max_size=14), st.integers(0, 2))
def test_rows_that_share_tokens_come_back_with_their_spans(drawn: list, seed: int) -> None:
    """A number begins a row that has a result; every third of them shares the tokens of the one before."""
    rows = np.array([i for i, n in enumerate(drawn) if n is not None], np.int64)
    starts = [k for k in range(len(rows)) if k == 0 or (k + seed) % 3]
    borders = np.array([[n, n + 2] for n in drawn if n is not None], np.int32).reshape(-1, 2)
    spans = TokenSpans(np.array([*starts, len(rows)] if starts else [0], np.int64), borders)
    tokens = dataclasses.replace(tokens_of([[9, k] for k in starts]), spans=spans)
    table = with_tokens(pa.table({"n": range(len(drawn))}), rows, tokens)
    found, back = packed_tokens(table)
    assert found.tolist() == rows.tolist()
    assert back.input_ids.tolist() == tokens.input_ids.tolist()
    assert back.spans.offsets.tolist() == spans.offsets.tolist()
    assert back.spans.borders.tolist() == borders.tolist()
    assert without_tokens(table).column_names == ["n"]
