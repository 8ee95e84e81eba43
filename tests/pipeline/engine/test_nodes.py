"""A job that fixed its number of GPU actors waits for a cluster that is still growing."""

import subprocess
import sys

import pytest

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
