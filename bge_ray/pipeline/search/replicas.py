"""Actors that hold what is searched: an index, once or several times, or an output of the shards."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from bge_ray.dataset.lookup import ShardMap
from bge_ray.errors import SettingsError
from bge_ray.pipeline.engine.pools import Pool
from bge_ray.pipeline.engine.tasks import count_nodes
from bge_ray.pipeline.index.searchers import Searcher
from bge_ray.pipeline.index.tasks import WrittenFile
from bge_ray.pipeline.runs.holders import Handover
from bge_ray.pipeline.runs.source import Source
from bge_ray.pipeline.search.exact import ShardSearcher
from bge_ray.pipeline.search.lists import ListSearcher
from bge_ray.records.model import EMBEDDING
from bge_ray.storage.objects import Storage

# A searcher that dies is started again this often, and then the run ends: an index that does not fit
# in memory would otherwise be tried for ever.
RESTARTS = 20


def replicas_of(asked: int | None, n_files: int, n_groups: int) -> int:
    """Return how often an index is held, on the nodes that there are.

    Ranges of a large index are searched side by side already. One file would be searched by one actor,
    whatever the cluster has: as many nodes hold it as there are groups of queries for.

    Args:
        asked: search.replicas.
        n_files: of the index.
        n_groups: of queries, each of which asks one replica.
    """
    if asked is not None:
        return asked
    return max(1, min(count_nodes("CPU"), n_groups)) if n_files == 1 else 1


def start_index(
    storage: Storage,
    files: Sequence[WrittenFile],
    pool: Pool,
    replicas: int,
    filters: ray.ObjectRef,
    *,
    asked: bool,
) -> tuple[tuple[ActorHandle, ...], ...]:
    """Start the actors that hold an index so many times; those of one replica share its files.

    Args:
        storage: where the files are.
        files: of the index.
        pool: how many actors, and what each reserves.
        replicas: of the index; as many as there are actors, where these are fewer.
        filters: what passes filters, as `Searcher` takes it; to be kept as long as the actors.
        asked: whether a user wants so many, and no fewer.

    Raises:
        SettingsError: there are fewer actors than a user wants replicas.
    """
    if asked and pool.count < replicas:
        raise SettingsError(
            f"search.replicas {replicas}: the actors that hold the index are {pool.count}; ask for fewer, "
            "raise search.num_searchers, or add CPUs"
        )
    start, replicas = _remote(Searcher, pool), min(replicas, pool.count)
    started: list[tuple[ActorHandle, ...]] = []
    for replica in range(replicas):
        # From one to the next as a tree grows, so that the store gives each byte once, and nobody gives more
        # than two others.
        parent = started[(replica - 1) // 2] if replica else ()
        peers = {file.path: parent[n % len(parent)] for n, file in enumerate(files) if parent}
        count = len(range(replica, pool.count, replicas))
        started.append(
            tuple(start(storage, files[i::count], pool.threads, filters, peers) for i in range(count))
        )
    return tuple(started)


def start_exact(
    source: Source, output: str, pool: Pool, filters: ray.ObjectRef, handover: Handover, *, per_row: bool
) -> tuple[tuple[ActorHandle, ...], ...]:
    """Start the actors that share the shards and search one output of them, once.

    Args:
        source: the data set.
        output: its name.
        pool: how many actors, and what each reserves.
        filters: what passes filters, as `Searcher` takes it; to be kept as long as the actors.
        handover: gets what they read and is asked for again.
        per_row: whether the best chunk of a passage stands for it.
    """
    shards = ShardMap.of(source.manifest)
    shares = [shards.every(pool.count, i) for i in range(pool.count)]
    asked = {"per_row": per_row, "filters": filters, "threads": pool.threads, "handover": handover}
    if output != EMBEDDING:
        asked["column"] = output
    start = _remote(ShardSearcher if output == EMBEDDING else ListSearcher, pool)
    return (tuple(start(source.storage, source.root, share, **asked) for share in shares),)


def _remote(kind: type[Any], pool: Pool) -> Any:
    return ray.remote(
        num_cpus=pool.cpus,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
        # Each holds its share on its own machine.
        scheduling_strategy="SPREAD",
    )(kind).remote
