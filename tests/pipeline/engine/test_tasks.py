"""Plain tasks: all results come, no more than asked run at once, and errors come through as they are."""

import os
import time
from pathlib import Path

import pytest
import ray

from bge_ray.errors import CorpusError, IncompleteRunError
from bge_ray.pipeline.engine.tasks import MAX_RETRIES, run_tasks, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(200)]

ANY = {"watch": lambda: None, "num_cpus": 0.1}


def square(n: int) -> int:
    return n * n


def slow(n: int) -> int:
    for _ in range(600):  # Ray's cancellation comes between two instructions, not into a long sleep
        time.sleep(0.1)
    return n


def refuse(n: int) -> int:
    raise CorpusError(f"object {n}")


def die_at_first(folder: str, n: int) -> int:
    """End the process the first time, and with n = 0 every time."""
    attempts = Path(folder, str(n))
    with attempts.open("a") as file:
        file.write("x")
    if n == 0 or len(attempts.read_text()) == 1:
        os._exit(1)
    return n


def test_every_result_comes_under_its_number_and_arguments_are_drawn_as_tasks_start() -> None:
    drawn: list[int] = []

    def arguments():
        for n in range(12):
            drawn.append(n)
            yield (n,)

    results = run_tasks(square, arguments(), at_once=3, **ANY)
    first = next(results)
    assert len(drawn) <= 3
    found = dict([first, *results])
    assert found == {n: n * n for n in range(12)}
    assert list(run_tasks(square, [], at_once=3, **ANY)) == []


def test_references_are_yielded_where_results_are_not_wanted() -> None:
    references = [r for _, r in run_tasks(square, [(2,), (3,)], at_once=2, fetch=False, **ANY)]
    assert sorted(wait_for(references, lambda: None)) == [4, 9]
    bad = [r for _, r in run_tasks(refuse, [(2,)], at_once=1, fetch=False, **ANY)]
    with pytest.raises(CorpusError, match="object 2"):
        wait_for(bad, lambda: None)


def test_an_error_of_ours_comes_through_without_the_remote_stack() -> None:
    with pytest.raises(CorpusError) as caught:
        list(run_tasks(refuse, [(7,)], at_once=1, **ANY))
    assert str(caught.value) == "object 7"
    assert type(caught.value) is CorpusError


def test_a_task_whose_process_is_killed_is_repeated_but_not_for_ever(tmp_path: Path) -> None:
    assert list(run_tasks(die_at_first, [(str(tmp_path), 1)], at_once=1, **ANY)) == [(0, 1)]
    with pytest.raises(IncompleteRunError, match="run again"):
        list(run_tasks(die_at_first, [(str(tmp_path), 0)], at_once=1, **ANY))
    assert len((tmp_path / "0").read_text()) == MAX_RETRIES + 1


def test_whoever_watches_may_stop_and_what_is_in_flight_is_cancelled() -> None:
    asked = []

    def watch() -> None:
        asked.append(time.monotonic())
        if len(asked) > 3:
            raise KeyError("stop")

    free = ray.available_resources()["CPU"]
    with pytest.raises(KeyError, match="stop"):
        list(run_tasks(slow, [(n,) for n in range(4)], at_once=2, watch=watch, num_cpus=0.5))
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0.0) < free:
        assert time.monotonic() < deadline
        time.sleep(0.2)
