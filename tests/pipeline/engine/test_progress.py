"""Progress lines say how far a run is, never wrap, and leave log lines whole on a real terminal."""

import fcntl
import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from bge_ray.pipeline.engine.progress import Progress, Step, fit, work_line
from bge_ray.report.facts import RunFacts, Workers, read_receipt
from tests.support.runs import REPOSITORY

pytestmark = pytest.mark.long

WIDTHS = (40, 80, 200)


def facts_at_work() -> RunFacts:
    """Half of a long run is done: 20 units in the last 100 seconds, by two encoders that were 80 % busy."""
    now = time.time()
    facts = RunFacts("embed", started=now - 130)
    facts.plan(units=40, rows=40_000_000)
    facts.start(Workers("cpu", 2.0, {"encoders": 2}), now - 110)
    for k in range(20):
        began = now - 100 + 10 * (k // 2)
        noted = {"encode_started": began, "encode_ended": began + 10, "device_s": 8.0, "tokens": 30_000_000}
        facts.book(read_receipt(1_000_000, noted | {"reasons": {"empty_text": 3}}))
    facts.book_failure("unit gone")
    return facts


def test_the_line_of_a_run_says_done_total_eta_rate_and_who_is_busy() -> None:
    line = ", ".join(work_line(facts_at_work(), "passages"))
    assert line.startswith("20.0 M of 40.0 M passages, ETA 0:01:")
    rate = float(re.search(r"([\d.]+) k passages/s", line).group(1))
    assert rate == pytest.approx(200, rel=0.02)
    assert float(re.search(r"([\d.]+) M tokens/s", line).group(1)) == pytest.approx(6, rel=0.02)
    assert 0.78 <= int(re.search(r"2 encoders (\d+)% busy", line).group(1)) / 100 <= 0.81
    assert line.endswith("1 units given up, 20 of 40 units, 60 rejected")


def test_a_run_that_has_not_begun_has_a_line_too() -> None:
    facts = RunFacts("search")
    facts.plan(units=2, rows=10)
    assert work_line(facts, "queries")[:2] == ["0 of 10 queries", "ETA unknown"]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_line_keeps_its_first_parts_whole_and_drops_the_last(width: int) -> None:
    parts = work_line(facts_at_work(), "passages")
    line = fit(parts, width)
    assert cell_len(line) <= width
    kept = line.split(", ")
    assert kept == parts[: len(kept)]
    longer = ", ".join(parts[: len(kept) + 1])
    assert kept == parts or cell_len(longer) > width  # nothing is dropped that would fit


def test_what_does_not_fit_at_all_is_cut() -> None:
    assert fit(["adding: 1 of 2 parts", "ETA 0"], 10) == "adding: 1…"
    assert cell_len(fit(["查询查询查询", "x"], 6)) <= 6  # each takes two cells
    assert fit(["abc"], 0) == ""
    assert fit(["abc", "de"], 7) == "abc, de"


def test_a_step_counts_tells_and_is_booked() -> None:
    facts = RunFacts("index")
    with Step("adding", "parts", 40, 30.0, at_once=8, facts=facts) as step:
        assert step.parts()[:3] == ["adding: 0 of 40 parts", "ETA unknown", "8 at work"]
        step._started -= 60  # a minute has gone by
        for _ in range(36):
            step.advance()
        said = step.parts()
        assert said[0] == "adding: 36 of 40 parts"
        assert said[1] == "ETA 0:00:06"
        assert said[2:] == ["4 at work", "0:01:00 so far"]
    assert (facts.units_planned, facts.units_done) == (40, 36)
    assert facts.stage_s["adding"] == pytest.approx(60, abs=1)


def test_a_counter_without_a_total_knows_no_end() -> None:
    with Step("reading", "queries", None, 30.0) as step:
        assert list(step.each("abc")) == ["a", "b", "c"]
        step._started -= 1.5
        said = step.parts()
    assert said[0] == "reading: 3 queries"
    assert not any("ETA" in part for part in said)
    assert any(part.endswith("queries/s") for part in said)


def test_a_log_line_comes_at_intervals_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bge_ray")
    console = Console(file=io.StringIO(), force_terminal=False)
    with Progress(lambda: ["3 of 4", "ETA 1"], 0.05, console):
        time.sleep(0.3)
    lines = [record.message for record in caplog.records]
    assert 2 <= len(lines) <= 6
    assert set(lines) == {"3 of 4, ETA 1"}
    assert console.file.getvalue() == ""
    assert not any(thread.name == "progress" for thread in threading.enumerate())


@pytest.mark.parametrize("width", WIDTHS)
def test_the_live_line_is_no_wider_than_its_console(width: int) -> None:
    sink = io.StringIO()
    console = Console(file=sink, force_terminal=True, width=width, height=10)
    parts = work_line(facts_at_work(), "passages")
    with Progress(lambda: parts, 30.0, console):
        time.sleep(0.4)
    shown = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text) for text in re.split(r"[\r\n]", sink.getvalue())]
    assert fit(parts, width) in shown
    assert max(cell_len(text) for text in shown) <= width


SCRIPT = """
import logging, sys, time
from bge_ray.pipeline.engine.progress import Step
logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
with Step("adding", "parts of a long name that fills a terminal", 40, 30.0, at_once=8) as step:
    for number in range(6):
        step.advance()
        time.sleep(0.3)
        logging.info("log line %d", number)
logging.info("the end")
"""


@pytest.mark.parametrize("columns", WIDTHS)
def test_on_a_real_terminal_the_line_stays_one_line_and_log_lines_whole(columns: int, tmp_path: Path) -> None:
    screen = screen_of(SCRIPT, columns, tmp_path)
    assert [line for line in screen if line] == [f"INFO log line {k}" for k in range(6)] + ["INFO the end"]


def screen_of(script: str, columns: int, folder: Path) -> list[str]:
    """Run a script in a pseudo terminal, and return the lines that stand on it in the end."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, str(path)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        seen += data
    os.close(ours)
    assert process.wait(30) == 0, seen.decode()
    assert b"adding: " in seen  # the line was there
    return Screen(columns).feed(seen.decode())


class Screen:
    """As much of a terminal as the live line uses: text that wraps, cursor up, erase, return, new line."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._lines: list[list[str]] = [[]]
        self._row = self._column = 0

    def feed(self, text: str) -> list[str]:
        for code, argument, letter, character in re.findall(
            r"(\x1b\[([\d;?]*)([A-Za-z]))|(.)", text, flags=re.DOTALL
        ):
            if not code:
                self._put(character)
            elif letter == "A":
                self._row -= int(argument or 1)
            elif letter == "K":
                assert argument == "2"
                self._lines[self._row] = []
            else:
                assert letter in "mhl"  # colours, and the cursor shown or hidden
        return ["".join(line).rstrip() for line in self._lines]

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._next()
        else:
            if self._column == self._columns:
                self._next()
                self._column = 0
            line = self._lines[self._row]
            line += [" "] * (self._column + 1 - len(line))
            line[self._column] = character
            self._column += 1

    def _next(self) -> None:
        self._row += 1
        if self._row == len(self._lines):
            self._lines.append([])
