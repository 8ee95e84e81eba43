"""One writer at a time: a lease that its holder renews, beside the plan number that fences.

A run that was killed leaves its lease behind. The next run takes it over at once if the holder ran
on this machine and is gone, or after seeing it unchanged for a while. Should the old holder only
have been out of touch, it finds at its next renewal that the lease is another's, and stops.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from types import TracebackType

import psutil

from bge_ray.errors import OutputBusyError, StorageError, TakenOverError
from bge_ray.io.storage import Storage, join

logger = logging.getLogger(__name__)

RENEW_S = 5.0
# A holder that has missed this many renewals is taken for dead.
PATIENCE_RENEWALS = 4


class Lease:
    """A context manager that holds ``lease.json`` of an output; see `check` and `lost`."""

    def __init__(self, storage: Storage, root: str, renew_s: float = RENEW_S) -> None:
        self._storage, self._uri, self._renew_s = storage, join(root, "lease.json"), renew_s
        self._root = root
        self._run_id = uuid.uuid4().hex
        self._beats = 0
        self._stop = threading.Event()
        self.lost = threading.Event()
        self._thread = threading.Thread(target=self._renew_forever, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Take the lease.

        Raises:
            OutputBusyError: a live run holds it.
        """
        while not self._storage.create(self._uri, self._content()):
            there = self._storage.read_optional(self._uri)
            if there is None:
                continue
            self._wait_until_dead(there)
            self._storage.write(self._uri, self._content())
            # Two runs may have judged it dead together: the one whose content stays has it.
            time.sleep(min(1.0, self._renew_s))
            if self._owner(self._storage.read_optional(self._uri)) == self._run_id:
                break
            raise OutputBusyError(f"{self._root}: another run took the output over at the same moment")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lease back, unless it is another's by now."""
        self._stop.set()
        self._thread.join()
        if not self.lost.is_set() and self._owner(self._storage.read_optional(self._uri)) == self._run_id:
            self._storage.delete([self._uri])

    def check(self) -> None:
        """Make sure that this run still owns the output.

        Raises:
            TakenOverError: it does not; nothing more may be written.
        """
        if self.lost.is_set() or self._owner(self._storage.read_optional(self._uri)) != self._run_id:
            raise TakenOverError(
                f"{self._root}: a newer run took this output over while this one was out of touch; it goes on there"
            )

    def _renew_forever(self) -> None:
        while not self._stop.wait(self._renew_s):
            try:
                if self._owner(self._storage.read_optional(self._uri)) != self._run_id:
                    self.lost.set()
                    return
                self._storage.write(self._uri, self._content())
            except StorageError as error:
                # The store may be back at the next beat; if not, the run's own writes will say so.
                logger.warning("lease not renewed: %s", error)

    def _content(self) -> bytes:
        self._beats += 1
        process = psutil.Process()
        holder = {
            "run_id": self._run_id,
            "beat": self._beats,
            "host": socket.gethostname(),
            "pid": process.pid,
            "process_started": process.create_time(),
        }
        return json.dumps(holder, indent=1).encode()

    @staticmethod
    def _owner(content: bytes | None) -> str | None:
        return None if content is None else json.loads(content)["run_id"]

    def _wait_until_dead(self, seen: bytes) -> None:
        holder = json.loads(seen)
        if holder["host"] == socket.gethostname() and not _is_alive(holder["pid"], holder["process_started"]):
            return
        deadline = time.monotonic() + PATIENCE_RENEWALS * self._renew_s
        logger.info("%s: held by a run on %s; waiting to see whether it lives", self._root, holder["host"])
        while time.monotonic() < deadline:
            time.sleep(self._renew_s / 2)
            now = self._storage.read_optional(self._uri)
            if now is None:
                return
            if now != seen:
                raise OutputBusyError(
                    f"{self._root}: a run on {holder['host']} (process {holder['pid']}) is writing this output; "
                    "wait for its end, stop it, or choose another output.uri"
                )


def _is_alive(pid: int, started: float) -> bool:
    if pid == os.getpid():
        return True
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1.0
    except psutil.NoSuchProcess:
        return False
