"""Real kills: of the driver, an actor, a node and the store; and rows that kill."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from bge_ray.storage.objects import Storage, join
from tests.support.corpora import docstrings, jsonl_bytes, mixed_objects
from tests.support.datasets import check_nothing_left_over, read_manifest, read_shards, vectors_by_id
from tests.support.poison import make_poisonous
from tests.support.proxy import FaultyProxy
from tests.support.runs import REPOSITORY, JobProcess, wait_until
from tests.support.s3 import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STORAGE = Storage(30)


def upload(root: str, objects: dict[str, bytes]) -> None:
    for name, data in objects.items():
        STORAGE.write(join(root, "corpus", name), data)


def keys_for(root: str, model: Path, **more: object) -> dict[str, object]:
    keys: dict[str, object] = {
        "corpus.uri": f"{root}/corpus",
        "output.uri": f"{root}/out",
        "model.name": model,
        "resources.num_encoders": 2,
        "report.log_interval_s": 2,
        "output.grace_s": 0,
    }
    return keys | {name.replace("__", "."): value for name, value in more.items()}


def markers(root: str) -> int:
    return len(STORAGE.list_files(f"{root}/out/done"))


@pytest.mark.timeout(900)
def test_twenty_thousand_rows_survive_kills_of_driver_actor_node_and_store(
    bucket: str, s3_server: S3Server, tiny_model: Path, tmp_path: Path
) -> None:
    records = docstrings(20_000)
    upload(bucket, mixed_objects(records, pieces=20))
    keys = keys_for(bucket, tiny_model, batching__unit_rows=100)
    log = tmp_path / "log"

    for _ in range(2):  # the driver, twice
        before = markers(bucket)
        run = JobProcess(log, keys)
        wait_until(lambda b=before: markers(bucket) >= b + 5)
        run.kill()
        assert markers(bucket) >= before + 5
        assert STORAGE.read_optional(f"{bucket}/out/manifest.json") is None

    run = JobProcess(log, keys)  # an encoder, then the store
    done = markers(bucket)
    wait_until(lambda: markers(bucket) > done)
    run.actors("ModelStage")[0].kill()
    done = markers(bucket)
    wait_until(lambda: markers(bucket) > done + 2)
    s3_server.kill()
    s3_server.start()
    done = markers(bucket)
    wait_until(lambda: markers(bucket) > done + 2)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 143, run.log()

    # a node of three; this run goes to the end
    left = len(records) // 100 - markers(bucket)
    assert left > 20, "nothing left to lose a node over"
    node_loss = [
        sys.executable,
        "-m",
        "tests.support.node_loss",
        json.dumps({k: str(v) for k, v in keys.items()}),
    ]
    lost = subprocess.run(node_loss, check=False, cwd=REPOSITORY, timeout=400, capture_output=True, text=True)
    assert lost.returncode == 0, lost.stderr
    assert "node removed: True" in lost.stdout

    manifest = read_manifest(f"{bucket}/out")
    assert (manifest.rows_in, manifest.rows_out + manifest.rows_rejected) == (len(records), len(records))
    check_nothing_left_over(f"{bucket}/out")
    undisturbed = JobProcess(log, keys | {"output.uri": f"{bucket}/undisturbed"})
    assert undisturbed.wait() == 0
    assert read_manifest(f"{bucket}/undisturbed") == manifest  # every file, byte for byte
    assert vectors_by_id(f"{bucket}/out").keys() == {r["id"] for r in records}
    again = JobProcess(tmp_path / "again", keys)
    assert again.wait() == 0
    assert "nothing to do" in again.log()


def test_rows_that_kill_the_process_are_rejected_alone(bucket: str, tmp_path: Path) -> None:
    model = make_poisonous(tmp_path / "poison", "fox")
    records = [{"id": str(i), "text": f"passage number {i} about parquet"} for i in range(120)]
    for i in (17, 70):
        records[i]["text"] += " and a fox"
    upload(bucket, {"x.jsonl": jsonl_bytes(records)})
    keys = keys_for(
        bucket, model, model__trust_remote_code="true", batching__unit_rows=60, batching__token_budget=256
    )
    run = JobProcess(tmp_path / "log", keys | {"corpus.max_rejected_fraction": 0.05})
    assert run.wait() == 0, run.log()
    rejected = read_shards(f"{bucket}/out", "rejected").to_pylist()
    assert [(r["passage_id"], r["reason"]) for r in rejected] == [
        ("17", "killed_worker"),
        ("70", "killed_worker"),
    ]
    vectors = vectors_by_id(f"{bucket}/out")
    assert len(vectors) == 118
    assert all(np.isfinite(v).all() and abs(np.linalg.norm(v) - 1) < 1e-5 for v in vectors.values())


def test_remote_code_is_not_run_unasked(bucket: str, tmp_path: Path) -> None:
    model = make_poisonous(tmp_path / "poison", "fox")
    upload(bucket, {"x.jsonl": jsonl_bytes([{"id": "1", "text": "a fox"}])})
    run = JobProcess(tmp_path / "log", keys_for(bucket, model))
    assert run.wait() == 2, run.log()
    assert "trust_remote_code" in run.log()
    assert STORAGE.list_files(f"{bucket}/out") == []


def test_sigterm_stops_cleanly_and_the_next_run_goes_on(
    bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    records = docstrings(20_000)[:6000]
    upload(bucket, mixed_objects(records, pieces=10))
    keys = keys_for(bucket, tiny_model, batching__unit_rows=50)
    run = JobProcess(tmp_path / "log", keys)
    wait_until(lambda: markers(bucket) > 3)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143, run.log()
    assert "run it again to continue" in run.log()
    assert STORAGE.read_optional(f"{bucket}/out/lease.json") is None
    assert STORAGE.read_optional(f"{bucket}/out/manifest.json") is None
    assert JobProcess(tmp_path / "log", keys).wait() == 0
    assert len(vectors_by_id(f"{bucket}/out")) == len(records)


def test_a_stop_is_one_though_the_store_takes_no_report(
    bucket: str, s3_server: S3Server, tiny_model: Path, tmp_path: Path
) -> None:
    upload(bucket, mixed_objects(docstrings(20_000)[:6000], pieces=10))
    down = threading.Event()
    keys = keys_for(bucket, tiny_model, batching__unit_rows=50, output__storage_timeout_s=3)
    writes = ("PUT", "POST")
    with FaultyProxy(
        s3_server.endpoint, lambda _, method, path: "403" if down.is_set() and method in writes else ""
    ) as proxy:
        run = JobProcess(tmp_path / "log", keys, environment={"AWS_ENDPOINT_URL": proxy.url})
        wait_until(lambda: markers(bucket) > 3)
        down.set()
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(90) == 143, run.log()
    assert "no report of this run" in run.log()
    assert STORAGE.read_optional(f"{bucket}/out/report.json") is None


def test_a_second_run_at_once_is_refused_and_the_first_ends_well(
    bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    records = docstrings(20_000)[:8000]
    upload(bucket, mixed_objects(records, pieces=10))
    keys = keys_for(bucket, tiny_model, batching__unit_rows=50)
    first = JobProcess(tmp_path / "first", keys)
    wait_until(lambda: markers(bucket) > 0)
    second = JobProcess(tmp_path / "second", keys)
    assert second.wait() == 75, second.log()
    assert "is writing this output" in second.log()
    assert first.wait() == 0, first.log()
    assert len(vectors_by_id(f"{bucket}/out")) == len(records)


def test_an_output_that_refuses_writes_ends_at_once(bucket: str, tiny_model: Path, tmp_path: Path) -> None:
    upload(bucket, {"x.jsonl": jsonl_bytes([{"id": "1", "text": "text"}])})
    run = JobProcess(
        tmp_path / "log", keys_for(bucket, tiny_model) | {"output.uri": "s3://no-such-bucket/out"}
    )
    assert run.wait() in (1, 2)
    assert "no-such-bucket" in run.log()
    assert "Traceback" not in run.log()
