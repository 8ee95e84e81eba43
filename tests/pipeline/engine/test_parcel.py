"""A parcel crosses as one row, whole, and its tables are not copied."""

import dataclasses

import pyarrow as pa
import pytest

from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.records.plan import Unit

TASK = Unit(1, 2, 3)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_parcel_comes_back_as_it_was(rows: int) -> None:
    nested = pa.array([[{"a": i}] * (i % 3) for i in range(rows)], pa.list_(pa.struct([("a", pa.int64())])))
    table = pa.table({"x": pa.array(range(rows), pa.int64()), "nested": nested})
    parcel = Parcel.of("a name", TASK).filled(table, read_s=0.5, lengths=[1, 2])
    back = Parcel.from_batch(parcel.to_batch())
    assert back.task_as(Unit) == TASK
    assert (back.name, dict(back.facts), back.error) == ("a name", {"read_s": 0.5, "lengths": [1, 2]}, None)
    assert back.table.equals(table)


def test_what_is_given_up_travels_without_its_table() -> None:
    failed = Parcel.of("n", TASK).filled(pa.table({"x": [1]})).failed("no")
    back = Parcel.from_batch(failed.to_batch())
    assert (back.table, back.error) == (None, "no")
    assert dataclasses.replace(back, error=None).filled(None).table is None


def test_a_table_is_a_view_of_the_batch() -> None:
    batch = Parcel.of("n", TASK).filled(pa.table({"x": pa.array(range(10_000), pa.int64())})).to_batch()
    cell = batch["table"].chunk(0).buffers()[2]
    inside = Parcel.from_batch(batch).table["x"].chunk(0).buffers()[1]
    assert cell.address <= inside.address < cell.address + cell.size


def test_two_rows_are_no_parcel() -> None:
    batch = Parcel.of("n", TASK).to_batch()
    with pytest.raises(ValueError, match="one parcel a batch"):
        Parcel.from_batch(pa.concat_tables([batch, batch]))
