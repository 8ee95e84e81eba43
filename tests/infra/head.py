"""A Ray head of the test's own, with the Jobs API, on loopback and behind a token."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import requests
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

# What Ray's own tests of its autoscaler set.
AUTOSCALED = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
}
RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago, outside those that Ray gives to its workers."""
    found: list[int] = []
    with_sockets = []
    while len(found) < count:
        probe = socket.socket()
        probe.bind(("127.0.0.1", 0))
        with_sockets.append(probe)
        if probe.getsockname()[1] > 20_000:
            found.append(probe.getsockname()[1])
    for probe in with_sockets:
        probe.close()
    return found


def _autoscaling(gcs_address: str, resources: dict[str, float]) -> dict[str, object]:
    provider = {
        # By its module: the wheel lacks the defaults that its own name stands for.
        "type": "external",
        "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": gcs_address,
    }
    worker = {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 2}
    head = {"resources": {}, "node_config": {}, "max_workers": 0}
    commands = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray")
    return {
        **{f"{name}_commands": [] for name in commands},
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "cluster_name": "grows",
        "max_workers": 2,
        "provider": provider,
        "available_node_types": {"ray.head.default": head, "worker": worker},
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 5,
    }


class RayHead:
    """`ray start --head --block` as a process group of its own; ``kill`` takes only what it started."""

    def __init__(
        self,
        num_cpus: int = 4,
        grows_by: dict[str, float] | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        """Start it; with ``grows_by`` it is autoscaled by nodes of these resources, all on this machine.

        ``variables`` are set in its environment alone, and not in that of what is submitted.
        """
        # A short path of its own: Ray puts sockets there, and the address that "auto" finds.
        self.folder = Path(tempfile.mkdtemp(prefix="head-", dir="/tmp"))
        gcs, dashboard, client, agent, agent_grpc, runtime_env, metrics = free_ports(7)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.gcs_address = f"127.0.0.1:{gcs}"
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as activated
        command = [RAY, "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}"]
        command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={self.folder}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += [f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
        command += [f"--runtime-env-agent-port={runtime_env}", f"--object-store-memory={256 << 20}"]
        environment = self.environment | (variables or {})
        if grows_by is not None:
            config = self.folder / "autoscaling.json"
            config.write_text(json.dumps(_autoscaling(self.gcs_address, grows_by)))
            command.append(f"--autoscaling-config={config}")
            environment = environment | AUTOSCALED
        self._log = self.folder / "start.log"
        self._process = subprocess.Popen(
            command,
            cwd="/",
            env=environment,
            stdout=self._log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._wait_ready()

    @property
    def headers(self) -> dict[str, str]:
        """What a request must carry."""
        return {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}

    def submit(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `ray job WORDS` from the checkout, as the README has it."""
        return subprocess.run(
            [RAY, "job", *words],
            cwd=Path(__file__).parents[2],
            env=self.environment | {"RAY_ADDRESS": self.address} | environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    def job(self, submission_id: str) -> dict[str, object]:
        """Return what the Jobs API knows of a job."""
        answer = requests.get(f"{self.address}/api/jobs/{submission_id}", headers=self.headers, timeout=30)
        answer.raise_for_status()
        return dict(answer.json())

    def kill(self) -> None:
        if self._process.poll() is not None:
            log = self._log.read_text()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise RuntimeError(f"the head has ended by itself: {log[-4000:]}")
        started = psutil.Process(self._process.pid).children(recursive=True)
        os.killpg(self._process.pid, signal.SIGKILL)
        for process in started:
            if process.is_running():
                process.kill()
        self._process.wait()
        psutil.wait_procs(started, timeout=20)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + 90
        while True:
            try:
                answer = requests.get(f"{self.address}/api/jobs/", headers=self.headers, timeout=10)
                if answer.ok:
                    return
            except requests.ConnectionError:
                pass
            if time.monotonic() > deadline or self._process.poll() is not None:
                log = self._log.read_text()
                self.kill()
                raise RuntimeError(f"the head did not come up: {log}")
            time.sleep(0.3)
