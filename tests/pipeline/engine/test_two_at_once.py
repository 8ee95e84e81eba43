"""One model stage called from two threads, as Ray calls it on a GPU: one at the device, both in the actor."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from bge_ray.model.run.model import Model
from bge_ray.model.spec import resolve_encoder, text_feeder
from bge_ray.pipeline.engine import isolation
from bge_ray.pipeline.engine.model_stage import ModelJob, ModelStage
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.rows import with_faults, with_tokens
from bge_ray.records.model import ModelSpec
from bge_ray.records.plan import Unit
from bge_ray.settings.sections import ModelSettings
from tests.support.ledgers import Handle

UNITS, ROWS, STAY_S = 8, 20, 0.02
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)


@pytest.fixture(autouse=True)
def _calls_are_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.ray, "get", lambda value: value)


def make_parcel(spec: ModelSpec, unit: int) -> Parcel:
    tokens = text_feeder(spec).passages([f"row {row} of unit {unit} " * (1 + row % 5) for row in range(ROWS)])
    table = with_tokens(pa.table({"row": range(ROWS)}), np.arange(ROWS), tokens)
    return Parcel.of(f"unit {unit}", Unit(0, unit, ROWS)).filled(with_faults(table, {}))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_device_has_one_unit_and_the_actor_two(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    spec = resolve_encoder(ModelSettings(name=str(tiny_model)), on_gpu=device == "cuda")
    threads, at_device, most = set(), threading.Lock(), [0]
    real = Model.run

    def run(model: Model, tokens: Any, batches: Sequence[Any], result: Any) -> None:
        assert at_device.acquire(blocking=False), "two units at the device"
        threads.add(threading.current_thread().name)
        most[0] = max(most[0], stage._presence._units)
        time.sleep(STAY_S)
        real(model, tokens, batches, result)
        at_device.release()

    job = ModelJob("encode", spec, device, 1, 64, False, Handle(), max_attempts=3, units_at_once=2)
    one_by_one = ModelStage(job)
    expected = [one_by_one(make_parcel(spec, unit).to_batch()) for unit in range(UNITS)]
    stage = ModelStage(job)
    monkeypatch.setattr(Model, "run", run)
    batches = [make_parcel(spec, unit).to_batch() for unit in range(UNITS)]
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        done = [Parcel.from_batch(batch) for batch in pool.map(stage, batches)]
    wall = time.monotonic() - started
    assert len(threads) == 1, "torch belongs to one thread"
    assert most == [2]
    for parcel, alone in zip(done, expected, strict=True):
        assert parcel.table == Parcel.from_batch(alone).table, "byte for byte what it is without company"
    assert sum(parcel.facts["device_s"] for parcel in done) <= wall
    assert sum(parcel.facts["waited_s"] for parcel in done) < 0.5 * wall
    # Each but the first waits for the unit before it, and that is told apart from its own time.
    assert sum(parcel.facts["encode_queued"] for parcel in done) > (UNITS - 2) * STAY_S / 2
