"""Stopping on request: a signal, a cluster that is gone, or a lost lease ends a run between two receipts.

A command listens for signals before it imports anything large, so this module imports nothing that is.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from bge_ray.pipeline.engine.liveness import check_cluster

if TYPE_CHECKING:
    from bge_ray.storage.lease import Leases

POLL_S = 0.2
# What a scheduler, a terminal and a lost connection send to end a process.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the job to stop; not an Exception, so that nothing takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class StopRequest:
    """A signal handler that raises at once, or, while `deferred`, only when `check` is called.

    An exception raised by a handler is lost if it happens to strike inside a destructor, and Ray
    runs many of those; so while a run holds the output, the request is noted and polled for.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._deferred = False

    def __call__(self, number: int, _: FrameType | None = None) -> None:
        """Take note of a signal."""
        self.note(number)
        if not self._deferred:
            raise Stopped(number)

    def note(self, number: int) -> None:
        """Take note of a signal that a handler of others may keep for itself; the first one counts."""
        if self._number is None:
            self._number = number

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait for `check`; a job within a job leaves it as it was."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if (stopped := self.pending()) is not None:
            raise stopped

    def pending(self) -> Stopped | None:
        """Return what `check` raises, or None if no signal came."""
        return None if self._number is None else Stopped(self._number)


def make_watch(leases: "Leases", stop: StopRequest) -> Callable[[], None]:
    """Return what is asked between receipts: are the outputs still ours, and may we go on?"""

    def watch() -> None:
        stop.check()
        check_cluster()
        if leases.lost.is_set():
            leases.check()

    return watch
