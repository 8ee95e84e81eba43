"""Peak memory of driver and workers does not grow with the corpus."""

import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

from bge_ray.storage.objects import Storage, join
from tests.support.corpora import docstrings, jsonl_bytes, parquet_bytes
from tests.support.datasets import read_manifest
from tests.support.runs import JobProcess

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KINDS = {"read_stage": "reader", "ModelStage": "encoder", "commit_stage": "writer", "Ledger": "ledger"}
ROWS = 12_000


def peak_memory(run: JobProcess) -> dict[str, float]:
    """Return the peak private memory in MB of the driver and of the largest worker of each kind."""
    peaks: dict[str, float] = defaultdict(float)

    def watch() -> None:
        while run.process.poll() is None:
            for process in [psutil.Process(run.process.pid), *run.children()]:
                try:
                    title = " ".join(process.cmdline())
                    info = process.memory_info()
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
                kind = next((k for word, k in KINDS.items() if word in title), None)
                kind = "driver" if process.pid == run.process.pid else kind
                if kind:  # shared pages are the object store, whose size is fixed
                    peaks[kind] = max(peaks[kind], (info.rss - info.shared) / 1e6)
            time.sleep(0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    assert run.wait() == 0, run.log()
    thread.join()
    return dict(peaks)


def test_peak_memory_stays_when_the_corpus_is_tripled(bucket: str, tiny_model: Path, tmp_path: Path) -> None:
    records = docstrings(20_000)
    storage = Storage(20)
    peaks = []
    for name, times in (("one", 1), ("three", 3)):
        root = f"{bucket}/{name}"
        for part in range(times):
            rows = [{**records[i % len(records)], "id": f"{part}-{i}"} for i in range(ROWS)]
            storage.write(
                join(root, f"corpus/{part}.parquet"), parquet_bytes(rows[: ROWS // 2], row_group_size=ROWS)
            )
            storage.write(join(root, f"corpus/{part}.jsonl"), jsonl_bytes(rows[ROWS // 2 :]))
        keys = {
            "corpus.uri": f"{root}/corpus",
            "output.uri": f"{root}/out",
            "model.name": tiny_model,
            "model.max_length": 64,
            "batching.unit_rows": 500,
            "resources.num_encoders": 2,
        }
        run = JobProcess(tmp_path / "log", keys, environment={"BGE_RAY_TESTS_PYTHON": sys.executable})
        peaks.append(peak_memory(run))  # Of processes that share nothing with another.
        assert read_manifest(f"{root}/out").rows_out == times * ROWS
    print("\npeak private memory in MB")
    for kind in sorted(peaks[0]):
        one, three = peaks[0][kind], peaks[1][kind]
        print(f"  {kind:<8} {one:7.0f} for {ROWS:,} rows, {three:7.0f} for {3 * ROWS:,} rows")
        assert peaks[1][kind] < 1.15 * peaks[0][kind] + 15, kind
