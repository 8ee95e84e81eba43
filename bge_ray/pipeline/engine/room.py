"""What the units inside one process know of each other: who may be there at once, and when nobody was."""

import contextlib
import threading
import time
from collections.abc import Iterator


class Room:
    """Lets several in together, or one alone; safe for threads.

    One that wants to be alone waits until all have left, and nobody is let in before it. So nobody waits for
    ever: whoever is inside leaves without waiting for anybody outside.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._wanting = 0
        self._alone = False

    def enter(self, *, alone: bool) -> None:
        """Wait until there is room, and take it."""
        with self._changed:
            if alone:
                self._wanting += 1
                self._changed.wait_for(lambda: self._inside == 0)
                self._wanting -= 1
            else:
                self._changed.wait_for(lambda: not self._alone and not self._wanting)
            self._inside += 1
            self._alone = alone

    def leave(self) -> None:
        """Make room for others."""
        with self._changed:
            self._inside -= 1
            self._alone = False
            self._changed.notify_all()


class Presence:
    """Notes how long a process had no unit at all; safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._units = 0
        self._empty_since: float | None = None

    @contextlib.contextmanager
    def unit(self) -> Iterator[float]:
        """Be there with a unit; gives the seconds without any before it.

        The first unit of a process is waited for while the run starts, no fault of the stages before.
        """
        with self._lock:
            since, self._empty_since = self._empty_since, None
            self._units += 1
        try:
            yield 0.0 if since is None else time.monotonic() - since
        finally:
            with self._lock:
                self._units -= 1
                if not self._units:
                    self._empty_since = time.monotonic()
