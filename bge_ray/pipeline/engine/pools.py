"""One sizing for every job: how many actors and tasks are at work at once, and what each of them reserves.

Sizes are settled after the nodes that were asked for are there, so that a job may start on a cluster that
has none yet.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ray

from bge_ray.errors import SettingsError
from bge_ray.pipeline.engine.cluster import connect
from bge_ray.pipeline.engine.nodes import await_nodes
from bge_ray.pipeline.engine.tasks import largest_node
from bge_ray.records.model import BM25
from bge_ray.report.facts import Workers
from bge_ray.settings.sections import Settings

# Of the CPUs of a machine without GPUs this share is left to tasks, at least one core: reading, joining,
# tokenising, writing.
TASK_SHARE = 0.25
LEAST_TASK_CPUS = 1.0
# What must be left of the CPUs for tasks to run at all.
LEAST_LEFT = 0.2
# Units inside a model's actor at once: while one is at the GPU, the other is taken out of Arrow and cut into
# batches, or made into columns and handed on. On a CPU both would want the same core.
UNITS_AT_A_GPU = 2
# What the names of pools end with that hold what is searched, and no model.
SEARCHERS = "searchers"
# On a GPU that both share: a query is short and there is one of it for a hundred pairs.
SHARED_GPUS = {"encoders": 0.25, "rerankers": 0.75}


@dataclass(frozen=True)
class PoolRequest:
    """A pool of actors that a job wants; None leaves a number to the sizing.

    ``key`` is the setting that fixes ``count``, ``most`` how many could have work, ``weight`` the share of
    the CPUs that the pool gets beside others, ``gpus`` those of one actor (0 where it can use none).
    """

    name: str
    key: str
    most: int
    count: int | None = None
    gpus: float | None = None
    threads: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class TaskRequest:
    """Tasks of one stage: so many at once, of the CPUs that pools leave.

    ``share`` is of what earlier requests left, ``cpus`` what one task takes at most, ``per_gpu`` and
    ``per_core`` how many of them feed one model on a GPU or on a CPU core.
    """

    name: str
    most: int
    share: float
    cpus: float = 1.0
    count: int | None = None
    per_gpu: float = math.inf
    per_core: float = math.inf


@dataclass(frozen=True)
class Pool:
    """A number of actors, what each of them reserves and uses, and how many units are inside one at once."""

    count: int
    cpus: float
    gpus: float
    threads: int
    units_at_once: int = 1

    def __str__(self) -> str:
        gpus = f"GPUs {self.gpus:g}, " if self.gpus else ""
        return f"{self.count} (each: {gpus}CPUs {self.cpus:g}, threads {self.threads})"

    @property
    def device(self) -> str:
        """Torch device of its models."""
        return "cuda" if self.gpus else "cpu"

    @property
    def devices(self) -> float:
        """GPUs that the pool takes, or CPU cores where it has none: what is paid for by the hour."""
        return self.count * (self.gpus or self.threads)


@dataclass(frozen=True)
class Tasks:
    """So many tasks of a stage at once, and the CPUs that each reserves."""

    count: int
    cpus: float


@dataclass(frozen=True)
class Sizes:
    """The pools and the task stages of a run."""

    pools: Mapping[str, Pool]
    tasks: Mapping[str, Tasks]

    def workers(self, model: str) -> Workers:
        """Return what is at work, as a report counts it; ``model`` is the pool whose time is dear."""
        counts = {name: pool.count for name, pool in self.pools.items()}
        counts |= {name: tasks.count for name, tasks in self.tasks.items()}
        pool = self.pools[model]
        return Workers(pool.device, pool.devices, counts, model=model)

    def __str__(self) -> str:
        pools = [f"{name} {pool}" for name, pool in self.pools.items()]
        return ", ".join([*pools, *(f"{name} {tasks.count}" for name, tasks in self.tasks.items())])


def encoder_request(settings: Settings, most: int) -> PoolRequest:
    """Return the request for encoders of passages or queries."""
    asked = settings.resources
    # Where tokens are counted and no model is run, a GPU would have nothing to do.
    gpus = 0.0 if settings.model.outputs == (BM25,) else asked.gpus_per_encoder
    fixed = (asked.num_encoders, gpus, asked.threads_per_encoder)
    return PoolRequest("encoders", "resources.num_encoders", most, *fixed)


def reranker_request(settings: Settings, most: int) -> PoolRequest:
    """Return the request for rerankers; a pair costs far more than a query."""
    asked = settings.rerank
    fixed = (asked.num_rerankers, asked.gpus_per_reranker, asked.threads_per_reranker)
    return PoolRequest("rerankers", "rerank.num_rerankers", most, *fixed, weight=2.0)


def searcher_request(settings: Settings, most: int, name: str = SEARCHERS) -> PoolRequest:
    """Return the request for actors that hold an index, or what of the shards is searched exactly."""
    return PoolRequest(name, "search.num_searchers", most, settings.search.num_searchers, gpus=0.0)


def await_pools(settings: Settings, pools: Sequence[PoolRequest], watch: Callable[[], None]) -> None:
    """Join or start the cluster, and wait for the nodes of what the user fixed, or for a first one.

    Args:
        settings: for the cluster's address.
        pools: what will be sized.
        watch: called before and after the cluster is there, and while nodes are waited for; raises to stop.

    Raises:
        IncompleteRunError: the nodes did not come.
    """
    watch()  # a Ray that is about to start looks at nothing
    connect(settings.resources)
    watch()
    for pool in pools:
        await_nodes(settings.resources, pool.key, pool.count, pool.gpus, watch)


def device_of(settings: Settings, pool: PoolRequest, watch: Callable[[], None]) -> str:
    """Return the torch device of a pool's models, which decides dtypes; waits for nodes if it must."""
    if pool.gpus is None:
        await_pools(settings, [pool], watch)
        return "cuda" if ray.cluster_resources().get("GPU", 0.0) >= 1 else "cpu"
    return "cuda" if pool.gpus > 0 else "cpu"


def cluster_sizes(
    settings: Settings,
    pools: Sequence[PoolRequest],
    tasks: Sequence[TaskRequest],
    watch: Callable[[], None],
) -> Sizes:
    """Size pools and tasks for the cluster, once the nodes are there; see `size_pools`."""
    await_pools(settings, pools, watch)
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    return size_pools(pools, tasks, cpus, gpus, node_cpus=largest_node("CPU"))


def size_pools(
    pools: Sequence[PoolRequest],
    tasks: Sequence[TaskRequest],
    cpus: float,
    gpus: float,
    *,
    node_cpus: float | None = None,
) -> Sizes:
    """Size pools and tasks for a cluster.

    A model on a GPU reserves its GPU and one CPU, and tasks take what is left. On CPUs there is one
    single-threaded actor a core, which beats one actor with many threads; together they leave a quarter
    of the cores, at least one, to tasks. Where actors reserve parts of cores, tasks reserve nothing: what is
    left is spread over the nodes, and after the loss of a node actors may take all of it, so that a task
    that needs a share of a core could wait for ever.

    Args:
        pools: wanted side by side.
        tasks: of the stages between them.
        cpus: of the cluster.
        gpus: of the cluster.
        node_cpus: of its largest node, more than which no actor can have; None: of its only one.

    Raises:
        SettingsError: they do not fit beside each other.
    """
    node = cpus if node_cpus is None else node_cpus
    sized = _on_gpus(pools, cpus, gpus)
    left = cpus - sum(pool.count * pool.cpus for pool in sized.values())
    sized |= _on_cpus([pool for pool in pools if pool.name not in sized], left, node, bool(sized))
    used = sum(pool.count * pool.cpus for pool in sized.values())
    # The last ten-thousandths are what rounding takes.
    if cpus - used < LEAST_LEFT - 1e-3:
        keys = ", ".join(pool.key for pool in pools)
        raise SettingsError(
            f"{keys}: the actors would reserve {used:g} of {cpus:g} CPUs and leave none for reading and "
            "writing; ask for fewer, or add CPUs"
        )
    needed = sum(pool.count * pool.gpus for pool in sized.values())
    if needed > gpus + 1e-6:
        keys = ", ".join(pool.key for pool in pools if sized[pool.name].gpus)
        raise SettingsError(f"{keys}: the actors need {needed:g} GPUs, the cluster has {gpus:g}")
    return Sizes(sized, _tasks(tasks, cpus - used, pools, sized))


def _gpus_each(pools: Sequence[PoolRequest], gpus: float) -> dict[str, float]:
    """Return the GPUs of one actor of each pool that uses some."""
    able = [pool for pool in pools if pool.gpus is None or pool.gpus > 0]
    shared = len(able) > 1
    each = {
        pool.name: pool.gpus
        if pool.gpus is not None
        else (0.0 if gpus < 1 else SHARED_GPUS[pool.name] if shared else 1.0)
        for pool in able
    }
    return {name: share for name, share in each.items() if share > 0}


def _on_gpus(pools: Sequence[PoolRequest], cpus: float, gpus: float) -> dict[str, Pool]:
    each = _gpus_each(pools, gpus)
    counts = {
        pool.name: min(pool.most, pool.count or max(1, int(gpus / sum(each.values()) + 1e-6)))
        for pool in pools
        if pool.name in each
    }
    own = 1.0 if cpus >= 2 * sum(counts.values()) else 0.25
    threads = {pool.name: pool.threads or 1 for pool in pools}
    return {
        name: Pool(count, own, each[name], threads[name], UNITS_AT_A_GPU) for name, count in counts.items()
    }


def _on_cpus(pools: Sequence[PoolRequest], cpus: float, node: float, beside_gpus: bool) -> dict[str, Pool]:
    """Size pools that have no GPU: threads for all CPUs, reservations for what tasks leave of them."""
    if not pools:
        return {}
    for_tasks = max(LEAST_TASK_CPUS, TASK_SHARE * cpus)
    reserved = cpus - for_tasks if cpus > for_tasks else cpus / 2
    weights = sum(pool.weight for pool in pools)
    # Beside others an actor must leave room for one of theirs on its node.
    most_each = node if len(pools) == 1 and not beside_gpus else node / 2
    sized = {}
    for pool in pools:
        part = pool.weight / weights
        fair = max(1, round(cpus * part))
        count = min(pool.most, pool.count or fair)
        share = min(reserved * part / count, most_each)
        own = float(int(share)) if share >= 1 else math.floor(share * 10_000) / 10_000
        threads = pool.threads or max(1, min(fair // count, int(node)))
        sized[pool.name] = Pool(count, own, 0.0, threads)
    return sized


def _tasks(
    tasks: Sequence[TaskRequest], left: float, pools: Sequence[PoolRequest], sized: Mapping[str, Pool]
) -> dict[str, Tasks]:
    reserve_nothing = any(not sized[pool.name].gpus or sized[pool.name].cpus < 1 for pool in pools)
    models = [pool for name, pool in sized.items() if not name.endswith(SEARCHERS)]
    found = {}
    for task in tasks:
        own = left * task.share
        cpus = min(task.cpus, math.floor(own * 100) / 100) or own
        fed = [pool.count * (task.per_gpu if pool.gpus else task.per_core) for pool in models]
        useful = sum(fed) if fed else math.inf
        count = task.count or max(1, min(int(own / cpus + 1e-6), int(min(useful, task.most))))
        found[task.name] = Tasks(min(count, task.most), 0.0 if reserve_nothing else cpus)
        left -= min(own, count * cpus)
    return found
