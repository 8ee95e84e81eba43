"""Plain Ray tasks, a bounded number at once, for jobs whose steps return small results."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from bge_ray.errors import BgeRayError, IncompleteRunError
from bge_ray.pipeline.engine.stopping import POLL_S

# A task whose process was killed is repeated this often before the job gives up.
MAX_RETRIES = 5


def run_tasks(
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    *,
    at_once: int,
    watch: Callable[[], None],
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    memory_bytes: int = 0,
    fetch: bool = True,
) -> Iterator[tuple[int, Any]]:
    """Run a function once for each tuple of arguments, as Ray tasks.

    Args:
        function: runs in other processes; must be importable there.
        arguments: one tuple a task; drawn only as fast as tasks are started.
        at_once: most tasks in flight.
        watch: called while waiting; raises to stop, and what is in flight is cancelled.
        num_cpus: of each task.
        num_gpus: of each task.
        memory_bytes: what each task needs, so that a node does not start more than it can hold; no
            more is reserved than the largest node has.
        fetch: yield the results; if false, references to them, which tasks take as arguments, so
            that large results never pass through this process.

    Yields:
        (number of the tuple, result), in the order in which tasks end.

    Raises:
        IncompleteRunError: a task's process was killed again and again.
        Whatever ``function`` raises, as soon as it does.
    """
    memory = min(memory_bytes, int(largest_node("memory")))
    needs = {"num_cpus": num_cpus, "num_gpus": num_gpus, "memory": memory or None}
    task = ray.remote(max_retries=MAX_RETRIES, **needs)(function)
    waiting = enumerate(arguments)
    running: dict[Any, int] = {}
    try:
        while True:
            while len(running) < at_once and (entry := next(waiting, None)) is not None:
                running[task.remote(*entry[1])] = entry[0]
            if not running:
                return
            watch()
            ended, _ = ray.wait(list(running), timeout=POLL_S, fetch_local=fetch)
            for reference in ended:
                number = running.pop(reference)
                yield number, fetched(reference) if fetch else reference
    finally:
        for reference in running:
            ray.cancel(reference)


def wait_for(references: list[Any], watch: Callable[[], None]) -> list[Any]:
    """Return the results behind references, calling ``watch`` while they are not there."""
    pending = references
    while pending:
        watch()
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
    return [fetched(reference) for reference in references]


def fetched(reference: Any) -> Any:
    """Return the result behind a reference.

    Raises:
        IncompleteRunError: its process was killed again and again.
        What the task raised, without Ray's copy of the remote stack if it is an error of ours.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, BgeRayError):
            raise cause from None
        raise
    except RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise IncompleteRunError(f"a task was lost {MAX_RETRIES} times ({reason}); run again") from error


def count_nodes(resource: str) -> int:
    """Return how many live nodes have some of a resource."""
    return sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource, 0.0) > 0)


def largest_node(resource: str) -> float:
    """Return how much of a resource the best-equipped live node has."""
    return max((node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
