"""Tells how far a run is: a live line on a terminal, a log line now and then elsewhere.

A line is made of parts, the most important first; a terminal that is too narrow drops the last ones, so
that it never wraps. `Progress` shows any line, `work_line` is that of a run by its facts, and
`Step` that of anything that is counted, also where nobody knows how much there will be.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TextIO, TypeVar

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.text import Text

from bge_ray.report.facts import RunFacts
from bge_ray.report.words import clock, short

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The rate shown is that of the last minutes, so that a slow start does not spoil the ETA.
WINDOW_S = 120.0
WINDOW_UNITS = 2000
SEPARATOR = ", "


def fit(parts: Sequence[str], width: int) -> str:
    """Return as many leading parts as fit a width, in cells of a terminal; the first is cut if it must be."""
    line = parts[0]
    if cell_len(line) > width:
        return set_cell_size(line, max(0, width - 1)) + "…" if width > 0 else ""
    for part in parts[1:]:
        longer = f"{line}{SEPARATOR}{part}"
        if cell_len(longer) > width:
            break
        line = longer
    return line


class Progress:
    """A context manager that tells a line at intervals; it changes nothing."""

    def __init__(
        self, parts: Callable[[], Sequence[str]], log_interval_s: float, console: Console | None = None
    ) -> None:
        """Prepare to tell.

        Args:
            parts: makes the line, most important part first.
            log_interval_s: between log lines, where the console is no terminal.
            console: where a live line would stand; standard error if None.
        """
        self._parts, self._interval_s = parts, log_interval_s
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._moved: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._log_forever, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        if not self._console.is_terminal:
            self._thread.start()
            return self
        self._live = Live(
            get_renderable=self._rendered, console=self._console, transient=True, vertical_overflow="crop"
        )
        before = sys.stderr
        self._live.start()
        # Log lines would otherwise begin at the end of the live line, and leave it standing.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                self._moved.append((handler, before))
                handler.setStream(sys.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._live is None:
            self._thread.join()
            return
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._live.stop()

    def _rendered(self) -> Text:
        return Text(fit(self._parts(), self._console.width), no_wrap=True, overflow="crop")

    def _log_forever(self) -> None:
        while not self._stop.wait(self._interval_s):
            logger.info("%s", SEPARATOR.join(self._parts()))


def work_line(facts: RunFacts, rows: str) -> list[str]:
    """Return the state of a run, most important part first.

    Args:
        facts: what was booked.
        rows: what a row is, in the plural: passages, queries, pairs.
    """
    now = time.time()
    recent = [unit for unit in facts.timeline[-WINDOW_UNITS:] if unit.ended > now - WINDOW_S]
    since = max(1e-3, now - max(facts.first_work or now, now - WINDOW_S))
    rows_per_s = sum(unit.rows for unit in recent) / since
    tokens_per_s = sum(unit.tokens for unit in recent) / since
    eta = clock((facts.rows_planned - facts.rows_in) / rows_per_s) if rows_per_s > 0 else "unknown"
    parts = [
        f"{short(facts.rows_in)} of {short(facts.rows_planned)} {rows}",
        f"ETA {eta}",
        f"{short(rows_per_s)} {rows}/s",
    ]
    if facts.workers.models:
        computed = sum(unit.device_s * _inside(unit.began, unit.ended, now - WINDOW_S) for unit in recent)
        busy = min(1.0, computed / since / facts.workers.models)
        told = f"{facts.workers.models} {facts.workers.model}"
        parts.append(f"{told} {busy:.0%} busy" if computed else told)
    if tokens_per_s:
        parts.append(f"{short(tokens_per_s)} tokens/s")
    if facts.failures:
        parts.append(f"{len(facts.failures):,} units given up")
    parts.append(f"{facts.units_done:,} of {facts.units_planned:,} units")
    if facts.rows_rejected:
        parts.append(f"{facts.rows_rejected:,} rejected")
    return parts


def _inside(began: float, ended: float, start: float) -> float:
    """Return the share of a span that lies after ``start``."""
    return min(1.0, (ended - start) / (ended - began)) if ended > began else 1.0


class Step:
    """A step of a job, told while it lasts: "adding: 12 of 40 parts, ETA 0:02:10, 2 at work"."""

    def __init__(
        self,
        name: str,
        things: str,
        total: int | None,
        log_interval_s: float,
        *,
        at_once: int = 0,
        facts: RunFacts | None = None,
    ) -> None:
        """Name the step.

        Args:
            name: what is done, such as "adding".
            things: to what, in the plural, such as "parts".
            total: how many there are; None if nobody knows.
            log_interval_s: between log lines, where there is no terminal.
            at_once: most of them in flight; 0 is not told.
            facts: where the step is booked when it ends, as units and as a stage; None for nowhere.
        """
        self._name, self._things, self._total, self._at_once = name, things, total, at_once
        self._facts = facts
        self._done, self._started = 0, time.time()
        self._progress = Progress(self.parts, log_interval_s)

    def __enter__(self) -> "Step":
        self._started = time.time()
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        if self._facts is not None:
            planned = self._done if self._total is None else self._total
            self._facts.book_step(self._name, planned, self._done, (self._started, time.time()))

    def advance(self, count: int = 1) -> None:
        """Count one as done, or some."""
        self._done += count

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items as they are asked for, and count them."""
        for item in items:
            self.advance()
            yield item

    def parts(self) -> list[str]:
        """Return the state, most important part first."""
        spent = max(time.time() - self._started, 1e-3)
        rate = self._done / spent
        of = "" if self._total is None else f" of {self._total:,}"
        parts = [f"{self._name}: {self._done:,}{of} {self._things}"]
        if self._total is not None:
            left = self._total - self._done
            parts.append(f"ETA {clock(left / rate) if rate else 'unknown'}")
            if self._at_once:
                parts.append(f"{min(self._at_once, left):,} at work")
        if rate >= 1:
            parts.append(f"{short(rate)} {self._things}/s")
        return [*parts, f"{clock(spent)} so far"]
