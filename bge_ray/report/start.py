"""Since when a run counts: its process, where a command runs one job in it."""

import time

import psutil

_of_process: list[float] = []


def count_from_process() -> None:
    """Let the next run count from the start of this process; a command says so before its job."""
    _of_process[:] = [psutil.Process().create_time()]


def take_start() -> float:
    """Return since when a run that begins now counts, in Unix seconds.

    That is the start of the process for the first run of a command, so that imports are in it. A second job
    of the same command, and a run from Python, whose process may be days old, count from now.
    """
    now = time.time()
    # The clock may have been set back since.
    return min(_of_process.pop(), now) if _of_process else now
