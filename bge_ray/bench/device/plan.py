"""What the phases of a device's report have in common: where they run, how long, and what they note."""

import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

# Puts a finding under its name among those of a phase; it is on disk when the call returns.
Note: TypeAlias = Callable[[str, Any], None]
# What a phase keeps of its time, and what it has beyond that before it is killed.
ENDING_S = 5.0


@dataclass(frozen=True)
class Plan:
    """Where a phase runs and what it may take.

    ``work`` holds models and corpora that phases share, ``tokenizer`` a folder with tokenizer files, None
    where there is none. ``ends`` is when the phase is killed, as `time.monotonic` of this machine tells it.
    """

    device: str
    work: str
    tokenizer: str | None
    ends: float

    @property
    def left(self) -> float:
        """Seconds for what is still to be begun; a few are kept for ending."""
        return self.ends - ENDING_S - time.monotonic()

    @property
    def on_gpu(self) -> bool:
        """Whether it is a CUDA device, for which sizes are made; a CPU gets sizes that it can do."""
        return self.device == "cuda"

    @property
    def half(self) -> str:
        """The dtype that models are measured in."""
        return "float16" if self.on_gpu else "float32"


class Findings:
    """The findings of one phase, a JSON file that is whole at any moment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        self._started = time.monotonic()

    def note(self, name: str, value: Any) -> None:
        """Add a finding and the second in which it came."""
        self._found[name] = value
        self._found["seconds"] = round(time.monotonic() - self._started, 1)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._found, indent=1))
        partial.rename(self._path)


def run_within(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run a command with all that it starts, its output into a file.

    Returns:
        Its exit code; None if it was killed, with all that it started, because the time was over.
    """
    with log.open("w") as sink:
        process = subprocess.Popen(  # noqa: S603
            command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def seconds_of(work: Callable[[], object], device: str, at_least: float) -> list[float]:
    """Time some work again and again.

    Args:
        work: what is timed; on a CUDA device what it queues there.
        device: a torch device.
        at_least: seconds that are to be filled, after one call that is not counted.

    Returns:
        Seconds of each call, at least three.
    """
    work()
    found: list[float] = []
    if device != "cuda":
        deadline = time.perf_counter() + at_least
        while len(found) < 3 or time.perf_counter() < deadline:
            started = time.perf_counter()
            work()
            found.append(time.perf_counter() - started)
        return found
    torch.cuda.synchronize()
    deadline = time.perf_counter() + at_least
    while len(found) < 3 or time.perf_counter() < deadline:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(11)]  # type: ignore[no-untyped-call]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        torch.cuda.synchronize()
        pairs = itertools.pairwise(marks)
        found += [first.elapsed_time(second) / 1e3 for first, second in pairs]
    return found
