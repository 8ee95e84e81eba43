"""Who is blamed when a process dies with several units in it: nobody, then whoever dies alone.

The processes here are threads that share a room and a ledger, and all of them end when one takes a
poisonous row: quick, and in every order. Real processes die in test_overlap.py.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bge_ray.pipeline.engine import isolation
from bge_ray.pipeline.engine.isolation import IN_COMPANY, NOWHERE, Attempt, Ledger, run_isolated
from bge_ray.pipeline.engine.room import Room
from tests.support.ledgers import Death, Handle

ROWS, PIECE = 24, 6
MAX_PROCESSES = 60


@pytest.fixture(autouse=True)
def _calls_are_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.ray, "get", lambda value: value)


class Process:
    """Units in threads; a kill ends all of them at their next step."""

    def __init__(self, ledger: Ledger, poison: set[tuple[int, int]]) -> None:
        self._poison = poison
        self._room, self._dead = Room(), threading.Event()
        self._handle = Handle(ledger, self._dead)

    def kill(self) -> None:
        self._dead.set()

    def work(self, unit: int, pauses: random.Random) -> tuple[int, list[int], dict[int, str]] | None:
        """Return (unit, rows done, rows rejected), None if the process ended before."""
        done: list[int] = []
        rejected: dict[int, str] = {}

        def run(pieces: Sequence[np.ndarray]) -> None:
            for row in np.concatenate(pieces).tolist():
                time.sleep(pauses.random() * 2e-4)
                if (unit, row) in self._poison:
                    self._dead.set()
                if self._dead.is_set():
                    raise Death
                done.append(row)

        pieces = [np.arange(start, start + PIECE) for start in range(0, ROWS, PIECE)]
        try:
            with Attempt(self._handle, f"unit {unit}", self._room) as attempt:
                assert attempt.total_deaths < 24, "a unit would be given up"
                run_isolated(attempt, "encode", pieces, run, rejected.__setitem__)
        except Death:
            return None
        return unit, done, rejected


def run_units(
    units: int, poison: set[tuple[int, int]], seed: int, kills: int = 0
) -> tuple[dict[int, tuple[list[int], dict[int, str]]], int]:
    """Run units two at a time in processes that follow each other; returns what became of each."""
    random_ = random.Random(seed)
    ledger = Ledger()
    found: dict[int, tuple[list[int], dict[int, str]]] = {}
    for number in range(MAX_PROCESSES):
        left = [unit for unit in range(units) if unit not in found]
        if not left:
            assert ledger._at == ledger._deaths == {}
            return found, number
        random_.shuffle(left)
        process = Process(ledger, poison)
        if number < kills:
            threading.Timer(0.003, process.kill).start()
        with ThreadPoolExecutor(2) as pool:
            for result in pool.map(process.work, left, [random_] * len(left)):
                if result is not None:
                    found[result[0]] = result[1:]
    raise AssertionError(f"no end after {MAX_PROCESSES} processes")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "poison", [set(), {(0, 7)}, {(1, 0), (2, ROWS - 1)}, {(0, 3), (0, 4), (3, 3)}], ids=str
)
def test_the_guilty_rows_are_rejected_and_no_other(poison: set[tuple[int, int]], seed: int) -> None:
    found, processes = run_units(5, poison, seed)
    for unit, (done, rejected) in found.items():
        guilty = {row for of, row in poison if of == unit}
        assert set(rejected) == guilty
        assert sorted(done) == sorted(set(range(ROWS)) - guilty)
    assert processes <= 2 + 5 * len(poison)


@pytest.mark.parametrize("seed", range(3))
def test_kills_from_outside_are_held_against_nobody(seed: int) -> None:
    found, _ = run_units(4, set(), seed, kills=1)
    assert {unit: (len(done), rejected) for unit, (done, rejected) in found.items()} == dict.fromkeys(
        range(4), (ROWS, {})
    )


def test_a_death_in_company_makes_each_go_alone_and_blames_none() -> None:
    handle = Handle()
    for key in ("guilty", "innocent"):
        handle.start.remote(key, IN_COMPANY)
    with Attempt(handle, "innocent", Room()) as attempt:
        assert attempt.deaths == {IN_COMPANY: 1}
        assert attempt.careful
        assert attempt.total_deaths == 0
        assert handle.ledger._at["innocent"] == NOWHERE
    assert handle.ledger.start("innocent") == {}, "and that it survived is the end of it"
    assert handle.ledger.start("guilty") == {IN_COMPANY: 1}
    assert handle.ledger.start("guilty") == {IN_COMPANY: 1, NOWHERE: 1}


def test_who_waits_to_be_alone_is_not_blamed_for_the_death_of_who_is() -> None:
    handle, room = Handle(), Room()
    for key in ("guilty", "innocent"):
        handle.start.remote(key, IN_COMPANY)
    guilty = Attempt(handle, "guilty", room).__enter__()
    waiting = threading.Thread(target=Attempt(handle, "innocent", room).__enter__, daemon=True)
    waiting.start()
    while not room._wanting:
        time.sleep(0.001)
    guilty.announce("row 3")
    deaths = {key: Counter(handle.ledger.start(key, IN_COMPANY)) for key in ("guilty", "innocent")}
    assert deaths == {"guilty": Counter({IN_COMPANY: 1, "row 3": 1}), "innocent": Counter({IN_COMPANY: 2})}
    room.leave()
    waiting.join(10)


def test_of_a_task_that_has_its_process_to_itself_every_death_counts() -> None:
    handle = Handle()
    Attempt(handle, "read").__enter__()
    with Attempt(handle, "read") as attempt:
        assert (attempt.deaths, attempt.total_deaths) == ({NOWHERE: 1}, 1)
