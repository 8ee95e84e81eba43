"""A job as a process of its own, to be killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.support.warm import descendants, warm_environment

REPOSITORY = Path(__file__).resolve().parents[2]


class JobProcess:
    """One `python jobs/<job>.py`; ``kill`` takes the driver, its cluster dies with it."""

    def __init__(
        self,
        log: Path,
        settings: dict[str, object],
        *extra: str,
        environment: dict[str, str] | None = None,
        job: str = "embed",
    ) -> None:
        words = [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]
        self._log = log
        self.process = subprocess.Popen(
            [sys.executable, f"jobs/{job}.py", *words, *extra],
            cwd=REPOSITORY,
            env={**os.environ, **warm_environment(), **(environment or {})},
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
        )

    def wait(self, timeout_s: float = 240) -> int:
        code = self.process.wait(timeout_s)
        wait_until(lambda: not self.children(), 30)
        return code

    def log(self) -> str:
        return self._log.read_text()

    def children(self) -> list[psutil.Process]:
        try:
            return descendants(psutil.Process(self.process.pid))
        except psutil.NoSuchProcess:
            return []

    def actors(self, name: str) -> list[psutil.Process]:
        """Return the Ray workers whose title holds the given class name."""
        found = []
        for process in self.children():
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self) -> None:
        """SIGKILL the driver alone, as an out-of-memory killer would; Ray takes down what it left."""
        left = self.children()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(left, timeout=20)
        for process in left:
            if process.is_running():
                process.kill()


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.05)
