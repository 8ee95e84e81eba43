"""Twenty thousand small objects in a bucket are planned in a time and a memory that can be told."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pyarrow.fs
import pytest

from bge_ray.formats.corpus import list_corpus, resolve_columns
from bge_ray.pipeline.embed.planning import extend_plan, scan_objects, settle_limits
from bge_ray.settings.sections import BatchingSettings, CorpusSettings
from bge_ray.storage.objects import Storage
from tests.support.s3 import ACCESS_KEY, SECRET_KEY

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

OBJECTS = 20_000
# What the machine of docs/measured.md takes, and room for one that does other things meanwhile.
MOST_S, MOST_BYTES = 150.0, 300e6


def put_objects(s3_server, folder: str) -> None:
    fs = pyarrow.fs.S3FileSystem(
        access_key=ACCESS_KEY, secret_key=SECRET_KEY, endpoint_override=s3_server.endpoint, region="us-east-1"
    )

    def put(i: int) -> None:
        rows = ({"id": f"{i}-{j}", "text": f"passage {j} of object {i} " * 10} for j in range(3))
        with fs.open_output_stream(f"{folder}/{i:06d}.jsonl") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, range(OBJECTS)))


def test_planning_many_small_objects(
    bucket: str, s3_server, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    put_objects(s3_server, bucket.removeprefix("s3://"))
    corpus, storage, batching = CorpusSettings(uri=bucket), Storage(60), BatchingSettings()
    process = psutil.Process()
    before, started, cpu = process.memory_info().rss, time.time(), process.cpu_times()
    with caplog.at_level(logging.INFO):
        listed = list_corpus(storage, corpus)
        seconds = {"listed": time.time() - started}
        limits = settle_limits(batching, listed, 2, 128)
        scanned = scan_objects(storage, listed, corpus, limits, log_interval_s=2.0)
        seconds["scanned"] = time.time() - started
        plan = extend_plan({}, None, scanned, resolve_columns(scanned, corpus), limits)
        seconds["planned"] = time.time() - started
    grown = process.memory_info().rss - before
    driver = sum(process.cpu_times()[:2]) - sum(cpu[:2])
    with capsys.disabled():
        told = ", ".join(f"{name} after {s:.1f} s" for name, s in seconds.items())
        print(f"\n{OBJECTS:,} objects: {told}; driver {grown / 1e6:.0f} MB more, {driver:.1f} s of CPU")
    assert (len(plan.objects), len(plan.units())) == (OBJECTS, OBJECTS)
    assert len({o.group for o in plan.objects}) <= OBJECTS / 100
    assert any("planning: " in line and "corpus objects" in line for line in caplog.messages)
    assert seconds["planned"] < MOST_S
    assert grown < MOST_BYTES
