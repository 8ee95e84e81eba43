"""Plain Ray tasks, a bounded number at once, for jobs whose steps return small results."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray

from bge_ray.pipeline.stopping import POLL_S

# A task whose process was killed is repeated this often before the job gives up.
MAX_RETRIES = 5


def run_tasks(
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    *,
    at_once: int,
    watch: Callable[[], None],
    num_cpus: float = 1.0,
) -> Iterator[tuple[int, Any]]:
    """Run a function once for each tuple of arguments, as Ray tasks.

    Args:
        function: runs in other processes; must be importable there.
        arguments: one tuple a task; drawn only as fast as tasks are started.
        at_once: most tasks in flight.
        watch: called while waiting; raises to stop, and what is in flight is cancelled.
        num_cpus: of each task.

    Yields:
        (number of the tuple, result), in the order in which tasks end.

    Raises:
        Whatever ``function`` raises, as soon as it does.
    """
    task = ray.remote(num_cpus=num_cpus, max_retries=MAX_RETRIES)(function)
    waiting = enumerate(arguments)
    running: dict[Any, int] = {}
    try:
        while True:
            while len(running) < at_once and (entry := next(waiting, None)) is not None:
                running[task.remote(*entry[1])] = entry[0]
            if not running:
                return
            watch()
            ended, _ = ray.wait(list(running), timeout=POLL_S)
            for reference in ended:
                yield running.pop(reference), ray.get(reference)
    finally:
        for reference in running:
            ray.cancel(reference)
