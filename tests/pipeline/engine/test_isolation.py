"""Deaths are counted where they happened, and only rows that die alone, twice, are rejected.

The deaths here are the exits of real Ray workers.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from bge_ray.pipeline.engine.isolation import Attempt, Ledger, run_isolated, running_ledger

pytestmark = pytest.mark.ray


def test_an_attempt_that_never_finished_counts_as_a_death() -> None:
    ledger = Ledger()
    assert ledger.start("unit") == {}
    ledger.announce("unit", "row 3")
    assert ledger.start("unit") == {"row 3": 1}
    assert ledger.start("other") == {}
    ledger.finish("unit")
    assert ledger.start("unit") == {}


def work(ledger: object, poison: set[int], log: str) -> tuple[list[int], dict[int, str]]:
    """Handle 40 rows in pieces of 10; a poisonous row ends the process."""
    done: list[int] = []
    rejected: dict[int, str] = {}

    def run(pieces: list[np.ndarray]) -> None:
        for piece in pieces:
            for row in piece:
                if int(row) in poison:
                    os._exit(1)
            done.extend(int(row) for row in piece)

    with Path(log).open("a") as file:
        file.write("attempt\n")
    pieces = [np.arange(start, start + 10) for start in range(0, 40, 10)]
    with Attempt(ledger, "unit") as attempt:
        run_isolated(attempt, "working", pieces, run, rejected.__setitem__)
    return done, rejected


@pytest.mark.parametrize(
    "poison", [set(), {7}, *(pytest.param(rows, marks=pytest.mark.slow) for rows in ({0, 39}, {11, 12}))]
)
def test_the_rows_that_kill_are_found_and_no_other(
    ray_cluster: None, poison: set[int], tmp_path: Path
) -> None:
    import ray

    task = ray.remote(num_cpus=0.5, max_retries=-1)(work)
    with running_ledger() as ledger:
        done, rejected = ray.get(task.remote(ledger, poison, str(tmp_path / "log")), timeout=120)
    assert set(rejected) == poison
    assert sorted(done) == sorted(set(range(40)) - poison)
    attempts = (tmp_path / "log").read_text().count("attempt")
    assert attempts <= 1 + 4 * len(poison) + 1


def test_a_process_that_is_killed_once_costs_no_row(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    def dies_once(ledger: object, flag: str) -> tuple[list[int], dict[int, str]]:
        first = not Path(flag).exists()
        Path(flag).touch()
        return work(ledger, {5} if first else set(), flag + ".log")

    task = ray.remote(num_cpus=0.5, max_retries=-1)(dies_once)
    with running_ledger() as ledger:
        done, rejected = ray.get(task.remote(ledger, str(tmp_path / "flag")), timeout=60)
    assert (done, rejected) == (list(range(40)), {})
