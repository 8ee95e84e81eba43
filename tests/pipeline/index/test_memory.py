"""What a merge task holds: its range and a constant, whatever the parts are."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bge_ray.index.factory import Metric
from bge_ray.index.part import write_part
from bge_ray.index.train import train
from bge_ray.records.ids import vector_ids
from bge_ray.storage.objects import Storage
from tests.support.runs import REPOSITORY
from tests.support.vectors import clustered

pytestmark = pytest.mark.slow

NLIST, CODE = 4096, 392
# Merges one range in a process of its own, and prints by how much its memory grew at most.
MERGE = """
import json, re, sys
from pathlib import Path
import numpy as np
from bge_ray.index.merge import ListRange
from bge_ray.records.ids import vector_ids
from bge_ray.storage.objects import Storage
from bge_ray.pipeline.index.tasks import open_stored, piece_task

def peak_bytes():  # ru_maxrss would begin with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

uris, out, start, stop, n_bytes = json.loads(sys.argv[1])
storage = Storage(20)
parts = open_stored(storage, uris)
storage.write(out + ".warm", bytes(1 << 20))
before = peak_bytes()
piece_task(storage, parts, ListRange(start, stop, n_bytes), out)
print(peak_bytes() - before)
"""


@pytest.mark.parametrize("n_parts", [1, 6])
def test_the_peak_of_a_merge_is_its_range_and_a_constant(bucket: str, n_parts: int, tmp_path: Path) -> None:
    storage = Storage(20)
    trained = train(clustered(NLIST * 39, 16, 0), f"IVF{NLIST},Flat", Metric.L2)
    rng = np.random.default_rng(0)
    rows = 900_000 // n_parts
    uris, total = [], np.zeros(NLIST, np.int64)
    for number in range(n_parts):
        lists = rng.integers(0, NLIST, rows)
        ids = vector_ids(number, np.arange(rows))
        data = write_part(trained.sha256, NLIST, lists, np.zeros((rows, CODE), np.uint8), ids)
        uris.append(f"{bucket}/{number}.part")
        storage.write(uris[-1], data)
        total += np.bincount(lists, minlength=NLIST)
        del data
    grown = {}
    for stop in (NLIST // 16, NLIST // 4, NLIST):
        n_bytes = int(total[:stop].sum()) * (CODE + 8)
        words = json.dumps([uris, f"{bucket}/piece", 0, stop, n_bytes])
        done = subprocess.run(
            [sys.executable, "-c", MERGE, words], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        grown[n_bytes] = int(done.stdout) - n_bytes
    # The constant: eight blocks of 8 MiB that are read, three of 16 MiB that are sent, copied once each.
    assert max(grown.values()) < 230e6, grown
    assert all(n_bytes + over > 0.9 * n_bytes for n_bytes, over in grown.items()), grown
    print(grown)
