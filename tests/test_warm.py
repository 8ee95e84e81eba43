"""Warm workers are the processes that Ray asked for."""

import array
import os
import socket
import sys
from pathlib import Path

import psutil
import pytest

from tests.campaign.cluster import RayCluster
from tests.support.runs import wait_until
from tests.support.warm import COLD, command, descendants, launcher

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.skipif(COLD in os.environ, reason=f"{COLD} is set"),
]


def test_a_worker_has_its_imports_behind_it_and_is_a_process_of_its_own() -> None:
    import ray

    @ray.remote
    class Worker:
        def facts(self) -> tuple[int, int, bool, str, str, str]:
            loaded = "torch" in sys.modules and "transformers" in sys.modules
            job = ray.get_runtime_context().get_job_id()
            return os.getpid(), os.getppid(), loaded, job, sys.executable, os.environ["AWS_ACCESS_KEY_ID"]

    workers = [Worker.remote() for _ in range(2)]
    facts = [ray.get(worker.facts.remote()) for worker in workers]
    job = ray.get_runtime_context().get_job_id()
    expected = (True, job, sys.executable, os.environ["AWS_ACCESS_KEY_ID"])
    assert [found[2:] for found in facts] == [expected, expected]
    assert facts[0][0] != facts[1][0]
    server = {parent for _, parent, *_ in facts}
    assert len(server) == 1
    mine = {process.pid for process in descendants(psutil.Process())}
    assert {pid for pid, *_ in facts} <= mine
    assert not any(launcher() in command(process) for process in descendants(psutil.Process()))
    # Killed like any other, and its launcher does not stay behind.
    for worker, (pid, *_) in zip(workers, facts, strict=True):
        psutil.Process(pid).kill()
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(worker.facts.remote())


def test_no_two_workers_take_the_same_random_ids() -> None:
    import ray

    @ray.remote
    class Worker:
        def ids(self) -> list[str]:
            return [ray.ObjectID.from_random().hex() for _ in range(100)]

    workers = [Worker.remote() for _ in range(3)]
    drawn = [taken for worker in workers for taken in ray.get(worker.ids.remote(), timeout=30)]
    assert len(set(drawn)) == 300


@pytest.mark.parametrize("said", [[], [(9).to_bytes(4, "big")], [(9).to_bytes(4, "big"), b"{"]])
def test_a_launcher_that_is_killed_while_it_speaks_takes_nothing_with_it(said: list[bytes]) -> None:
    """Ray kills those that still start when a job ends. Without its server, every later one started cold."""
    import ray

    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(Path(launcher()).with_name("server")))
        if said:
            outputs = array.array("i", [os.open(os.devnull, os.O_RDWR)] * 3)
            line.sendmsg(said[:1], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, outputs)])
            os.close(outputs[0])
        for part in said[1:]:
            line.sendall(part)

    @ray.remote
    class Worker:
        def is_warm(self) -> bool:
            return "transformers.models.bert.modeling_bert" in sys.modules

    assert ray.get(Worker.remote().is_warm.remote(), timeout=30)


@pytest.mark.slow
def test_services_have_their_imports_behind_them_and_end_with_their_node(tmp_path: Path) -> None:
    """They are children of the server, where Ray watches for the end of a parent."""
    cluster = RayCluster(str(tmp_path / "log"), {}, (1, 1))
    try:
        raylet = next(p for p in cluster.workers() if "raylet" in p.name() and "--head" not in command(p))
        names, titled = ("ray::DashboardAgent", "ray::RuntimeEnvAgent"), {}

        def started() -> bool:
            titled.update((" ".join(command(process)).strip(), process) for process in descendants(raylet))
            return titled.keys() >= {*names}

        wait_until(started)
        services = [titled[name] for name in names]
        assert all(raylet not in service.parents() for service in services)
        raylet.kill()
        _, alive = psutil.wait_procs(services, timeout=20)
        assert not alive
    finally:
        cluster.stop()
