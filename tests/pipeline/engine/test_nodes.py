"""A job that fixed its number of GPU actors waits for a cluster that is still growing."""

import subprocess
import sys

import pytest

from bge_ray.errors import IncompleteRunError
from tests.support.runs import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.timeout(150)]


@pytest.mark.slow
def test_nodes_are_waited_for_and_no_longer_than_allowed() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.late_nodes"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (
        "in vain: resources.num_encoders 2: after 3 s the cluster still lacks nodes for 2 of them"
        in run.stdout
    )
    assert "came: True free GPUs 2.0" in run.stdout


NO_NODE = """
import ray
from bge_ray.pipeline.engine.nodes import await_nodes
from bge_ray.settings.sections import ResourcesSettings

# A node without a CPU counts as little as one that has died.
ray.init(address="local", num_cpus=0, include_dashboard=False, _node_ip_address="127.0.0.1")
for gpus in (0.0, 1.0):
    try:
        await_nodes(ResourcesSettings(), "resources.num_encoders", 1, gpus, lambda: None)
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_an_own_ray_that_lost_its_node_is_no_wrong_setting() -> None:
    run = subprocess.run(
        [sys.executable, "-c", NO_NODE], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    lost, refused = run.stdout.splitlines()[-2:]
    assert lost.startswith(
        f"{IncompleteRunError.__name__} resources.num_encoders 1: the Ray of this run has no"
    )
    assert refused.startswith("SettingsError resources.num_encoders 1: wants 1 GPUs, this machine has 0;")
