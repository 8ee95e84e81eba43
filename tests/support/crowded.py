"""The model stage, which also writes down who is inside which process: `in PID UNIT` and `out PID UNIT`."""

import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from bge_ray.pipeline.engine.model_stage import ModelJob, ModelStage
from bge_ray.pipeline.engine.parcel import Parcel

# Long enough for a second unit to come in.
STAY_S = 0.2


class NotingStage(ModelStage):
    def __init__(self, job: ModelJob) -> None:
        super().__init__(job)
        self._log = log_of(job.spec.name)

    def _run(self, parcel: Parcel, *given: Any) -> Parcel:
        self._note("in", parcel.name)
        time.sleep(STAY_S)
        done = super()._run(parcel, *given)
        self._note("out", parcel.name)
        return done

    def _note(self, what: str, name: str) -> None:
        with self._log.open("a") as file:
            file.write(f"{what} {os.getpid()} {name}\n")


def log_of(model: str) -> Path:
    return Path(f"{model}.log")


def left_inside(log: Path) -> list[set[str]]:
    """Return the units that were inside each process when it died, in the order in which they came."""
    inside: dict[str, set[str]] = defaultdict(set)
    for line in log.read_text().splitlines():
        what, process, name = line.split(" ", 2)
        (inside[process].add if what == "in" else inside[process].discard)(name)
    return [names for names in inside.values() if names]


def inside_now(log: Path) -> dict[int, int]:
    """Return how many units are inside each process that has any."""
    inside: dict[int, int] = defaultdict(int)
    for line in log.read_text().splitlines() if log.exists() else ():
        what, process, _ = line.split(" ", 2)
        inside[int(process)] += 1 if what == "in" else -1
    return {process: units for process, units in inside.items() if units}
