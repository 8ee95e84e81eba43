"""How a command ends: with one last line and one exit code, whatever happens, and in time.

Signals are listened for before anything large is imported. A signal raises where it strikes (or waits for the
next look, see `StopRequest`), but foreign code may swallow what is raised, keep the signal for itself, or
not return to Python for a minute; so a thread learns of every signal from the interpreter itself, and ends
the process when it has not ended in time. The same thread ends a process whose cluster is gone.
"""

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from bge_ray.errors import BgeRayError, StorageAccessError
from bge_ray.logs import LogFormat, configure_logging, formatter
from bge_ray.pipeline.engine.liveness import cluster_gone
from bge_ray.pipeline.engine.stopping import SIGNALS, Stopped, StopRequest

logger = logging.getLogger(__name__)

OUTCOMES = {0: "done", 1: "incomplete", 2: "refused", 75: "busy"}
# A scheduler may kill half a minute after it asked to stop.
STOP_S = 25.0
# What a run may take to tell that its cluster is gone, beside what it took to see that.
LOST_S = 12.0
LOOK_S = 0.5


class Ending:
    """The end of one command in this process."""

    def __init__(self, name: str, log_format: LogFormat) -> None:
        """Take the name that the last line begins with, and its form; nothing is listened for yet."""
        self.name = name
        self.stop = StopRequest()
        self.log_format = log_format
        # What the command ends with, once that is known.
        self.code: int | None = None
        self._line = threading.Lock()
        self._told = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals from here on, in the main thread; what they did before is put back."""
        # Who started this with nohup does not want to lose it to SIGHUP.
        numbers = [n for n in SIGNALS if not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN)]
        listen, tell = os.pipe()
        os.set_blocking(tell, False)
        before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(listen, ended), name="ending", daemon=True)
        watch.start()
        handlers = {number: signal.signal(number, self.stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            ended.set()
            os.write(tell, b"\0")  # which is no signal, and wakes the thread
            watch.join()
            os.close(listen)
            os.close(tell)

    def configure(self, log_format: LogFormat) -> None:
        """Send the log's lines to standard error in one form, the last one, too."""
        self.log_format = log_format
        configure_logging(log_format)

    def run(self, work: Callable[[], str], place: Callable[[], str | None]) -> int:
        """Do a command's work, leave Ray, and log the last line.

        Args:
            work: returns what to print as the answer of the command; nothing, if it printed it.
            place: where the report of a run that is done lies; None if it has none.

        Returns:
            0 done, 1 incomplete, 2 refused, 75 busy (`bge_ray.errors`), 128 + signal if stopped.
        """
        try:
            if answer := work():
                print(answer, flush=True)  # noqa: T201 - the answer of the command
        except (Stopped, SystemExit, KeyboardInterrupt, Exception) as error:  # noqa: BLE001
            return self.conclude(error)
        return self.conclude(None, place)

    def conclude(self, error: BaseException | None, place: Callable[[], str | None] = lambda: None) -> int:
        """Leave Ray and log the last line; returns the exit code for what ended the work, or 0 for None."""
        with self.stop.deferred():
            if not logging.getLogger().handlers:
                self.configure(self.log_format)
            self.code = code = self._code_of(error)
            _leave_ray(keep_logs=code != 0)
            if code > 128:  # a Ray that was about to start is not left, and its processes are there
                _kill_started()
            wrote = not isinstance(error, BgeRayError) or isinstance(error, StorageAccessError)
            self._tell(code, place(), wrote=wrote)
        return code

    def refuse(self) -> int:
        """Log the last line of a command whose arguments are wrong, which it has said; returns 2."""
        self.configure(self.log_format)
        self.code = 2
        self._tell(self.code, None, wrote=False)
        return self.code

    def tell(self, text: str) -> None:
        """Log a line about this command."""
        logger.info("%s: %s", self.name, text)

    def _code_of(self, error: BaseException | None) -> int:
        """Log what ended the work, and return the exit code for it."""
        if error is None:
            return 0
        if isinstance(error, BgeRayError):
            logger.error("%s: %s", self.name, error)
            return error.exit_code
        # What a signal raises may be lost in foreign code, as in Ray's, which then raises something else.
        if (stopped := self._stopped(error)) is not None:
            logger.warning("%s: stopped by %s; run it again to continue", self.name, stopped)
            return stopped.exit_code
        logger.error("%s: an error that no one foresaw", self.name, exc_info=error)
        return 1

    def _stopped(self, error: BaseException) -> Stopped | None:
        if isinstance(error, SystemExit):
            # A handler of Ray's raised it, before the thread that looks for signals came to look.
            time.sleep(LOOK_S)
        return self.stop.pending()

    def _tell(self, code: int, place: str | None, *, wrote: bool) -> None:
        """Log the last line, once."""
        with self._line:
            if self._told:
                return
            self._told = True
            logger.info("%s", self._last_line(code, place, wrote=wrote))

    def _last_line(self, code: int, place: str | None, *, wrote: bool) -> str:
        outcome = OUTCOMES.get(code, "stopped")
        # A run that failed tells of a report only if it wrote one: an older one is of another run.
        told = place if code == 0 else _report_written()
        if code in (2, 75) and not told and not wrote:
            outcome += ", nothing was written"
        return f"{self.name}: {outcome}; exit code {code}" + (f"; report at {told}" if told else "")

    def _watch(self, listen: int, ended: threading.Event) -> None:
        deadline, code, why = None, 1, ""
        while not ended.is_set():
            if select.select([listen], [], [], LOOK_S)[0]:
                for number in os.read(listen, 64):
                    if number in SIGNALS:
                        self.stop.note(number)
            stopped = self.stop.pending()
            if deadline is None and stopped is not None:
                deadline, code, why = time.monotonic() + STOP_S, stopped.exit_code, f"stopped by {stopped}"
            elif deadline is None and (gone := cluster_gone()) is not None:
                deadline, why = time.monotonic() + LOST_S, gone
            if deadline is not None and time.monotonic() > deadline:
                self._end_now(code, why)

    def _end_now(self, code: int, why: str) -> None:
        """End the process from beside the thread that does not come to it."""
        if self.code is not None:
            code = self.code
        # Not by the logger: the thread that hangs may hold its lock.
        if self._line.acquire(timeout=1) and not self._told:
            line = formatter(self.log_format)
            for text in (
                f"{self.name}: {why}; what it was at has not ended in time; run it again to continue",
                self._last_line(code, None, wrote=True),
            ):
                record = logging.LogRecord(logger.name, logging.INFO, __file__, 0, text, (), None)
                os.write(2, line.format(record).encode() + b"\n")
        _kill_started()
        os._exit(code)


def _leave_ray(*, keep_logs: bool) -> None:
    # Where it was not imported there is nothing to leave, and importing it takes a second.
    if (cluster := sys.modules.get("bge_ray.pipeline.engine.cluster")) is not None:
        cluster.disconnect(keep_logs=keep_logs)


def _report_written() -> str | None:
    reports = sys.modules.get("bge_ray.storage.reports")
    return None if reports is None else reports.last_report()


def _kill_started() -> None:
    psutil = sys.modules.get("psutil")
    if psutil is None:  # and nothing of ours was started
        return
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
