"""What a run settles of its model by the devices at hand, and what by the data set that is there."""

import dataclasses
from pathlib import Path

import pytest

from bge_ray.pipeline.embed import prepare
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.model import ModelSpec
from bge_ray.settings.sections import parse_tree


@pytest.mark.parametrize("there", ["plain", "fused"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_are_those_of_the_data_set(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, there: str, device: str
) -> None:
    monkeypatch.setattr(prepare, "device_of", lambda *_: device)

    def settled(data_set: ModelSpec | None, **asked: str) -> ModelSpec:
        settings = parse_tree({"model": {"name": str(tiny_model), **asked}})
        spec = None if data_set is None else DatasetSpec(data_set, Columns("id", "text", None))
        return prepare._resolve_model(settings, spec)

    new = settled(None)
    assert (new.dtype, new.kernels) == (("float16", "fused") if device == "cuda" else ("float32", "plain"))
    assert settled(None, dtype="bfloat16").kernels == ("fused" if device == "cuda" else "plain")
    old = dataclasses.replace(new, kernels=there)
    assert settled(old) == old
    assert settled(old, kernels="plain").kernels == "plain"
