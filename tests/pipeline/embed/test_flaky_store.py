"""A store that fails one request in ten: the jobs end with everything done, and with the same bytes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bge_ray.storage.objects import Storage, join
from tests.support.corpora import docstrings, jsonl_bytes, mixed_objects
from tests.support.datasets import check_nothing_left_over, read_manifest, vectors_by_id
from tests.support.proxy import FaultyProxy
from tests.support.runs import JobProcess
from tests.support.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STORAGE = Storage(30)
ONE_IN = 10
FAULTS = ("503", "slow", "lost", "500", "mute")
ROWS = 1500


class OneInTen:
    """Fails every tenth request, each time in the next of the ways; ``done`` counts the ways."""

    def __init__(self) -> None:
        self.done: dict[str, int] = dict.fromkeys(FAULTS, 0)

    def __call__(self, number: int, *_: str) -> str:
        if number % ONE_IN:
            return ""
        kind = FAULTS[number // ONE_IN % len(FAULTS)]
        self.done[kind] += 1
        return kind


@pytest.fixture
def flaky(s3_server: S3Server) -> Iterator[tuple[dict[str, str], OneInTen]]:
    """Return (environment of a job that meets the failing store, what was done to it)."""
    fault = OneInTen()
    with FaultyProxy(s3_server.endpoint, fault) as proxy:
        yield {"AWS_ENDPOINT_URL": proxy.url}, fault


def index_files(root: str) -> list[tuple[str, str]]:
    description = json.loads(STORAGE.read(f"{root}/index/index.json"))
    return [(file["path"], file["sha256"]) for file in description["files"]]


@pytest.mark.timeout(900)
def test_embed_index_and_search_come_to_the_same_on_a_failing_store(
    bucket: str, tiny_model: Path, tmp_path: Path, flaky: tuple[dict[str, str], OneInTen]
) -> None:
    environment, fault = flaky
    records = docstrings(20_000)[:ROWS]
    for name, data in mixed_objects(records, pieces=6).items():
        STORAGE.write(join(bucket, "corpus", name), data)
    queries = [{"_id": r["id"], "text": r["text"][:80]} for r in records[:30]]
    STORAGE.write(join(bucket, "queries.jsonl"), jsonl_bytes(queries))
    for out, surroundings in (("failing", environment), ("well", {})):
        keys = {
            "corpus.uri": f"{bucket}/corpus",
            "output.uri": f"{bucket}/{out}",
            "model.name": tiny_model,
            "batching.unit_rows": 40,
            "index.build": "true",
            "index.factory": "IVF16,SQ8",
            "index.num_queries": 50,
            "search.queries": f"{bucket}/queries.jsonl",
            "search.output": f"{bucket}/{out}-run",
            "search.k": 10,
        }
        for job in ("embed", "search"):
            run = JobProcess(tmp_path / out, keys, environment=surroundings, job=job)
            assert run.wait() == 0, run.log()
            assert "Traceback" not in run.log()
    assert min(fault.done.values()) >= 3, fault.done

    manifest = read_manifest(f"{bucket}/failing")
    assert (manifest.rows_in, manifest.rows_out) == (ROWS, ROWS)
    assert manifest == read_manifest(f"{bucket}/well")  # every file, byte for byte
    assert vectors_by_id(f"{bucket}/failing").keys() == {r["id"] for r in records}
    check_nothing_left_over(f"{bucket}/failing")
    assert index_files(f"{bucket}/failing") == index_files(f"{bucket}/well")
    runs = [STORAGE.read(f"{bucket}/{out}-run/run.trec") for out in ("failing", "well")]
    assert runs[0] == runs[1]
