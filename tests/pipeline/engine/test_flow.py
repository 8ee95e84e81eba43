"""Receipts are booked one by one, and a fault that is in no unit ends the run."""

from collections.abc import Iterator

import pyarrow as pa
import pytest
import ray

from bge_ray.errors import DamagedShardError, DatasetMismatchError, IncompleteRunError, RejectedRowsError
from bge_ray.pipeline.engine.flow import (
    MAX_FAILURES_IN_A_ROW,
    by_actors,
    by_tasks,
    follow,
    parcels,
    receipts,
)
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.pools import Pool, Tasks
from bge_ray.records.plan import Unit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]


def units(n: int) -> list[Parcel]:
    return [Parcel.of(f"{k}", Unit(0, k, 1)) for k in range(n)]


def split_stage(batch: pa.Table, times: int) -> Iterator[pa.Table]:
    """Make several parcels of each, as a span is read in units."""
    parcel = Parcel.from_batch(batch)
    for k in range(times):
        yield parcel.filled(pa.table({"n": [k] * 1000})).to_batch()


class CountStage:
    def __init__(self, job: str) -> None:
        self._job = job

    def __call__(self, batch: pa.Table) -> pa.Table:
        parcel = Parcel.from_batch(batch)
        return parcel.filled(None, rows=len(parcel.table), job=self._job).to_batch()


class RefusingStage:
    def __init__(self, job: str) -> None:
        raise DatasetMismatchError(f"{job}: other vectors, 1 and 2")

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch


def damaged_stage(_: pa.Table) -> pa.Table:
    raise DamagedShardError("s3://a/b", "3 bytes")


def test_every_parcel_gives_its_receipts_through_tasks_and_actors() -> None:
    def start() -> Iterator[Parcel]:
        rows = by_tasks(parcels(units(5)), split_stage, Tasks(2, 0.1), times=3)
        return receipts(by_actors(rows, CountStage, Pool(2, 0.5, 0.0, 1), "a job"))

    booked: list[Parcel] = []
    follow(start, booked.append, lambda: None)
    assert sorted(p.name for p in booked) == [str(k) for k in range(5) for _ in range(3)]
    assert all((p.table, dict(p.facts)) == (None, {"rows": 1000, "job": "a job"}) for p in booked)


def test_an_actor_that_refuses_to_start_ends_the_run_with_its_reason() -> None:
    def start() -> Iterator[Parcel]:
        return receipts(by_actors(parcels(units(2)), RefusingStage, Pool(1, 0.5, 0.0, 1), "canary"))

    with pytest.raises((IncompleteRunError, DatasetMismatchError), match="canary: other vectors, 1 and 2"):
        follow(start, lambda _: None, lambda: None)


def test_a_damaged_shard_ends_the_run_as_what_no_rerun_mends() -> None:
    def start() -> Iterator[Parcel]:
        return receipts(by_tasks(parcels(units(2)), damaged_stage, Tasks(1, 0.1)))

    with pytest.raises(DamagedShardError, match=r"^s3://a/b: 3 bytes; remove it and run bge-ray") as caught:
        follow(start, lambda _: None, lambda: None)
    assert caught.value.exit_code == 2


def test_failures_end_the_run_only_in_a_row() -> None:
    bad = [parcel.failed("no store") for parcel in units(MAX_FAILURES_IN_A_ROW)]
    good = units(1)
    booked: list[Parcel] = []
    follow(lambda: [*bad[:-1], *good, *bad[:-1]], booked.append, lambda: None)
    assert len(booked) == 2 * MAX_FAILURES_IN_A_ROW - 1
    with pytest.raises(IncompleteRunError, match="10 units failed in a row, the last: no store"):
        follow(lambda: [*good, *bad, *good], booked.append, lambda: None)


def test_whoever_books_or_watches_may_end_it() -> None:
    def refuse(_: Parcel) -> None:
        raise RejectedRowsError("too many")

    def stop() -> None:
        raise KeyError("stop")

    with pytest.raises(RejectedRowsError, match="too many"):
        follow(lambda: units(3), refuse, lambda: None)
    with pytest.raises(KeyError, match="stop"):
        follow(lambda: units(3), lambda _: None, stop)
    assert ray.data.DataContext.get_current().custom_execution_callback_classes == []
