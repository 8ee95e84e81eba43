"""One writer at a time: a lease that its holder renews, beside the plan number that fences.

A run that was killed leaves its lease behind. The next run takes it over at once if the holder ran
on this machine and is gone, or after seeing it unchanged for a while. Should the old holder only
have been out of touch, it finds at its next renewal that the lease is another's, and stops. Whatever it
does to the lease, it does on condition that the lease is still the one it looked at.
"""

import contextlib
import dataclasses
import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import psutil

from bge_ray.errors import OutputBusyError, OutputCollisionError, StorageError, TakenOverError
from bge_ray.records.canonical import from_json, to_json
from bge_ray.storage.folders import place
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import JOURNAL

logger = logging.getLogger(__name__)

LEASE = "lease.json"
RENEW_S = 5.0
# What every lease begins with.
_HEAD = b'{\n "beat": '
# A holder that has missed this many renewals is taken for dead.
PATIENCE_RENEWALS = 4


@dataclasses.dataclass(frozen=True)
class _Holder:
    """Who writes an output: a run, and the process that it is; ``beat`` counts the renewals."""

    beat: int
    host: str
    machine: str
    pid: int
    process_started: float
    run_id: str


def refuse_foreign_lease(storage: Storage, root: str) -> None:
    """Refuse an output where a file that is no lease has the name of one; reads only.

    Raises:
        OutputCollisionError: it does.
    """
    content = storage.read_optional(join(root, LEASE))
    if content is None or _holder(content) is not None:
        return
    # A disk that lost its power keeps a file of ours empty, or the beginning of it. Of an empty file, or of
    # one brace, only the folder tells whose it is.
    cut = content.rstrip(b"\0")
    if _HEAD.startswith(cut[: len(_HEAD)]) and storage.info(join(root, JOURNAL)) is not None:
        return
    raise OutputCollisionError(
        f"{join(root, LEASE)}: is in the way and is no lease of this project; move it away, or choose "
        "another folder"
    )


def is_leased(storage: Storage, root: str) -> bool:
    """Tell whether a run holds an output, or was cut off while it did: giving it back is a run's last act."""
    return storage.info(join(root, LEASE)) is not None


def holder_of(storage: Storage, root: str) -> str | None:
    """Return a name for the run that holds an output; None if none does."""
    holder = _holder(storage.read_optional(join(root, LEASE)))
    return holder.run_id if holder is not None else None


class Lease:
    """A context manager that holds ``lease.json`` of an output; see `check` and `lost`.

    ``lost`` is set once a renewal has found that the output is another run's; several leases may share it.
    """

    def __init__(
        self, storage: Storage, root: str, renew_s: float = RENEW_S, lost: threading.Event | None = None
    ) -> None:
        # A renewal that is retried for minutes keeps the next beat waiting.
        self._storage = dataclasses.replace(storage, timeout_s=min(storage.timeout_s, renew_s))
        self._patient = storage
        self._uri, self._renew_s, self._root = join(root, LEASE), renew_s, root
        self._run_id = uuid.uuid4().hex
        self._beats = 0
        self._stop = threading.Event()
        self.lost = lost or threading.Event()
        self._thread = threading.Thread(target=self._renew_forever, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Take the lease.

        Raises:
            OutputBusyError: a live run holds it.
            OutputCollisionError: what has its name is no lease.
        """
        while not self._patient.create(self._uri, self._content()):
            # The etag is older than the content, so it is the content's own if it still holds at the end.
            info = self._patient.info(self._uri)
            there = self._patient.read_optional(self._uri)
            if info is None or there is None:
                continue
            refuse_foreign_lease(self._patient, self._root)
            self._wait_until_dead(there)
            # A server may ignore conditions, so what one would say is looked at as well, before and after.
            if self._patient.read_optional(self._uri) != there:
                continue
            if not self._patient.replace(self._uri, self._content(), info.etag):
                continue
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
            info = self._storage.info(self._uri)
            if info is not None and self._is_ours(self._storage):
                self._storage.delete_seen(self._uri, info.etag)
        except StorageError as failure:
            # The work is done or its own error is on the way; the next run sees that this one is gone.
            logger.warning("lease not given back: %s", failure)

    def check(self) -> None:
        """Make sure that this run still owns the output.

        Raises:
            TakenOverError: it does not; nothing more may be written.
        """
        if not self._is_ours(self._patient):
            self.lost.set()
            raise TakenOverError(
                f"{self._root}: a newer run took this output over while this one was out of touch; "
                "it goes on there"
            )

    def _renew_forever(self) -> None:
        while not self._stop.wait(self._renew_s):
            try:
                if not self._renew():
                    self.lost.set()
                    return
            except StorageError as error:
                # The store may be back at the next beat; if not, the run's own writes will say so.
                logger.warning("lease not renewed: %s", error)

    def _renew(self) -> bool:
        """Write the next beat over the last one; False if the lease is another's."""
        info = self._storage.info(self._uri)
        if info is None or not self._is_ours(self._storage):
            return False
        return self._storage.replace(self._uri, self._content(), info.etag) or self._is_ours(self._storage)

    def _is_ours(self, storage: Storage) -> bool:
        holder = _holder(storage.read_optional(self._uri))
        return holder is not None and holder.run_id == self._run_id

    def _content(self) -> bytes:
        self._beats += 1
        process = psutil.Process()
        holder = _Holder(
            beat=self._beats,
            host=socket.gethostname(),
            machine=_machine(),
            pid=process.pid,
            process_started=process.create_time(),
            run_id=self._run_id,
        )
        return to_json(holder)

    def _wait_until_dead(self, seen: bytes) -> None:
        """Return once the lease is free or its holder is taken for dead.

        Raises:
            OutputBusyError: it was renewed.
        """
        holder = _holder(seen)
        host = holder.host if holder is not None else "an unknown host"
        pid = holder.pid if holder is not None else "unknown"
        if (
            holder is not None
            and holder.machine == _machine()
            and not _is_alive(holder.pid, holder.process_started)
        ):
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
                    f"{self._root}: a run on {host} (process {pid}) is writing this output; "
                    "wait for its end, stop it, or choose another folder"
                )


class Leases:
    """A context manager that holds the leases of all folders a job writes, or of none.

    All jobs take them in one order, so that of two with common folders one gets all and the other none.
    """

    def __init__(self, storage: Storage, folders: Iterable[str], renew_s: float = RENEW_S) -> None:
        once = {place(folder): folder for folder in folders}
        self.lost = threading.Event()
        self._leases = [Lease(storage, once[key], renew_s, self.lost) for key in sorted(once)]
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Leases":
        """Take all leases.

        Raises:
            OutputBusyError: a live run holds one of them; those taken before it are given back.
        """
        with contextlib.ExitStack() as taken:
            for lease in self._leases:
                taken.enter_context(lease)
            self._held = taken.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give back those that are still this run's."""
        self._held.__exit__(kind, error, trace)

    def check(self) -> None:
        """Make sure that this run still owns every folder.

        Raises:
            TakenOverError: names one that it does not own; nothing more may be written to any of them.
        """
        for lease in self._leases:
            lease.check()


def _holder(content: bytes | None) -> _Holder | None:
    """Return what a lease says; None if there is none, or it is cut off or none of ours."""
    try:
        return from_json(_Holder, content or b"")
    except ValueError:
        return None


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
