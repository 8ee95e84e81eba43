"""A cluster without a worker is given some by Ray's own autoscaler when a job asks, and the job runs."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bge_ray.model.spec import resolve_encoder
from bge_ray.settings.sections import ModelSettings
from bge_ray.storage.objects import Storage, join
from tests.infra.head import RayHead
from tests.support.corpora import docstrings, mixed_objects
from tests.support.datasets import vectors_by_id
from tests.support.runs import JobProcess
from tests.support.s3 import S3Server
from tests.support.searches import by_query, jsonl, read_run, upload
from tests.support.vectors import VectorDataset, clustered

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STORAGE = Storage(30)


@pytest.fixture
def empty_cluster(s3_server: S3Server) -> Iterator[RayHead]:
    started = RayHead(num_cpus=0, grows_by={"CPU": 2})
    yield started
    started.kill()


@pytest.mark.timeout(600)
def test_a_job_asks_for_nodes_and_runs_on_them(
    empty_cluster: RayHead, bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    records = docstrings(200)
    for name, data in mixed_objects(records).items():
        STORAGE.write(join(bucket, "corpus", name), data)
    keys: dict[str, object] = {
        "corpus.uri": f"{bucket}/corpus",
        "output.uri": f"{bucket}/out",
        "model.name": tiny_model,
        "model.dtype": "float32",
        "resources.num_encoders": 2,
        "resources.gpus_per_encoder": 0,
    }
    # Once planned, a corpus is not read again: the run on the cluster has only encoders to wait for.
    planned = JobProcess(tmp_path / "log", keys)
    assert planned.wait() == 0, planned.log()
    markers = STORAGE.list_files(f"{bucket}/out/done")
    STORAGE.delete([f"{bucket}/out/manifest.json", *(info.uri for info in markers)])

    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    run = empty_cluster.submit("submit", "--working-dir", ".", "--", "python", "jobs/embed.py", *words)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "waiting for nodes for 2 actors" in run.stdout
    assert vectors_by_id(f"{bucket}/out").keys() == {record["id"] for record in records}

    # A corpus that is new to it is scanned first, which waits for nodes, too.
    fresh = keys | {"output.uri": f"{bucket}/fresh"}
    run_fresh = JobProcess(tmp_path / "fresh", fresh, environment={"RAY_ADDRESS": empty_cluster.gcs_address})
    assert run_fresh.wait() == 0, run_fresh.log()
    assert vectors_by_id(f"{bucket}/fresh").keys() == {record["id"] for record in records}


def embedded(root: str, model: Path, rows: int) -> VectorDataset:
    """A data set whose queries the model can answer."""
    spec = resolve_encoder(ModelSettings(name=str(model)), on_gpu=False)
    made = VectorDataset(root, **{f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)})
    for number in range(2):
        made.put(number, clustered(rows // 2, spec.dim, seed=number))
    made.publish()
    return made


@pytest.mark.timeout(600)
def test_an_index_is_built_on_nodes_that_come_when_it_asks(
    empty_cluster: RayHead, bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    embedded(bucket, tiny_model, 2000)
    keys: dict[str, object] = {"output.uri": bucket, "index.factory": "IVF8,SQ8", "index.num_queries": 50}
    environment = {"RAY_ADDRESS": empty_cluster.gcs_address}
    run = JobProcess(tmp_path / "log", keys, environment=environment, job="index")
    assert run.wait() == 0, run.log()
    assert "waiting for nodes" in run.log()
    assert json.loads(STORAGE.read(f"{bucket}/index/index.json"))["ntotal"] == 2000
    report = json.loads(STORAGE.read(f"{bucket}/index/report.json"))
    assert report["workers"]["tasks"] >= 2  # counted once the node was there


@pytest.mark.timeout(600)
def test_a_search_runs_on_nodes_that_come_when_it_asks(
    empty_cluster: RayHead, bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    embedded(f"{bucket}/data", tiny_model, 400)
    upload(bucket, {"queries.jsonl": jsonl([{"_id": f"q{i}", "text": f"a fox {i}"} for i in range(12)])})
    keys: dict[str, object] = {
        "output.uri": f"{bucket}/data",
        "search.queries": f"{bucket}/queries.jsonl",
        "search.output": f"{bucket}/run",
        "search.k": 5,
    }
    environment = {"RAY_ADDRESS": empty_cluster.gcs_address}
    run = JobProcess(tmp_path / "log", keys, environment=environment, job="search")
    assert run.wait() == 0, run.log()
    assert "waiting for nodes" in run.log()
    assert {len(pairs) for pairs in by_query(read_run(f"{bucket}/run")).values()} == {5}
