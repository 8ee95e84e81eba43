"""What every contestant is given and gives back, and how the work of one is timed."""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from bge_ray.settings.sections import Auto


class NotHereError(Exception):
    """This machine lacks what a contestant needs."""


@dataclass(frozen=True)
class Task:
    """What every contestant gets: the same texts and weights, and the same cores or device."""

    corpus: str
    model: str
    reranker: str
    dtype: str
    max_length: int
    num_encoders: int
    token_budget: int | Auto
    unit_rows: int
    device: str


@dataclass(frozen=True)
class Result:
    """Seconds of steady work over some rows; what our job says of itself besides."""

    seconds: float
    rows: int
    padding_waste: float | None = None
    waited: float | None = None


def texts_of(task: Task) -> list[str]:
    """Return the texts of the corpus, in order."""
    texts: list[str] = pq.read_table(task.corpus, columns=["text"])["text"].to_pylist()
    return texts


def side_by_side(
    prepare: Callable[[Task, list[Any]], Callable[[], None]], task: Task, items: list[Any]
) -> float:
    """Deal items to one process an encoder and return the seconds from the first start to the last end.

    Args:
        prepare: loads and warms up in the process, and returns the work to be timed.
        task: what to run.
        items: dealt round robin.
    """
    context = multiprocessing.get_context("spawn")
    barrier, ends = context.Barrier(task.num_encoders + 1), context.Queue()
    parts = [items[i :: task.num_encoders] for i in range(task.num_encoders)]
    workers = [context.Process(target=_worker, args=(prepare, task, part, barrier, ends)) for part in parts]
    for worker in workers:
        worker.start()
    barrier.wait()
    started = time.time()
    ended = max(ends.get() for _ in workers)
    for worker in workers:
        worker.join()
    return float(ended - started)


def _worker(
    prepare: Callable[..., Callable[[], None]], task: Task, part: list[Any], barrier: Any, ends: Any
) -> None:
    work = prepare(task, part)
    barrier.wait()
    work()
    ends.put(time.time())


def timed(items: list[Any], run: Callable[[list[Any]], object]) -> Result:
    """Return the seconds that some items take, after a few that are not counted."""
    run(items[:32])
    started = time.perf_counter()
    run(items)
    return Result(time.perf_counter() - started, len(items))
