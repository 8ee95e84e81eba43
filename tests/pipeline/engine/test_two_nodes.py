"""Clusters of small nodes: what encoders leave is spread, and no task waits for more than a node has."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bge_ray.storage.objects import Storage, join
from tests.campaign.cluster import RayCluster
from tests.support.corpora import docstrings, mixed_objects
from tests.support.datasets import read_manifest
from tests.support.runs import JobProcess, wait_until
from tests.support.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STORAGE = Storage(30)
ROWS = 720


@pytest.fixture
def two_nodes(s3_server: S3Server, tmp_path: Path) -> Iterator[RayCluster]:
    cluster = RayCluster(str(tmp_path / "cluster.log"), s3_server.environment, (2, 2))
    yield cluster
    cluster.stop()


@pytest.mark.timeout(900)
def test_default_sizes_leave_room_on_two_nodes_and_on_the_one_that_is_left(
    bucket: str, tiny_model: Path, tmp_path: Path, two_nodes: RayCluster
) -> None:
    for name, data in mixed_objects(docstrings(20_000)[:ROWS], pieces=6).items():
        STORAGE.write(join(bucket, "corpus", name), data)
    keys = {
        "corpus.uri": f"{bucket}/corpus",
        "model.name": tiny_model,
        "model.max_length": 64,
        "batching.unit_rows": 20,
    }
    joined = {"RAY_ADDRESS": two_nodes.address}
    whole = JobProcess(tmp_path / "whole", keys | {"output.uri": f"{bucket}/whole"}, environment=joined)
    assert whole.wait(400) == 0, whole.log()
    lossy = JobProcess(tmp_path / "lossy", keys | {"output.uri": f"{bucket}/lossy"}, environment=joined)
    wait_until(lambda: len(STORAGE.list_files(f"{bucket}/lossy/done")) > 2)
    assert two_nodes.lose_node()
    assert lossy.wait(400) == 0, lossy.log()
    assert read_manifest(f"{bucket}/lossy") == read_manifest(f"{bucket}/whole")
    assert read_manifest(f"{bucket}/whole").rows_out == ROWS
