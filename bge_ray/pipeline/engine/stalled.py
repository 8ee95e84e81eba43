"""What a run waits for when nothing comes out of it: a cluster without room looks like one that works."""

import logging
import time
from collections import Counter

import ray

from bge_ray.report.words import duration

logger = logging.getLogger(__name__)

# Also the time between two lines. Units take a minute or two; a large model may take longer to load.
SILENT_S = 300.0
NOT_STARTED = ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "RESTARTING")


class Silence:
    """Tells at intervals how long nothing came, and what the cluster says to it."""

    def __init__(self, silent_s: float = SILENT_S) -> None:
        """Begin to count; a line comes after so many seconds, and again."""
        self._silent_s = silent_s
        self.ended()

    def ended(self) -> None:
        """Take note that something came."""
        self._since = self._told = time.monotonic()

    def look(self) -> None:
        """Tell, if it is time to."""
        now = time.monotonic()
        if now - self._told < self._silent_s:
            return
        self._told = now
        logger.warning("no unit has ended for %s: %s", duration(now - self._since), waiting())


def waiting() -> str:
    """Return how much of the cluster is free, and which actors of this job have not started."""
    if ray.util.client.ray.is_connected():
        return "what the cluster is at cannot be seen by Ray Client"
    have, free = ray.cluster_resources(), ray.available_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    room = [
        f"{free.get(kind, 0.0):g} of {have[kind]:g} {kind}s free" for kind in ("CPU", "GPU") if kind in have
    ]
    late = ", ".join(f"{number} {name}" for name, number in sorted(_not_started().items()))
    started = f"not started: {late}" if late else "all actors have started"
    return ", ".join([f"{nodes} {'node' if nodes == 1 else 'nodes'}", *room, started])


def _not_started() -> Counter[str]:
    job = ray.get_runtime_context().get_job_id()
    found = ray._private.state.actors().values()
    return Counter(
        actor["ActorClassName"] for actor in found if actor["JobID"] == job and actor["State"] in NOT_STARTED
    )
