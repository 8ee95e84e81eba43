"""A job leaves no process behind, also where one does not react to the end of its cluster."""

import subprocess
import sys

import psutil
import pytest

from tests.support.runs import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.timeout(150)]

SCRIPT = """
import os, signal, subprocess
from bge_ray.pipeline.engine.cluster import connect, disconnect
from bge_ray.settings.sections import ResourcesSettings

connect(ResourcesSettings())
import ray

stuck = ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote())
os.kill(stuck, signal.SIGSTOP)
print(stuck, flush=True)
own = subprocess.Popen(["sleep", "60"])  # of whoever uses this as a library
disconnect()
assert own.poll() is None
own.kill()
try:
    ray.put("what a thread that was left behind may do")
except ray.exceptions.RaySystemError as error:
    print(f"refused: {error}")
assert not ray.is_initialized()
"""


@pytest.mark.slow
def test_a_worker_that_hangs_ends_with_its_cluster_and_none_follows_it() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    stuck = int(run.stdout.split()[0])
    assert not psutil.pid_exists(stuck) or psutil.Process(stuck).status() == psutil.STATUS_ZOMBIE
    assert "refused: " in run.stdout  # and no cluster is started behind the job's back
