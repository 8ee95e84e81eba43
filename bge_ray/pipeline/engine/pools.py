"""Sizes the pools of a search or rerank run: encoders, index actors and rerankers at work at once."""

from collections.abc import Callable
from dataclasses import dataclass

import ray

from bge_ray.errors import SettingsError
from bge_ray.pipeline.engine.cluster import connect, in_words
from bge_ray.pipeline.engine.nodes import await_nodes
from bge_ray.pipeline.engine.tasks import largest_node
from bge_ray.report.facts import Workers
from bge_ray.settings.sections import Settings

# Of the CPUs this share is left to tasks: reading, joining, tokenising, writing.
TASK_SHARE = 0.25
TASK_STAGES = 5
# What each pool is given of the CPUs where there is no GPU; a pair costs far more than a query.
WEIGHTS = {"encoders": 1.0, "searchers": 1.0, "rerankers": 2.0}
# On a GPU that both share: a query is short and there is one of it for a hundred pairs.
SHARED_ENCODER_GPUS = 0.25
SHARED_RERANKER_GPUS = 0.75


@dataclass(frozen=True)
class Pool:
    """A number of actors, and what each of them reserves and uses."""

    count: int
    cpus: float
    gpus: float
    threads: int

    def __str__(self) -> str:
        return in_words(self.gpus, self.cpus, self.threads)

    @property
    def device(self) -> str:
        """Torch device of its models."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True)
class PoolSizes:
    """The pools of a run (those it has), and its tasks: of each stage ``tasks`` at once."""

    pools: dict[str, Pool]
    task_cpus: float
    tasks: int

    def __getitem__(self, name: str) -> Pool:
        return self.pools[name]

    def workers(self, model: str) -> Workers:
        """Return the pools as a report counts them.

        Args:
            model: the pool whose time is dear.
        """
        on_gpus = [pool for pool in self.pools.values() if pool.gpus]
        counts = {name: pool.count for name, pool in self.pools.items()}
        if on_gpus:
            return Workers("cuda", sum(pool.count * pool.gpus for pool in on_gpus), counts, model)
        return Workers("cpu", sum(pool.count * pool.threads for pool in self.pools.values()), counts, model)

    def __str__(self) -> str:
        pools = [f"{name} {pool.count} ({pool})" for name, pool in self.pools.items()]
        return ", ".join([*pools, f"tasks of each other stage {self.tasks}"])


def cluster_pools(settings: Settings, most: dict[str, int], watch: Callable[[], None]) -> PoolSizes:
    """Size pools for the cluster that `connect` joins or starts.

    Args:
        settings: what the user fixed.
        most: the pools wanted (names of WEIGHTS), and how many actors of each could have work.
        watch: called while nodes are waited for; raises to stop.
    """
    connect(settings.resources)
    if "rerankers" in most:
        asked = settings.rerank
        await_nodes("rerank.num_rerankers", asked.num_rerankers, asked.gpus_per_reranker, watch)
    resources = ray.cluster_resources()
    return size_pools(
        settings, most, resources.get("CPU", 0.0), resources.get("GPU", 0.0), largest_node("CPU")
    )


def compute_dtype(settings: Settings, name: str, asked: str, on_gpu: str) -> str:
    """Return the compute dtype of a pool's model: as asked for, or ``on_gpu``, or float32 on CPUs.

    Where it is automatic the cluster is joined or started, to see whether it has GPUs.
    """
    if asked != "auto":
        return asked
    connect(settings.resources)
    gpus = float(ray.cluster_resources().get("GPU", 0.0))
    # Half precision is for GPUs; on a CPU the same weights give the same directions in float32.
    return on_gpu if _gpu_shares(settings, {name: 1}, gpus)[name] else "float32"


def size_pools(
    settings: Settings, most: dict[str, int], cpus: float, gpus: float, node_cpus: float
) -> PoolSizes:
    """Size pools; see `cluster_pools`.

    Raises:
        SettingsError: the pools do not fit beside each other.
    """
    shares = _gpu_shares(settings, most, gpus)
    for_tasks = cpus * TASK_SHARE
    on_gpus = {name: _on_gpus(settings, name, gpus, shares, most) for name in most if shares.get(name)}
    cpus_of_gpu_actor = min(1.0, (cpus - for_tasks) / 2 / max(1, sum(on_gpus.values())))
    left = cpus - for_tasks - cpus_of_gpu_actor * sum(on_gpus.values())
    weight = sum(WEIGHTS[name] for name in most if name not in on_gpus)
    pools = {}
    for name in most:
        if name in on_gpus:
            threads = _fixed_threads(settings, name) or 1
            pools[name] = Pool(on_gpus[name], _floor(cpus_of_gpu_actor), shares[name], threads)
            continue
        # Threads for all the CPUs, reservations for what the tasks leave of them: tasks come and go.
        part = WEIGHTS[name] / weight
        fair = max(1, round((cpus if not on_gpus else left) * part))
        count = min(_fixed_count(settings, name) or fair, most[name])
        threads = _fixed_threads(settings, name) or max(1, min(fair // count, int(node_cpus)))
        pools[name] = Pool(count, _floor(min(left * part / count, node_cpus / 2)), 0.0, threads)
    used = sum(pool.count * pool.cpus for pool in pools.values())
    if cpus - used < for_tasks / 2 or any(pool.cpus <= 0 for pool in pools.values()):
        raise SettingsError(
            f"resources: the cluster has {cpus:g} CPUs, the actors asked for would take {used:g}; ask for "
            "fewer (resources.num_encoders, search.num_searchers, rerank.num_rerankers), or add CPUs"
        )
    needed = sum(pool.count * pool.gpus for pool in pools.values())
    if needed > gpus + 1e-6:
        raise SettingsError(f"resources: the actors need {needed:g} GPUs, the cluster has {gpus:g}")
    each = (cpus - used) / TASK_STAGES
    task_cpus = _floor(min(1.0, each))
    return PoolSizes(pools, task_cpus, max(1, int(each / task_cpus)))


def _gpu_shares(settings: Settings, most: dict[str, int], gpus: float) -> dict[str, float]:
    both = "encoders" in most and "rerankers" in most
    encoder, reranker = settings.resources.gpus_per_encoder, settings.rerank.gpus_per_reranker
    if encoder is None:
        encoder = 0.0 if gpus < 1 else SHARED_ENCODER_GPUS if both else 1.0
    if reranker is None:
        reranker = 0.0 if gpus < 1 else SHARED_RERANKER_GPUS if both else 1.0
    return {"encoders": encoder, "rerankers": reranker}


def _on_gpus(
    settings: Settings, name: str, gpus: float, shares: dict[str, float], most: dict[str, int]
) -> int:
    together = sum(shares[other] for other in most if shares.get(other))
    wanted = _fixed_count(settings, name) or max(1, int(gpus / together + 1e-6))
    return min(wanted, most[name])


def _fixed_count(settings: Settings, name: str) -> int | None:
    return {
        "encoders": settings.resources.num_encoders,
        "searchers": settings.search.num_searchers,
        "rerankers": settings.rerank.num_rerankers,
    }[name]


def _fixed_threads(settings: Settings, name: str) -> int | None:
    return {
        "encoders": settings.resources.threads_per_encoder,
        "searchers": None,
        "rerankers": settings.rerank.threads_per_reranker,
    }[name]


def _floor(value: float) -> float:
    """Ray counts resources in ten-thousandths."""
    return int(value * 10_000) / 10_000
