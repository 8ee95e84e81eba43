"""The simulated pool: its arithmetic, and its run over the embed job's own data path."""

import json
import subprocess
import sys

import pytest

from bge_ray.bench.scheduling import middle_rate, steady_share


def test_the_steady_time_begins_with_the_last_to_start_and_ends_with_the_first_to_run_out() -> None:
    always = [(0.0, 4.0), (4.0, 10.0)]
    idles = [(1.0, 3.0), (5.0, 7.0), (7.0, 9.0)]
    window, share = steady_share([always, idles])
    assert window == (1.0, 9.0)
    assert share == pytest.approx((8 + 2 + 2 + 2) / 16)


def test_without_a_time_in_which_all_worked_nothing_is_claimed() -> None:
    assert steady_share([[(0.0, 1.0)], [(2.0, 3.0)]])[1] == 0.0


def test_the_rate_is_that_of_the_middle_half() -> None:
    slow_start, steady, slow_end = (
        [0.0, 50.0, 90.0, 99.0],
        [100.0 + 0.5 * i for i in range(9)],
        [150.0, 190.0, 250.0],
    )
    assert middle_rate([*slow_end, *steady, *slow_start]) == pytest.approx(2.0)


@pytest.mark.slow
@pytest.mark.ray
def test_every_unit_passes_the_pool_once_and_two_at_once_leave_the_device_idle_less() -> None:
    command = [sys.executable, "-m", "bge_ray.bench.scheduling", "3", "2", "8"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    two, one = json.loads(done.stdout.strip().splitlines()[-1])["runs"]
    assert (one["units_at_once"], two["units_at_once"]) == (1, 2)
    for found in (one, two):
        assert found["units"] == 24
        assert 0 < found["busy"] <= 1
        assert found["units_per_s"] <= 3 / 2 + 0.1
    # What one leaves is the share of the host and the handing over of Ray.
    assert one["busy"] < 1 / 1.12
    assert two["busy"] > 0.97
