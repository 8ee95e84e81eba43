"""A run that is killed while it ends, after it published: the next one finishes the ending."""

import json
from pathlib import Path

import pytest

from bge_ray.storage.objects import Storage, join
from tests.support.corpora import docstrings, jsonl_bytes
from tests.support.datasets import check_nothing_left_over, read_manifest, vectors_by_id
from tests.support.proxy import FaultyProxy
from tests.support.runs import JobProcess
from tests.support.s3 import S3Server

STORAGE = Storage(30)
# The last things a run does, in this order.
STEPS = [
    ("PUT", "manifest.json"),
    ("PUT", "report.json"),
    ("DELETE", "/embeddings/"),
    ("DELETE", "lease.json"),
]


def kill_at(step: tuple[str, str], server: S3Server, keys: dict[str, object], log: Path) -> None:
    """Run the job, and kill its driver at the first request of a kind; only a manifest gets through."""

    def fault(_: int, method: str, path: str) -> str:
        if method != step[0] or step[1] not in path:
            return ""
        run.process.kill()
        return "" if step[1] == "manifest.json" else "lost"

    with FaultyProxy(server.endpoint, fault) as proxy:
        run = JobProcess(log, keys, environment={"AWS_ENDPOINT_URL": proxy.url})
        assert run.wait() == -9, run.log()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_any_step_of_its_end_nothing_is_left_over(
    bucket: str, s3_server: S3Server, tiny_model: Path, tmp_path: Path
) -> None:
    records = docstrings(20_000)[: 40 * (len(STEPS) + 1)]
    objects = {f"{n}.jsonl": records[40 * n : 40 * n + 40] for n in range(len(STEPS) + 1)}
    for name, rows in objects.items():
        STORAGE.write(join(bucket, "corpus", name), jsonl_bytes(rows))
    root = f"{bucket}/out"
    keys = {"corpus.uri": f"{bucket}/corpus", "output.uri": root, "model.name": tiny_model}
    keys |= {"output.grace_s": 0}
    assert JobProcess(tmp_path / "first", keys).wait() == 0

    for step in STEPS:
        # Each time an object goes, so that there is something to publish and to sweep, but not to embed.
        STORAGE.delete([join(bucket, "corpus", objects.popitem()[0])])
        kill_at(step, s3_server, keys, tmp_path / "killed")
        last = JobProcess(tmp_path / "last", keys)
        assert last.wait() == 0, last.log()
        assert read_manifest(root).rows_in == 40 * len(objects)
        check_nothing_left_over(root)
        assert json.loads(STORAGE.read(f"{root}/report.json"))["outcome"].startswith("complete")
    assert vectors_by_id(root).keys() == {r["id"] for rows in objects.values() for r in rows}
    again = JobProcess(tmp_path / "again", keys)
    assert again.wait() == 0
    assert "nothing to do" in again.log()
