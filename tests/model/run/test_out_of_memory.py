"""Real lack of memory: a child process with a limit on its address space, no mock."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import make_encoder

pytestmark = pytest.mark.long

CHILD = """
import json, os, resource, sys
import numpy as np
import torch
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, resolve_encoder
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import ModelSettings

folder, packed = sys.argv[1], sys.argv[2] == "True"
spec = resolve_encoder(ModelSettings(name=folder), on_gpu=False)
model = Model(spec, model_folder(spec), Place(), packed)


def run_short_of_memory(spare, lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = (np.arange(offsets[-1]) * 7919 % 50 + 5).astype(np.int32)
    tokens = PackedTokens(ids, offsets, np.zeros(len(lengths), np.bool_))
    small = model.empty_result(len(lengths))
    model.run(tokens, [np.array([i]) for i in range(len(lengths)) if lengths[i] < 500][:20], small)

    size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    everything = [np.arange(len(lengths))]
    result = model.empty_result(len(lengths))
    resource.setrlimit(resource.RLIMIT_AS, (size + spare, resource.RLIM_INFINITY))
    model.run(tokens, everything, result)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    good = [i for i in range(len(lengths)) if i not in result.faults]
    free = model.empty_result(len(lengths))
    model.run(tokens, [np.array(good)], free)
    return {
        "faults": result.faults, "batches": result.batches, "free_batches": free.batches,
        "difference": float(np.abs(result.array("embedding")[good] - free.array("embedding")[good]).max()),
    }


print(json.dumps([run_short_of_memory(*case) for case in json.loads(sys.argv[3])]))
"""


def run_child(folder: Path, packed: bool, cases: list[tuple[int, list[int]]]) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(packed), json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin",
            "HF_HUB_OFFLINE": "1",
            "BGE_RAY_CACHE": os.environ["BGE_RAY_CACHE"],
        },
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, [
        line for line in done.stderr.splitlines() if "<string>" in line or "Error" in line
    ]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("oom") / "m", positions=2048, layers=2, intermediate=16_384)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_batches_are_halved_until_they_fit_and_a_row_that_never_fits_is_named(
    folder: Path, packed: bool
) -> None:
    halved, named = run_child(folder, packed, [(32 << 20, [100, 96] * 16), (16 << 20, [40, 2000, 60, 20])])
    assert halved["faults"] == {}
    assert halved["free_batches"] == 1
    assert 4 <= halved["batches"] <= 32
    assert halved["difference"] < 1e-5
    assert list(named["faults"]) == ["1"]
    reason, detail = named["faults"]["1"]
    assert reason == "out_of_memory" and "2000 tokens" in detail
    assert named["difference"] < 1e-5
