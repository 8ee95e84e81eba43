"""A Ray cluster of two nodes that outlives its jobs: the second node can be killed and replaced.

Run as a script with the cores of either node: prints its address, and adds a second node again for every
line it reads.
"""

import os
import subprocess
import sys

import psutil

from tests.support.runs import REPOSITORY
from tests.support.warm import command, descendants, warm_environment

OBJECT_STORE_BYTES = 200 << 20


class RayCluster:
    """The script below as a process, and blows against its second node."""

    def __init__(self, log: str, environment: dict[str, str], cores: tuple[int, int]) -> None:
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.campaign.cluster", *map(str, cores)],
                cwd=REPOSITORY,
                env={**os.environ, **warm_environment(), **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.address = self._answer()

    def workers(self) -> list[psutil.Process]:
        """Return everything that runs on its nodes."""
        return descendants(psutil.Process(self._process.pid))

    def lose_node(self) -> bool:
        """Kill the second node and all that ran on it, at once."""
        raylets = [p for p in self._raylets() if "--head" not in command(p)]
        if not raylets:
            return False
        doomed = [raylets[-1], *descendants(raylets[-1])]
        for process in doomed:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        return True

    def add_node(self) -> None:
        print("add", file=self._process.stdin, flush=True)
        self._answer()

    def is_whole(self) -> bool:
        """Whether both nodes are alive."""
        return self._process.poll() is None and len(self._raylets()) == 2

    def stop(self) -> None:
        """Kill it, jobs and all."""
        for process in [*self.workers(), self._process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()

    def _raylets(self) -> list[psutil.Process]:
        return [p for p in self.workers() if "raylet" in p.name() and p.status() != psutil.STATUS_ZOMBIE]

    def _answer(self) -> str:
        line = self._process.stdout.readline().strip()
        if not line.startswith("ready "):
            raise RuntimeError(f"the cluster did not come up: {line!r}")
        return line.removeprefix("ready ")


def main() -> None:
    from ray.cluster_utils import Cluster

    # Nobody reads what log monitors forward, and they take a fifteenth of a core together.
    place = {"node_ip_address": "127.0.0.1", "include_log_monitor": False}
    node = {**place, "object_store_memory": OBJECT_STORE_BYTES}
    first, second = map(int, sys.argv[1:])
    head = {**node, "num_cpus": first, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=second, **node)
    print("ready", cluster.address, flush=True)
    for _ in sys.stdin:
        cluster.add_node(num_cpus=second, **node)
        print("ready", cluster.address, flush=True)


if __name__ == "__main__":
    main()
