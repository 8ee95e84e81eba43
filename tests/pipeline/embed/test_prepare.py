"""What a run settles of its model by the devices at hand, and what by the data set that is there."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bge_ray.errors import ModelError
from bge_ray.pipeline.embed import prepare
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.model import ModelSpec
from bge_ray.settings.sections import parse_settings, parse_tree
from tests.support.reading import jsonl_bytes


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


class ModelWasTried(Exception):
    """The run would go on to the corpus."""


def without_a_weight(path: Path) -> None:
    weights = load_file(path)
    del weights["encoder.layer.0.attention.self.key.weight"]
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("tokenizer.json", lambda path: path.write_text("{")),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        ("model.safetensors", without_a_weight),
    ],
    ids=["tokenizer", "cut off", "a weight less"],
)
def test_a_model_that_no_encoder_could_load_is_refused_in_a_line_before_the_corpus_is_scanned(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    spoil: Callable[[Path], object],
) -> None:
    """Nothing is written by then: mended, it is not taken for another model."""
    monkeypatch.setattr(prepare, "await_pools", lambda *_: None)  # tasks run where they are called
    monkeypatch.setattr(prepare, "run_tasks", lambda task, arguments, **_: [(0, task(*arguments[0]))])

    def go_on(*_: object) -> None:
        raise ModelWasTried

    monkeypatch.setattr(prepare, "cluster_sizes", go_on)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (tmp_path / "corpus.jsonl").write_bytes(jsonl_bytes([{"id": "1", "text": "one"}]))
    keys = {"corpus.uri": tmp_path / "corpus.jsonl", "output.uri": tmp_path / "out", "model.name": model}
    settings = parse_settings(None, [f"{key}={value}" for key, value in keys.items()])
    spoil(model / name)
    with pytest.raises(ModelError) as caught:
        prepare.prepare(settings)
    assert str(model) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
    shutil.copy(tiny_model / name, model / name)
    with pytest.raises(ModelWasTried):
        prepare.prepare(settings)
