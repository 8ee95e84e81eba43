"""The row check: every row is accepted or rejected, with a reason, and never both."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.formats.rows import (
    MAX_DETAIL_CHARS,
    RawRows,
    Rejected,
    check_rows,
    is_blank,
    take_passages,
)

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["a", "b", " ", "\ud800"]),
    st.lists(st.integers(), max_size=2),
    st.binary(max_size=3),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
)


@given(
    rows=st.lists(st.tuples(ANYTHING, ANYTHING, ANYTHING, st.booleans()), max_size=20),
    titled=st.booleans(),
)
def test_every_row_ends_in_one_place(rows: list[tuple], titled: bool) -> None:
    kept = {"n": pa.array(range(len(rows)), pa.int64())}
    faults = {i: ("malformed_line", "x" * 1000) for i, row in enumerate(rows) if row[3]}
    ids, texts, titles = ([row[k] for row in rows] for k in range(3))
    passages, rejected = check_rows(RawRows(ids, texts, titles if titled else None, kept, faults))
    assert sorted([*passages.rows.tolist(), *(r.row for r in rejected)]) == list(range(len(rows)))
    assert set(faults) <= {r.row for r in rejected}
    assert len(set(passages.passage_ids)) == len(passages.passage_ids)
    assert passages.kept["n"].to_pylist() == passages.rows.tolist()
    for row, passage_id, text in zip(passages.rows, passages.passage_ids, passages.texts, strict=True):
        assert passage_id == str(ids[row])
        assert text.strip()
        assert str(texts[row]).strip() in text
        (passage_id + text).encode()
    assert all(len(r.detail) <= MAX_DETAIL_CHARS for r in rejected)


def test_title_and_text_are_joined_as_flagembedding_does() -> None:
    titles = ["T", "", None, "T", " "]
    texts = ["x", "x ", " x ", "", "x"]
    passages, rejected = check_rows(RawRows([*"abcde"], texts, titles, {}, {}))
    assert passages.texts == ["T x", "x", " x ", "T", "x"]
    assert rejected == []


def test_the_first_of_two_equal_ids_stays() -> None:
    passages, rejected = check_rows(RawRows(["a", 1, "1", "a"], ["", "x", "y", "z"], None, {}, {}))
    assert (passages.passage_ids, passages.texts) == (["1", "a"], ["x", "z"])
    assert [(r.row, r.reason, r.passage_id) for r in rejected] == [
        (0, "empty_text", "a"),
        (2, "duplicate_id", "1"),
    ]


def test_take_passages() -> None:
    passages, _ = check_rows(RawRows([*"abcd"], [*"wxyz"], None, {"n": pa.array([1, 2, 3, 4])}, {}))
    taken = take_passages(passages, passages.rows[[3, 1]])
    assert (taken.passage_ids, taken.texts, taken.kept["n"].to_pylist()) == (["d", "b"], ["z", "x"], [4, 2])


def test_an_id_that_cannot_be_stored_is_not() -> None:
    _, rejected = check_rows(RawRows(["\ud800"], ["x"], None, {}, {}))
    assert rejected == [Rejected(0, None, "invalid_unicode", rejected[0].detail)]
    assert "character 0" in rejected[0].detail


@pytest.mark.parametrize(
    ("text", "blank"),
    [
        ("", True),
        (" \n\u3000\u00a0", True),
        ("\u200b\u200b", True),
        ("\x00\x01\ufeff", True),
        ("\u202e \u2066", True),
        ("\u200bx", False),
        ("\u0301", False),  # a mark without its letter is seen
        ("\U0001f468\u200d\U0001f469", False),
        ("\ue000", False),  # of private use
        ("。", False),
    ],
)
def test_what_nobody_sees_is_no_text(text: str, blank: bool) -> None:
    assert is_blank(text) == blank
    rows = RawRows(["1"], [text], None, {}, {})
    passages, rejected = check_rows(rows)
    assert len(passages.texts) == (0 if blank else 1)
    assert [row.reason for row in rejected] == (["empty_text"] if blank else [])
