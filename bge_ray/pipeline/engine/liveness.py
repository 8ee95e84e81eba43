"""Is the cluster still there? Ray waits for one that is gone: for ever, or a minute, and ends the process.

Imports nothing large, because a command asks at its end whether this is what it ended of.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bge_ray.errors import IncompleteRunError

LOOK_EVERY_S = 2.0
# What a process that is busy may be out of reach.
LOST_AFTER_S = 10.0
CONNECT_S = 2.0


@dataclass
class _Watched:
    """The cluster that this process has joined; Ray knows of one only."""

    gone: str | None = None
    ended: threading.Event = field(default_factory=threading.Event)


_watched: list[_Watched] = []


def watch_cluster(doors: dict[str, Callable[[], socket.socket]]) -> None:
    """Look from now on whether the cluster's processes still answer, in a thread.

    Args:
        doors: connects to each process that the cluster cannot be without, by its name.
    """
    unwatch_cluster()
    watched = _Watched()
    _watched.append(watched)
    threading.Thread(target=_look, args=(watched, doors), name="cluster", daemon=True).start()


def unwatch_cluster() -> None:
    """Look no more: this process is about to leave."""
    for watched in _watched:
        watched.ended.set()
    _watched.clear()


def cluster_gone() -> str | None:
    """Return what does not answer any more, or None while the cluster is there, or none was joined."""
    return _watched[0].gone if _watched else None


def check_cluster() -> None:
    """Raise if the cluster is gone.

    Raises:
        IncompleteRunError: it is.
    """
    if (gone := cluster_gone()) is not None:
        raise IncompleteRunError(gone)


def answers(connect: Callable[[], socket.socket]) -> bool:
    """Tell whether a process takes connections."""
    try:
        connect().close()
    except OSError:
        return False
    return True


def tcp_door(address: str) -> Callable[[], socket.socket]:
    """Return what connects to ``host:port``."""
    host, _, port = address.rpartition(":")
    return lambda: socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S)


def _look(watched: _Watched, doors: dict[str, Callable[[], socket.socket]]) -> None:
    seen = dict.fromkeys(doors, time.monotonic())
    while not watched.ended.wait(LOOK_EVERY_S):
        for name, connect in doors.items():
            if answers(connect):
                seen[name] = time.monotonic()
        for name in _silent(seen):
            watched.gone = f"the Ray cluster is gone: its {name} has not answered for {LOST_AFTER_S:.0f} s"
            return


def _silent(seen: dict[str, float]) -> Iterator[str]:
    now = time.monotonic()
    return (name for name, last in seen.items() if now - last > LOST_AFTER_S)
