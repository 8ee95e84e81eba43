"""Input cut into units and groups, which a rerun finds again."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bge_ray.pipeline.runs.groups import CANDIDATE_SCHEMA, QUERY_SCHEMA, part_uri
from bge_ray.pipeline.runs.intake import Block, Limits, read_group, take_in
from bge_ray.storage.objects import Storage

STORAGE = Storage(5)
# The length of its text is added up.
STEPS_A_PAIR = 20


def blocks(sizes: list[int]) -> Iterator[Block]:
    for number, size in enumerate(sizes):
        yield {"query_id": [f"q{number}"] * size, "query": [f"text {number}"] * size}


@hypothesis_settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 12), max_size=40), unit=st.integers(1, 10), groups=st.integers(1, 4))
def test_every_row_is_in_one_unit_and_no_query_is_torn(
    sizes: list[int], unit: int, groups: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = str(tmp_path_factory.mktemp("work"))
    intake = take_in(STORAGE, folder, blocks(sizes), QUERY_SCHEMA, Limits(unit, unit * groups), "key")
    assert intake.rows == sum(sizes)
    assert len({u.fingerprint for u in intake.units}) == len(intake.units)
    seen: list[str] = []
    for group in intake.groups:
        table = read_group(STORAGE, group)
        for task in group.todo:
            rows = [
                r["query_id"] for r in table.to_pylist() if 0 <= r["row_no"] - task.first_row < task.n_rows
            ]
            assert len(rows) == task.n_rows
            assert len(rows) <= unit or len(set(rows)) == 1  # only a single query may be larger
            assert not set(rows) & set(seen)
            seen += rows
    assert seen == [f"q{number}" for number, size in enumerate(sizes) for _ in range(size)]


def test_finished_units_are_not_taken_in_again_and_a_longer_input_keeps_its_beginning(tmp_path: Path) -> None:
    limits = Limits(2, 4)
    before = take_in(STORAGE, str(tmp_path), blocks([1] * 9), QUERY_SCHEMA, limits, "key")
    done = [unit for unit in before.units if unit.first_row == 0]
    for unit in done:
        STORAGE.write(part_uri(str(tmp_path), unit.fingerprint), b"anything")
    after = take_in(STORAGE, str(tmp_path), blocks([1] * 13), QUERY_SCHEMA, limits, "key")
    assert after.units[:4] == before.units[:4]
    assert {u.fingerprint for g in after.groups for u in g.todo}.isdisjoint(u.fingerprint for u in done)
    left = after.groups[0]
    assert [r["row_no"] for r in read_group(STORAGE, left).to_pylist()] == [2, 3]
    other = take_in(STORAGE, str(tmp_path), blocks([1] * 9), QUERY_SCHEMA, limits, "another key")
    assert {u.fingerprint for u in other.units}.isdisjoint(u.fingerprint for u in before.units)


def test_long_texts_close_a_group_early(tmp_path: Path) -> None:
    nothing = {name: [None] for name in ("vector_id", "first_score", "score", "reason", "detail")}

    def long_lists() -> Iterator[Block]:
        for i in range(8):
            yield {
                "query_id": [str(i)],
                "query": ["q"],
                "passage_id": ["p"],
                "text": ["x" * (20 << 20)],
            } | nothing

    intake = take_in(STORAGE, str(tmp_path), long_lists(), CANDIDATE_SCHEMA, Limits(1, 1000), "key")
    assert [len(group.todo) for group in intake.groups] == [4, 4]
    assert pq.read_schema(pa.BufferReader(STORAGE.read(intake.groups[0].uri))).names == CANDIDATE_SCHEMA.names


VALUES = st.one_of(st.none(), st.text(max_size=3))


@pytest.mark.long
@given(
    rows=st.lists(st.tuples(VALUES, st.one_of(st.none(), st.integers(0, 3))), min_size=1, max_size=9),
    before=st.lists(st.tuples(VALUES, st.one_of(st.none(), st.integers(0, 3))), max_size=9),
    changed=st.tuples(VALUES, st.one_of(st.none(), st.integers(0, 3))),
    place=st.integers(0, 8),
)
def test_a_unit_is_named_by_its_rows_and_nothing_else(
    rows: list, before: list, changed: tuple, place: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def name(found: list, earlier: list) -> str:
        def block(query: str, pairs: list) -> Block:
            nothing = {name: [None] * len(pairs) for name in ("first_score", "score", "reason", "detail")}
            texts, vector_ids = [text for text, _ in pairs], [number for _, number in pairs]
            ids = [str(number) for number in range(len(pairs))]
            queries = {"query_id": [query] * len(pairs), "query": ["text"] * len(pairs)}
            return queries | nothing | {"passage_id": ids, "text": texts, "vector_id": vector_ids}

        given_blocks = [block("before", earlier)] if earlier else []
        folder = str(tmp_path_factory.mktemp("work"))
        taken = take_in(
            STORAGE, folder, iter([*given_blocks, block("q", found)]), CANDIDATE_SCHEMA, Limits(1, 99), "key"
        )
        return taken.units[-1].fingerprint

    assert name(rows, before) == name(rows, [])
    other = [*rows]
    other[place % len(rows)] = changed
    assert (name(other, before) == name(rows, before)) == (other == rows)


def steps(act: Callable[[], object]) -> int:
    """Return how many steps the interpreter took, a fact of the code and not of the machine."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def test_a_pair_costs_a_few_steps_of_the_interpreter(tmp_path: Path) -> None:
    """Cut, hashed and stored by columns: 10^8 pairs are minutes otherwise, with every worker waiting."""

    def lists(pairs: int) -> list[Block]:
        texts, numbers = [f"text {i}" for i in range(pairs)], list(range(pairs))
        nothing = {name: [None] * pairs for name in ("first_score", "score", "reason", "detail")}
        columns = {"passage_id": [str(i) for i in numbers], "text": texts, "vector_id": numbers}
        return [
            {"query_id": [f"q{i}"] * pairs, "query": ["q"] * pairs} | nothing | columns for i in range(10)
        ]

    def taking(pairs: int) -> int:
        blocks, limits = lists(pairs), Limits(2 * pairs, 4 * pairs)
        folder = str(tmp_path / str(pairs))
        return steps(lambda: take_in(STORAGE, folder, blocks, CANDIDATE_SCHEMA, limits, "key"))

    taking(10)  # what is done once
    few, many = taking(100), taking(600)
    assert many - few < STEPS_A_PAIR * 10 * 500
