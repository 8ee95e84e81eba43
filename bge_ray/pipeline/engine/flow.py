"""Stages as Ray Data operators: one parcel a row, bounded tasks, pools of a fixed size; their receipts."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from ray.exceptions import RayError

from bge_ray.errors import DamagedFileError, DatasetMismatchError, IncompleteRunError, ModelError
from bge_ray.pipeline.engine.cluster import quiet_ray, root_cause
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.pools import Pool, Tasks
from bge_ray.pipeline.engine.receipts import draw_receipts
from bge_ray.pipeline.engine.stalled import Silence

if TYPE_CHECKING:  # takes a second to import, which a run with nothing to do has no need of
    from ray.data import Dataset

logger = logging.getLogger(__name__)

# This many parcels given up in a row mean that the fault is not in them.
MAX_FAILURES_IN_A_ROW = 10
# Units sent to an actor beyond those that are inside it.
PREFETCHED = 1


def parcels(tasks: Sequence[Parcel]) -> "Dataset":
    """Return parcels as the rows that the first stage takes, in their order."""
    from ray.data import from_arrow

    return from_arrow([parcel.to_batch() for parcel in tasks])


def by_tasks(
    rows: "Dataset",
    stage: Callable[..., pa.Table | Iterator[pa.Table]],
    tasks: Tasks,
    **arguments: Any,
) -> "Dataset":
    """Run a function on each parcel, in a bounded number of tasks."""
    from ray.data import TaskPoolStrategy

    return rows.map_batches(
        stage,
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=tasks.cpus,
        compute=TaskPoolStrategy(size=tasks.count),
        fn_kwargs=arguments,
    )


def by_actors(rows: "Dataset", stage: type, pool: Pool, job: Any) -> "Dataset":
    """Run a callable class on each parcel, in a pool of actors.

    Where ``pool.units_at_once`` is more than one, an actor is called from so many threads; the class must be
    made for that.
    """
    from ray.data import ActorPoolStrategy

    at_once = pool.units_at_once
    return rows.map_batches(
        stage,
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        compute=ActorPoolStrategy(
            size=pool.count,
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=at_once > 1,
            # The next unit is at hand when one ends; the more, the more uneven the end of a run.
            max_tasks_in_flight_per_actor=at_once + PREFETCHED,
        ),
        fn_constructor_kwargs={"job": job},
    )


def receipts(rows: "Dataset") -> Iterator[Parcel]:
    """Run the stages, and yield the parcels that come out, in the order they finish."""
    batches = rows.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
    return (Parcel.from_batch(batch) for batch in batches)


def follow(
    start: Callable[[], Iterable[Parcel]], book: Callable[[Parcel], None], watch: Callable[[], None]
) -> None:
    """Draw all receipts of a data path and book them; tells what is waited for where none come.

    Args:
        start: makes the data path and returns its output.
        book: told of each receipt; raises to stop.
        watch: called while waiting; raises to stop.

    Raises:
        DatasetMismatchError, ModelError: an actor refused its model.
        DamagedFileError: a stage came upon one.
        IncompleteRunError: the pipeline failed, or parcel after parcel was given up.
    """
    in_a_row, silence = 0, Silence()

    def look() -> None:
        watch()
        silence.look()

    try:
        with quiet_ray():
            for receipt in draw_receipts(start, look):
                silence.ended()
                book(receipt)
                in_a_row = in_a_row + 1 if receipt.error is not None else 0
                if in_a_row >= MAX_FAILURES_IN_A_ROW:
                    raise IncompleteRunError(f"{in_a_row} units failed in a row, the last: {receipt.error}")
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, DatasetMismatchError | ModelError | DamagedFileError):  # no rerun mends these
            raise cause from error
        raise IncompleteRunError(f"the pipeline failed: {root_cause(error)}") from error
