"""What a search, and its rerank, read from the store: each byte of data set, index and corpus once."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.campaign.cluster import RayCluster
from tests.support.corpora import docstrings, jsonl_bytes, parquet_bytes
from tests.support.models import make_cross_encoder, make_encoder, make_m3
from tests.support.proxy import FaultyProxy
from tests.support.runs import JobProcess
from tests.support.s3 import S3Server
from tests.support.searches import STORAGE, jsonl, upload

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3000)]

ROWS, QUERIES = 20_000, 2_000
K, RESCORED, DEPTH = 100, 400, 20
FILES = 8


def times_read(
    server: S3Server,
    bucket: str,
    folder: Path,
    embedded: dict[str, object],
    searched: dict[str, object],
    factory: str | None = None,
) -> dict[str, float]:
    """Embed, index if there is a ``factory``, and search; return how often each byte of each folder was read.

    Only by the search, and with its rerank.
    """
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
    keys = {"output.uri": f"{bucket}/data", "model.max_length": 64, "resources.num_encoders": 1} | embedded
    with FaultyProxy(server.endpoint) as proxy:
        environment = {"AWS_ENDPOINT_URL": proxy.url, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 48}
        cluster = RayCluster(str(folder / "cluster"), environment, (4, 1))
        environment["RAY_ADDRESS"] = cluster.address

        def run(job: str, **more: object) -> None:
            process = JobProcess(folder / job, keys | more, environment=environment, job=job)
            assert process.wait(900) == 0, process.log()

        try:
            run("embed", **{"corpus.uri": f"{bucket}/corpus"})
            if factory is not None:
                run("index", **{"index.factory": factory, "index.num_queries": 100})
            proxy.read.clear()
            search = {"search.queries": f"{bucket}/queries.jsonl", "search.output": f"{bucket}/run"}
            search |= {"search.k": K, "search.num_searchers": 2, "search.rerank": "true"}
            search |= {"rerank.model": make_cross_encoder(folder / "reranker"), "rerank.depth": DEPTH}
            search |= {"rerank.num_rerankers": 1, "rerank.max_length": 64}
            run("search", **search | searched)
        finally:
            cluster.stop()
        read: Counter[str] = Counter()
        for path, size in proxy.read:
            read[path.removeprefix(f"/{bucket.removeprefix('s3://')}/")] += size
    report = json.loads(STORAGE.read(f"{bucket}/run/report.json"))
    assert (report["queries_out"], report["results"]) == (QUERIES, QUERIES * K)
    assert report["scoring"]["pairs_out"] == QUERIES * DEPTH
    times = {}
    for part in ("data/embeddings", "data/index", "corpus"):
        there = sum(info.size for info in STORAGE.list_files(f"{bucket}/{part}"))
        got = sum(size for name, size in read.items() if name.startswith(part))
        if there:
            times[part] = got / there
            print(f"{part}: {there:,} bytes, {got:,} read, {times[part]:.3f} times")
    return times


@pytest.mark.parametrize("groups", [1, 4])
def test_each_byte_is_read_once(s3_server: S3Server, bucket: str, tmp_path: Path, groups: int) -> None:
    """By four groups of queries and two searchers, rescored, looked up and reranked."""
    model = make_encoder(tmp_path / "encoder", dim=384, layers=1, intermediate=384)
    searched = {"search.rescore": RESCORED, "search.unit_queries": QUERIES // groups}
    times = times_read(s3_server, bucket, tmp_path, {"model.name": model}, searched, "IVF64,SQ8")
    assert len(times) == 3
    assert max(times.values()) <= 1.1


def test_each_byte_is_read_once_where_searchers_hold_what_is_scored_again(
    s3_server: S3Server, bucket: str, tmp_path: Path
) -> None:
    """Exactly, scored again by vectors and by weights, and reranked by texts that were kept."""
    model = make_m3(tmp_path / "encoder", dim=256)
    embedded = {"model.name": model, "model.outputs": "[embedding, sparse]"}
    embedded |= {"corpus.keep_columns": "[title, text]"}
    searched = {"search.exact": "true", "search.unit_queries": QUERIES // 4}
    searched |= {"search.rescore_with": "[embedding, sparse]"}
    times = times_read(s3_server, bucket, tmp_path, embedded, searched)
    assert times["data/embeddings"] <= 1.1
    assert times["corpus"] == 0
