"""Finds the row that kills its process, and leaves every other row alone.

Ray starts a killed worker again and repeats its task without limit, and cannot say what the worker
was at. So each attempt registers with a `Ledger`, an actor that outlives the workers. The first
attempt runs at full speed. After a death the same pieces run one by one, each announced first; a
piece announced at two deaths runs row by row; a row announced at two deaths is rejected. Two,
because a spot machine may vanish while an innocent row is at work.

Where several tasks share a process (see `Room`), its death says nothing about any one of them. It is held
against none; each of them is alone in its process from then on, and only what dies alone is counted. A task
is in company in its first attempt at most, and while it waits for a process of its own, so there is an end
to deaths that nobody is blamed for.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import ray
from ray.actor import ActorHandle

from bge_ray.pipeline.engine.room import Room
from bge_ray.records.ids import IdArray

LETHAL_DEATHS = 2
NOWHERE = "before the first announcement"
# Where others are, or may be, in the process, or one waits to be alone in it: a death here is nobody's.
IN_COMPANY = "in company"


class Ledger:
    """Counts, for each task key, how often its process died and at which announced place."""

    def __init__(self) -> None:
        self._at: dict[str, str] = {}
        self._deaths: dict[str, Counter[str]] = {}

    def start(self, key: str, place: str = NOWHERE) -> dict[str, int]:
        """Begin an attempt at a place; one that began earlier and never finished counts as a death.

        Returns:
            The deaths so far, by place.
        """
        if key in self._at:
            self._deaths.setdefault(key, Counter())[self._at[key]] += 1
        self._at[key] = place
        return dict(self._deaths.get(key, {}))

    def announce(self, key: str, place: str) -> None:
        """Note what the attempt is about to do."""
        self._at[key] = place

    def finish(self, key: str) -> None:
        """End an attempt that survived, and forget the task."""
        self._at.pop(key, None)
        self._deaths.pop(key, None)


@contextlib.contextmanager
def running_ledger() -> Iterator[ActorHandle]:
    """Run a ledger while the context lasts; it costs no CPU and comes back if its process is killed."""
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    handle: ActorHandle = ray.remote(**options)(Ledger).remote()
    try:
        yield handle
    finally:
        ray.kill(handle)


class Attempt:
    """One attempt at one task, as a context manager: leaving it without an exception finishes it."""

    def __init__(self, ledger: ActorHandle, key: str, room: Room | None = None) -> None:
        """Name the task.

        Args:
            ledger: where it is registered.
            key: of the task.
            room: of a process that other tasks may be in at the same time; None where there are none.
        """
        self._ledger, self._key, self._room = ledger, key, room
        self.deaths: dict[str, int] = {}

    def __enter__(self) -> "Attempt":
        if self._room is None:
            self.deaths = ray.get(self._ledger.start.remote(self._key))
            return self
        self.deaths = ray.get(self._ledger.start.remote(self._key, IN_COMPANY))
        self._room.enter(alone=self.careful)
        # Not before the others have left: they may still take this process down.
        self.announce(NOWHERE)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                ray.get(self._ledger.finish.remote(self._key))
        finally:
            # Not before the ledger knows: whoever comes in next may take this process down.
            if self._room is not None:
                self._room.leave()

    @property
    def careful(self) -> bool:
        """Whether an earlier attempt died, so that places are announced."""
        return bool(self.deaths)

    @property
    def total_deaths(self) -> int:
        """How often this task took its process down; deaths in company may have been another's."""
        return sum(deaths for place, deaths in self.deaths.items() if place != IN_COMPANY)

    def announce(self, place: str) -> int:
        """Say what comes next, if earlier attempts died; return the deaths known at that place."""
        if self.careful:
            ray.get(self._ledger.announce.remote(self._key, place))
        return self.deaths.get(place, 0)


def run_isolated(
    attempt: Attempt,
    prefix: str,
    pieces: Sequence[IdArray],
    run: Callable[[Sequence[IdArray]], None],
    reject: Callable[[int, str], None],
) -> None:
    """Run pieces of rows so that a row that kills the process ends up rejected.

    Args:
        attempt: the attempt this is part of.
        prefix: makes the places of this call distinct within the attempt.
        pieces: row numbers; the same in every attempt, so that results do not depend on deaths.
        run: does some pieces; called once with all of them as long as nothing died.
        reject: told (row, detail) for a row that is not run.
    """
    if not attempt.careful:
        run(pieces)
        return
    for number, piece in enumerate(pieces):
        if attempt.announce(f"{prefix} piece {number}") < LETHAL_DEATHS:
            run([piece])
            continue
        for row in piece:
            deaths = attempt.announce(f"{prefix} row {row}")
            if deaths < LETHAL_DEATHS:
                run([np.asarray([row], dtype=np.int64)])
            else:
                reject(int(row), f"killed its worker process {deaths} times while alone in it ({prefix})")
