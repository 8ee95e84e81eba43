"""The crontab's own line, night after night: locked, quiet, doing only what has changed, index included."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from bge_ray.pipeline.index.job import read_index
from bge_ray.storage.objects import Storage, join
from tests.support.corpora import docstrings, parquet_bytes
from tests.support.datasets import check_nothing_left_over, read_manifest, vectors_by_id
from tests.support.runs import REPOSITORY, wait_until
from tests.support.s3 import S3Server
from tests.support.warm import warm_environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STORAGE = Storage(30)
ROWS, UNIT_ROWS, OBJECTS = 200, 100, 16


@dataclass(frozen=True)
class Cron:
    """Runs the one line of infra/cron/crontab as cron would, with its variables set for a test."""

    folder: Path
    config: str

    def start(self) -> subprocess.Popen[str]:
        lines = (REPOSITORY / "infra/cron/crontab").read_text().splitlines()
        [line] = [line for line in lines if line[:1].isdigit()]
        program = self.folder / "bge-ray"
        if not program.exists():
            code = "from bge_ray.command import main; main()"
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
            program.chmod(0o755)
        own = {"BGE_RAY": program, "CONFIG": self.config, "LOG": self.log, "LOCK": self.folder / "lock"}
        environment = {**os.environ, **warm_environment(), **{k: str(v) for k, v in own.items()}}
        return subprocess.Popen(
            ["/bin/sh", "-c", line.split(maxsplit=5)[5]],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def run(self) -> str:
        """Return what cron would mail."""
        return self.start().communicate(timeout=280)[0]


def put(root: str, name: str, records: list[dict[str, str]]) -> None:
    STORAGE.write(join(root, "corpus", name), parquet_bytes(records))


def part_times(root: str, server: S3Server) -> dict[str, object]:
    found = server.filesystem().ls(f"{root}/out/index/parts", detail=True)
    return {info["name"]: info["LastModified"] for info in found}


@pytest.mark.timeout(900)
def test_three_nights(bucket: str, s3_server: S3Server, tiny_model: Path, tmp_path: Path) -> None:
    records = docstrings((OBJECTS + 2) * ROWS)
    pieces = [records[i * ROWS : (i + 1) * ROWS] for i in range(OBJECTS + 2)]
    for i in range(OBJECTS):
        put(bucket, f"{i:03d}.parquet", pieces[i])
    sections = {
        "corpus": {"uri": f"{bucket}/corpus"},
        "output": {"uri": f"{bucket}/out", "grace_s": 0},
        "model": {"name": str(tiny_model)},
        "batching": {"unit_rows": UNIT_ROWS},
        "resources": {"num_encoders": 2},
        "index": {"build": True, "factory": "IVF8,Flat", "num_queries": 50, "part_bytes": 100_000},
    }
    STORAGE.write(f"{bucket}/nightly.yaml", json.dumps(sections).encode())
    cron = Cron(tmp_path, f"{bucket}/nightly.yaml")

    # The first night does all of it; a run that cron starts meanwhile is turned away at once.
    first = cron.start()
    wait_until(lambda: STORAGE.read_optional(f"{bucket}/out/lease.json") is not None)
    assert cron.run() == f"embed: exit code 75; see {cron.log}\n"
    assert first.communicate(timeout=280)[0] == "", cron.log.read_text()
    assert read_index(STORAGE, f"{bucket}/out").ntotal == OBJECTS * ROWS
    last = cron.log.read_text().splitlines()[-1]
    assert last.endswith(f"embed: done; exit code 0; report at {bucket}/out/report.html")

    # Nothing has changed: seconds, and no Ray.
    before, shards = part_times(bucket, s3_server), read_manifest(f"{bucket}/out").shards
    started = time.monotonic()
    assert cron.run() == ""
    seconds = time.monotonic() - started
    print(f"a night without changes: {seconds:.1f} s")
    assert cron.log.read_text().count("nothing to do") >= 2  # data set and index
    assert seconds < 60
    assert part_times(bucket, s3_server) == before

    # One object has changed, one is new, one is gone: two objects are embedded, the rest is left alone.
    put(bucket, "015.parquet", pieces[OBJECTS])
    put(bucket, "016.parquet", pieces[OBJECTS + 1])
    STORAGE.delete([f"{bucket}/corpus/014.parquet"])
    assert cron.run() == "", cron.log.read_text()
    report = json.loads(STORAGE.read(f"{bucket}/out/report.json"))
    assert report["units_planned"] == 2 * ROWS / UNIT_ROWS
    expected = [r["id"] for i in (*range(14), OBJECTS, OBJECTS + 1) for r in pieces[i]]
    assert vectors_by_id(f"{bucket}/out").keys() == set(expected)
    check_nothing_left_over(f"{bucket}/out")
    kept = {m.embeddings for m in shards} & {m.embeddings for m in read_manifest(f"{bucket}/out").shards}
    assert len(kept) == 14 * ROWS / UNIT_ROWS
    assert read_index(STORAGE, f"{bucket}/out").ntotal == len(expected)
    after = part_times(bucket, s3_server)
    untouched = {name for name, modified in before.items() if after.get(name) == modified}
    print(f"index parts: {len(before)} before, {len(after)} after, {len(untouched)} of them untouched")
    assert len(untouched) >= len(before) - 2

    # A failed night is mailed with its code.
    broken = Cron(tmp_path, f"{bucket}/no-such.yaml")
    assert "embed: exit code 2" in broken.run()
    assert broken.run() == ""  # which no rerun mends
