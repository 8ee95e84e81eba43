"""Has an autoscaling cluster start the nodes that a job needs, before the job sizes itself by them."""

import logging
import time
from collections.abc import Callable

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from bge_ray.errors import IncompleteRunError, SettingsError
from bge_ray.pipeline.engine.cluster import is_shared
from bge_ray.pipeline.engine.stopping import POLL_S
from bge_ray.settings.sections import ResourcesSettings

logger = logging.getLogger(__name__)

WAIT_S = 1800.0
TOLD_EVERY_S = 30.0


def await_nodes(
    settings: ResourcesSettings,
    key: str,
    count: int | None,
    gpus_each: float | None,
    watch: Callable[[], None],
    wait_s: float = WAIT_S,
) -> None:
    """Wait until the cluster has room for as many actors as the user fixed, or a first node at least.

    A cluster whose workers scale from zero has no GPU to count when the job starts. The room is asked for by
    placement groups, because these, unlike a request to the autoscaler, end with this process.

    Args:
        settings: of the cluster, which may be one that cannot grow.
        key: setting that fixed ``count``, for messages.
        count: actors; None if the cluster is to be taken as it is, once it has a node.
        gpus_each: GPUs of one of them; None or 0 for CPU actors, which share what CPUs there are.
        watch: called while waiting; raises to stop.
        wait_s: how long nodes may take to come.

    Raises:
        SettingsError: the cluster is this job's own, on one machine, and lacks them.
        IncompleteRunError: they did not come in time; or of this job's own cluster nothing is left.
    """
    have = ray.cluster_resources()
    gpus = gpus_each or 0.0
    wanted = f"{key} {count or 'unset'}"
    count = count or 1
    if have.get("GPU", 0.0) >= gpus * count and have.get("CPU", 0.0) >= 1:
        return
    if not is_shared(settings):
        if have.get("GPU", 0.0) >= gpus * count:
            raise IncompleteRunError(
                f"{wanted}: the Ray of this run has no node any more: it died, or was not heard from in "
                "time, as where a machine has too much to do; run again"
            )
        raise SettingsError(
            f"{wanted}: wants {gpus * count:g} GPUs, this machine has {have.get('GPU', 0.0):g}; ask "
            "for fewer, or join a cluster (resources.address, RAY_ADDRESS)"
        )
    bundle = {"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": 1.0}
    logger.info("waiting for nodes for %d actors of %s", count, bundle)
    groups = [placement_group([bundle]) for _ in range(count)]
    started = told = time.monotonic()
    try:
        missing = groups
        while missing:
            watch()
            now = time.monotonic()
            if now - started > wait_s:
                raise IncompleteRunError(
                    f"{wanted}: after {wait_s:.0f} s the cluster still lacks nodes for {len(missing)} "
                    f"of them, each with {bundle}; lower it, let the cluster grow, or run again later"
                )
            # Not the group's own wait(): it takes whole seconds, and this would become a busy loop.
            time.sleep(POLL_S)
            missing = [group for group in missing if placement_group_table(group)["state"] != "CREATED"]
            if missing and now - told > TOLD_EVERY_S:
                told = now
                logger.info("still waiting for nodes for %d of %d actors", len(missing), count)
    finally:
        for group in groups:
            remove_placement_group(group)
