"""A ledger without Ray, for attempts of threads, once `isolation.ray.get` returns what it is given."""

import threading
from types import SimpleNamespace
from typing import Any

from bge_ray.pipeline.engine.isolation import Ledger


class Death(BaseException):
    """The end of a process, for each of its threads."""


class Handle:
    """A ledger as its actor is called, one call at a time, by a process that may be dead by now."""

    def __init__(self, ledger: Ledger | None = None, dead: threading.Event | None = None) -> None:
        self.ledger, self._dead, self._lock = ledger or Ledger(), dead or threading.Event(), threading.Lock()

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            with self._lock:
                if self._dead.is_set():
                    raise Death
                return getattr(self.ledger, name)(*arguments)

        return SimpleNamespace(remote=remote)
