"""What a search, and its rerank, read from the store: each byte of data set, index and corpus once."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.campaign.cluster import RayCluster
from tests.support.corpora import docstrings, jsonl_bytes, parquet_bytes
from tests.support.models import make_cross_encoder, make_encoder
from tests.support.proxy import FaultyProxy
from tests.support.runs import JobProcess
from tests.support.s3 import S3Server
from tests.support.searches import STORAGE, jsonl, upload

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3000)]

ROWS, QUERIES = 20_000, 2_000
K, RESCORED, DEPTH = 100, 400, 20
FILES = 8


@pytest.mark.parametrize("groups", [1, 4])
def test_each_byte_is_read_once(s3_server: S3Server, bucket: str, tmp_path: Path, groups: int) -> None:
    """By four groups of queries and two searchers, rescored, looked up and reranked."""
    passages = [{name: p[name] for name in ("id", "title", "text")} for p in docstrings(ROWS)]
    each = len(passages) // FILES
    files = {
        f"corpus/{n}.{'jsonl' if n % 2 else 'parquet'}": (jsonl_bytes if n % 2 else parquet_bytes)(
            passages[n * each : (n + 1) * each]
        )
        for n in range(FILES)
    }
    asked = [{"_id": f"q{i}", "text": f"how to {passages[i * 9]['title']}"} for i in range(QUERIES)]
    upload(bucket, files | {"queries.jsonl": jsonl(asked)})
    keys: dict[str, object] = {
        "output.uri": f"{bucket}/data",
        "model.name": make_encoder(tmp_path / "encoder", dim=384, layers=1, intermediate=384),
        "model.max_length": 64,
        "resources.num_encoders": 1,
    }
    with FaultyProxy(s3_server.endpoint) as proxy:
        environment = {"AWS_ENDPOINT_URL": proxy.url, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 48}
        cluster = RayCluster(str(tmp_path / "cluster"), environment, (4, 1))
        environment["RAY_ADDRESS"] = cluster.address

        def run(job: str, **more: object) -> None:
            process = JobProcess(tmp_path / job, keys | more, environment=environment, job=job)
            assert process.wait(900) == 0, process.log()

        try:
            run("embed", **{"corpus.uri": f"{bucket}/corpus"})
            run("index", **{"index.factory": "IVF64,SQ8", "index.num_queries": 100})
            proxy.read.clear()
            search = {"search.queries": f"{bucket}/queries.jsonl", "search.output": f"{bucket}/run"}
            search |= {"search.k": K, "search.rescore": RESCORED, "search.num_searchers": 2}
            search |= {"search.unit_queries": QUERIES // groups, "search.rerank": "true"}
            search |= {"rerank.model": make_cross_encoder(tmp_path / "reranker"), "rerank.depth": DEPTH}
            search |= {"rerank.num_rerankers": 1, "rerank.max_length": 64}
            run("search", **search)
        finally:
            cluster.stop()
        read: Counter[str] = Counter()
        for path, size in proxy.read:
            read[path.removeprefix(f"/{bucket.removeprefix('s3://')}/")] += size
    report = json.loads(STORAGE.read(f"{bucket}/run/report.json"))
    assert (report["queries_out"], report["results"]) == (QUERIES, QUERIES * K)
    assert report["scoring"]["pairs_out"] == QUERIES * DEPTH
    times = {}
    for folder in ("data/embeddings", "data/index", "corpus"):
        there = sum(info.size for info in STORAGE.list_files(f"{bucket}/{folder}"))
        got = sum(size for name, size in read.items() if name.startswith(folder))
        times[folder] = got / there
        print(f"{folder}: {there:,} bytes, {got:,} read, {times[folder]:.3f} times")
    assert max(times.values()) <= 1.1
