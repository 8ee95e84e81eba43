"""Real kills of the index job: of its driver while adding and merging, and of its tasks."""

import json
import signal
from pathlib import Path

import psutil
import pytest

from bge_ray.storage.objects import Storage
from tests.support.runs import JobProcess, wait_until
from tests.support.vectors import make_dataset

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STORAGE = Storage(30)
ROWS = [6000] * 24


def keys_for(root: str) -> dict[str, object]:
    return {
        "output.uri": root,
        "index.factory": "IVF64,Flat",
        "index.num_queries": 50,
        "index.range_bytes": 5_242_880,
        "index.part_bytes": 1_700_000,
    }


def count(root: str, word: str) -> int:
    return sum(word in info.uri.rpartition("/")[2] for info in STORAGE.list_files(f"{root}/index"))


def published(root: str) -> list[dict]:
    return json.loads(STORAGE.read(f"{root}/index/index.json"))["files"]


@pytest.mark.timeout(900)
def test_kills_of_driver_and_tasks_change_no_byte(bucket: str, tmp_path: Path) -> None:
    root = f"{bucket}/out"
    make_dataset(root, ROWS, 64)
    log = tmp_path / "log"

    for word, least in ((".part", 3), ("piece-", 2)):  # the driver, while it adds and while it merges
        before = count(root, word)
        run = JobProcess(log, keys_for(root), job="index")
        wait_until(lambda w=word, b=before + least: count(root, w) >= b)
        done = {i.uri: i.etag for i in STORAGE.list_files(f"{root}/index") if word in i.uri}
        run.kill()
        assert STORAGE.read_optional(f"{root}/index/index.json") is None
        after = {i.uri: i.etag for i in STORAGE.list_files(f"{root}/index")}
        assert done.items() <= after.items()

    STORAGE.delete([i.uri for i in STORAGE.list_files(f"{root}/index/parts")][:8])
    run = JobProcess(log, keys_for(root), job="index")
    killed = set()
    for name in ("ray::add_task", "ray::exact_task", "ray::Searcher"):  # a task of each kind
        wait_until(lambda n=name: bool(run.actors(n)) or run.process.poll() is not None, 120)
        for process in run.actors(name)[:1]:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
            killed.add(name)
    assert run.wait() == 0, run.log()
    assert len(killed) >= 2, killed

    # No part that was there when the driver was killed is written again.
    calm = f"{bucket}/calm"
    make_dataset(calm, ROWS, 64)
    undisturbed = JobProcess(log, keys_for(calm), job="index")
    assert undisturbed.wait() == 0, undisturbed.log()
    assert [f["sha256"] for f in published(root)] == [f["sha256"] for f in published(calm)]
    left = {i.uri.removeprefix(root) for i in STORAGE.list_files(f"{root}/index")}
    assert left == {i.uri.removeprefix(calm) for i in STORAGE.list_files(f"{calm}/index")}
    again = JobProcess(tmp_path / "again", keys_for(root), job="index")
    assert again.wait() == 0
    assert "nothing to do" in again.log()


def test_sigterm_stops_cleanly_and_the_next_run_goes_on(bucket: str, tmp_path: Path) -> None:
    root = f"{bucket}/out"
    make_dataset(root, ROWS, 64)
    run = JobProcess(tmp_path / "log", keys_for(root), job="index")
    wait_until(lambda: count(root, ".part") > 1)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143, run.log()
    assert "run it again to continue" in run.log()
    assert STORAGE.read_optional(f"{root}/index/lease.json") is None
    assert JobProcess(tmp_path / "log", keys_for(root), job="index").wait() == 0


def test_exit_codes_and_messages_of_the_command(bucket: str, tmp_path: Path) -> None:
    root = f"{bucket}/out"
    make_dataset(root, [4000], 32)
    for keys, code, message in [
        ({"output.uri": f"{bucket}/none"}, 2, "run bge-ray embed first"),
        ({"output.uri": root, "index.factory": "IVF64,PQ8x4fs"}, 2, "without 'fs'"),
        (
            {"output.uri": root, "index.factory": "IVF16,RaBitQ", "index.recall_target": 1.0},
            1,
            "was not reached",
        ),
    ]:
        run = JobProcess(tmp_path / f"log{code}{len(keys)}", keys, job="index")
        assert run.wait() == code, run.log()
        assert message in run.log()
        assert "Traceback" not in run.log()
    assert published(root)
