"""One writer at a time: a lease that its holder renews, beside the plan number that fences.

A run that was killed leaves its lease behind. The next run takes it over at once if the holder ran
on this machine and is gone, or after seeing it unchanged for a while. Should the old holder only
have been out of touch, it finds at its next renewal that the lease is another's, and stops.
"""

import dataclasses
import json
import logging
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from bge_ray.errors import OutputBusyError, StorageError, TakenOverError
from bge_ray.storage.objects import Storage, join

logger = logging.getLogger(__name__)

LEASE = "lease.json"
RENEW_S = 5.0
# A holder that has missed this many renewals is taken for dead.
PATIENCE_RENEWALS = 4


def is_leased(storage: Storage, root: str) -> bool:
    """Tell whether a run holds an output, or was cut off while it did: giving it back is a run's last act."""
    return storage.info(join(root, LEASE)) is not None


class Lease:
    """A context manager that holds ``lease.json`` of an output; see `check` and `lost`."""

    def __init__(self, storage: Storage, root: str, renew_s: float = RENEW_S) -> None:
        # A renewal that is retried for minutes could land on the lease of a newer run.
        self._storage = dataclasses.replace(storage, timeout_s=min(storage.timeout_s, renew_s))
        self._patient = storage
        self._uri, self._renew_s, self._root = join(root, LEASE), renew_s, root
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
        while not self._patient.create(self._uri, self._content()):
            there = self._patient.read_optional(self._uri)
            if there is None:
                continue
            self._wait_until_dead(there)
            if self._patient.read_optional(self._uri) != there:
                continue
            self._patient.write(self._uri, self._content())
            # Two runs may have judged it dead together: the one whose content stays has it.
            time.sleep(min(1.0, self._renew_s))
            if self._is_ours(self._patient):
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
        try:
            if not self.lost.is_set() and self._is_ours(self._storage):
                self._storage.delete([self._uri])
        except StorageError as failure:
            # The work is done or its own error is on the way; the next run sees that this one is gone.
            logger.warning("lease not given back: %s", failure)

    def check(self) -> None:
        """Make sure that this run still owns the output.

        Raises:
            TakenOverError: it does not; nothing more may be written.
        """
        if self.lost.is_set() or not self._is_ours(self._patient):
            self.lost.set()
            raise TakenOverError(
                f"{self._root}: a newer run took this output over while this one was out of touch; "
                "it goes on there"
            )

    def _renew_forever(self) -> None:
        while not self._stop.wait(self._renew_s):
            try:
                if not self._is_ours(self._storage):
                    self.lost.set()
                    return
                self._storage.write(self._uri, self._content())
            except StorageError as error:
                # The store may be back at the next beat; if not, the run's own writes will say so.
                logger.warning("lease not renewed: %s", error)

    def _is_ours(self, storage: Storage) -> bool:
        return _holder(storage.read_optional(self._uri)).get("run_id") == self._run_id

    def _content(self) -> bytes:
        self._beats += 1
        process = psutil.Process()
        holder = {
            "run_id": self._run_id,
            "beat": self._beats,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": process.pid,
            "process_started": process.create_time(),
        }
        return json.dumps(holder, indent=1).encode()

    def _wait_until_dead(self, seen: bytes) -> None:
        """Return once the lease is free or its holder is taken for dead.

        Raises:
            OutputBusyError: it was renewed.
        """
        holder = _holder(seen)
        host = holder.get("host", "an unknown host")
        if holder.get("machine") == _machine() and not _is_alive(holder["pid"], holder["process_started"]):
            return
        deadline = time.monotonic() + PATIENCE_RENEWALS * self._renew_s
        logger.info("%s: held by a run on %s; waiting to see whether it lives", self._root, host)
        while time.monotonic() < deadline:
            time.sleep(self._renew_s / 2)
            now = self._patient.read_optional(self._uri)
            if now is None:
                return
            if now != seen:
                raise OutputBusyError(
                    f"{self._root}: a run on {host} (process {holder.get('pid')}) is writing this output; "
                    "wait for its end, stop it, or choose another output.uri"
                )


def _holder(content: bytes | None) -> dict[str, Any]:
    """Return what a lease says; nothing if there is none or if it is not ours to read."""
    try:
        holder = json.loads(content or b"{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _machine() -> str:
    """Name the place within which a process number means one process: a container has its own numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def _is_alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
