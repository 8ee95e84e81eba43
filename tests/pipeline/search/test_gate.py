"""Which queries a recall is measured on: of the run, the same each time, and few; no Ray."""

import numpy as np
import pyarrow as pa
import pytest

from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.runs.groups import GroupTask, GroupUnit
from bge_ray.pipeline.search.gate import SAMPLE, SAMPLE_GROUPS, EncodedSample, sample_of
from bge_ray.records.outputs import Output


def group(number: int, *units: tuple[int, int]) -> GroupTask:
    return GroupTask(number, f"memory://g{number}", tuple(GroupUnit(*unit, "f") for unit in units))


def rows_of(tasks: tuple[GroupTask, ...]) -> list[tuple[int, int]]:
    assert all(unit.n_rows == 1 for task in tasks for unit in task.todo)
    return [(task.number, unit.first_row) for task in tasks for unit in task.todo]


def test_of_few_queries_all_are_taken() -> None:
    groups = (group(3, (0, 5), (5, 2)), group(4, (6, 1)))
    assert rows_of(sample_of(groups)) == [(3, row) for row in range(7)] + [(4, 6)]
    assert [task.uri for task in sample_of(groups)] == ["memory://g3", "memory://g4"]


def test_of_many_a_bounded_number_of_few_groups_and_the_same_each_time() -> None:
    groups = tuple(group(number, (0, 700), (1400, 600)) for number in range(40))
    drawn = rows_of(sample_of(groups))
    assert len(set(drawn)) == len(drawn) == SAMPLE
    assert len({number for number, _ in drawn}) <= SAMPLE_GROUPS
    assert all(row < 700 or 1400 <= row < 2000 for _, row in drawn)  # what is done already is not drawn
    assert {row >= 1400 for _, row in drawn} == {True, False}
    assert rows_of(sample_of(groups)) == drawn


def test_what_could_not_be_encoded_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    weights = [{"indices": [1, 7], "values": [0.5, 0.25]}, None, {"indices": [2], "values": [1.0]}]
    table = pa.table(
        {
            "sparse": pa.array(weights, Output("sparse", "sparse", 100, "float32").type()),
            "reason": [None, "too_long", None],
        }
    )
    sample = EncodedSample()
    assert len(sample.queries()) == 0
    sample.take(Parcel.of("1", group(1, (0, 3))).filled(table))
    sample.take(Parcel.of("2", group(2, (0, 3))).failed("its process died 3 times"))
    queries = sample.queries()
    np.testing.assert_array_equal(queries.offsets, [0, 2, 3])
    np.testing.assert_array_equal(queries.indices, [1, 7, 2])
    assert "without group 2: its process died 3 times" in caplog.text
