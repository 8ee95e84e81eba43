"""Stages as Ray Data operators: one parcel a row, bounded tasks, pools of a fixed size."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data

from bge_ray.pipeline.engine.pools import Pool, PoolSizes
from bge_ray.pipeline.runs.parcels import GroupTask, Parcel


def parcels(groups: Sequence[GroupTask]) -> ray.data.Dataset:
    """Return the groups as the rows that the first stage takes, smallest number first."""
    batches = [Parcel(group).to_batch() for group in groups]
    return ray.data.from_arrow(batches)


def by_tasks(
    rows: ray.data.Dataset,
    stage: Callable[..., pa.Table | Iterator[pa.Table]],
    sizes: PoolSizes,
    **arguments: Any,
) -> ray.data.Dataset:
    """Run a function on each parcel, in a bounded number of tasks."""
    return rows.map_batches(
        stage,
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=sizes.task_cpus,
        compute=ray.data.TaskPoolStrategy(size=sizes.tasks),
        fn_kwargs=arguments,
    )


def by_actors(rows: ray.data.Dataset, stage: type, pool: Pool, job: Any) -> ray.data.Dataset:
    """Run a callable class on each parcel, in a pool of actors."""
    return rows.map_batches(
        stage,
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        compute=ray.data.ActorPoolStrategy(size=pool.count, max_tasks_in_flight_per_actor=2),
        fn_constructor_kwargs={"job": job},
    )


def receipts(rows: ray.data.Dataset) -> Iterator[Parcel]:
    """Run the stages, and yield the parcels that come out, in the order they finish."""
    batches = rows.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
    return (Parcel.from_batch(batch) for batch in batches)
