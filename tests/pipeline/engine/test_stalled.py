"""A run of which nothing comes says what the cluster has no room for."""

import logging
import re
import time

import pytest
import ray

from bge_ray.pipeline.engine.stalled import Silence, waiting
from tests.support.runs import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


class Giant:
    """Needs more than there is."""


def test_actors_without_room_are_named_and_those_that_run_are_not() -> None:
    small = ray.remote(num_cpus=0)(Giant).remote()
    ray.get(small.__ray_ready__.remote())
    wait_until(lambda: waiting() == "1 node, 4 of 4 CPUs free, all actors have started")
    busy = ray.remote(num_cpus=1)(Giant).remote()
    ray.get(busy.__ray_ready__.remote())
    giants = [ray.remote(num_cpus=1000)(Giant).remote() for _ in range(2)]
    wait_until(lambda: waiting() == "1 node, 3 of 4 CPUs free, not started: 2 Giant")
    for actor in (small, busy, *giants):
        ray.kill(actor)


def test_a_line_comes_after_the_time_and_again_and_not_while_something_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    silence = Silence(0.2)
    silence.look()
    time.sleep(0.25)
    silence.ended()
    silence.look()
    assert not caplog.records
    for _ in range(2):
        time.sleep(0.25)
        silence.look()
        silence.look()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    seconds = [
        float(re.fullmatch(r"no unit has ended for ([\d.]+) s: 1 node, .*", line)[1])
        for line in caplog.messages
    ]
    assert 0.2 <= seconds[0] < seconds[1]
