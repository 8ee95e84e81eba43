"""Receipts are drawn to the last, and a run that goes no further leaves no data path behind."""

import threading
import time
from collections.abc import Iterator

import pytest
import ray
import ray.data

from bge_ray.pipeline.engine.receipts import THREAD_NAME, draw_receipts
from tests.support.slow import slow_but

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]


ROWS, ROW_S = 20, 3


class Sleeper:
    """An actor that takes a while for every row but the first."""

    def __call__(self, row: dict[str, int]) -> dict[str, int]:
        if row["item"] > 0:
            time.sleep(ROW_S)
        return row


def identity(row: dict[str, int]) -> dict[str, int]:
    return row


def fails_at_3(row: dict[str, int]) -> dict[str, int]:
    if row["item"] == 3:
        raise ValueError("row three")
    return row


def items(path: ray.data.Dataset) -> Iterator[int]:
    batches = path.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=0)
    return (int(batch["item"][0]) for batch in batches)


def slow_path() -> Iterator[int]:
    rows = ray.data.from_items(list(range(ROWS)), override_num_blocks=ROWS)
    return items(rows.map(Sleeper, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1))


def paths() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def test_all_receipts_come_and_an_error_comes_through() -> None:
    def start(change: object) -> Iterator[int]:
        return items(ray.data.from_items(list(range(20)), override_num_blocks=5).map(change))

    assert sorted(draw_receipts(lambda: start(identity), lambda: None)) == list(range(20))
    with pytest.raises(ray.exceptions.RayTaskError, match="row three"):
        list(draw_receipts(lambda: start(fails_at_3), lambda: None))
    assert ray.data.DataContext.get_current().custom_execution_callback_classes == []


@pytest.mark.parametrize("by", slow_but(["watch"], ["watch", "caller"]))
def test_a_run_that_goes_no_further_ends_its_path(by: str) -> None:
    def watch() -> None:
        if by == "watch" and seen:
            raise KeyError("enough")

    free = ray.available_resources()["CPU"]
    seen: list[int] = []
    receipts = draw_receipts(slow_path, watch)
    if by == "watch":
        with pytest.raises(KeyError, match="enough"):
            seen.extend(receipts)
    else:
        seen.append(next(receipts))
        receipts.close()
    assert len(seen) == 1
    stopped = time.monotonic()
    assert not paths()  # ended before the caller goes on
    while ray.available_resources().get("CPU") != free:  # the actor ends with the row at hand
        assert time.monotonic() < stopped + 5 * ROW_S
        time.sleep(0.2)
