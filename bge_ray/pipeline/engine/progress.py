"""Tells how far a run is: a live line on a terminal, a log line now and then elsewhere."""

import logging
import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from bge_ray.report.facts import RunFacts

logger = logging.getLogger(__name__)

# The rate shown is that of the last minutes, so that a slow start does not spoil the ETA.
WINDOW_S = 120.0


class Progress:
    """A context manager that reads the run's facts at intervals; it changes nothing."""

    def __init__(self, facts: RunFacts, rows_total: int, log_interval_s: float) -> None:
        self._facts, self._rows_total, self._interval_s = facts, rows_total, log_interval_s
        self._live: Live | None = None
        if sys.stderr.isatty():
            self._live = Live(
                get_renderable=lambda: Text(self.line()), console=Console(stderr=True), transient=True
            )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._log_forever, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._live is not None:
            self._live.stop()
        else:
            self._thread.join()

    def line(self) -> str:
        """Return the state in one line."""
        facts, now = self._facts, time.time()
        recent = [(tokens, rows) for _, end, tokens, rows in facts.timeline[-2000:] if end > now - WINDOW_S]
        since = max(1e-3, now - max(facts.first_encode or now, now - WINDOW_S))
        tokens_per_s = sum(tokens for tokens, _ in recent) / since
        rows_per_s = sum(rows for _, rows in recent) / since
        left = self._rows_total - facts.rows_in
        eta = _clock(left / rows_per_s) if rows_per_s > 0 else "unknown"
        return (
            f"{facts.rows_in:,} of {self._rows_total:,} rows ({facts.rows_rejected:,} rejected), "
            f"{facts.units_done:,} of {facts.units_planned:,} units, {tokens_per_s:,.0f} tokens/s, "
            f"{rows_per_s:,.0f} rows/s on {facts.workers.encoders} encoders, ETA {eta}"
        )

    def _log_forever(self) -> None:
        while not self._stop.wait(self._interval_s):
            logger.info(self.line())


def _clock(seconds: float) -> str:
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}"
