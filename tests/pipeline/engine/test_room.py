"""Several in a room, or one alone; and how long nobody was there."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bge_ray.pipeline.engine.room import Presence, Room

SOON_S = 10.0


def test_several_are_inside_at_once() -> None:
    room, both = Room(), threading.Barrier(2, timeout=SOON_S)

    def visit() -> None:
        room.enter(alone=False)
        both.wait()
        room.leave()

    with ThreadPoolExecutor(2) as pool:
        for visitor in [pool.submit(visit), pool.submit(visit)]:
            visitor.result(SOON_S)


def test_who_is_alone_has_nobody_beside_and_everybody_comes_in() -> None:
    room, lock = Room(), threading.Lock()
    inside: list[bool] = []
    wrong: list[list[bool]] = []

    def visit(number: int) -> int:
        alone = number % 3 == 0
        room.enter(alone=alone)
        with lock:
            inside.append(alone)
            if len(inside) > 1 and any(inside):
                wrong.append(list(inside))
        time.sleep(0.001)
        with lock:
            inside.remove(alone)
        room.leave()
        return number

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(visit, range(200), timeout=60)) == list(range(200))
    assert not wrong


def test_nobody_comes_in_before_one_who_waits_to_be_alone() -> None:
    room, order = Room(), []
    room.enter(alone=False)

    def visit(name: str, alone: bool) -> None:
        room.enter(alone=alone)
        order.append(name)
        room.leave()

    first = threading.Thread(target=visit, args=("alone", True))
    first.start()
    while not room._wanting:
        time.sleep(0.001)
    second = threading.Thread(target=visit, args=("beside", False))
    second.start()
    time.sleep(0.05)
    assert order == []
    room.leave()
    for thread in (first, second):
        thread.join(SOON_S)
    assert order == ["alone", "beside"]


def test_a_process_waits_only_while_no_unit_is_there() -> None:
    presence = Presence()
    with presence.unit() as before_the_first:
        assert before_the_first == 0.0
        time.sleep(0.05)
        with presence.unit() as beside:
            assert beside == 0.0
    time.sleep(0.05)
    with presence.unit() as after, presence.unit() as at_once:
        assert 0.05 <= after < SOON_S
        assert at_once == 0.0


def test_a_unit_that_fails_leaves() -> None:
    presence = Presence()
    with pytest.raises(KeyError), presence.unit():
        raise KeyError("no")
    time.sleep(0.01)
    with presence.unit() as waited:
        assert waited >= 0.01
