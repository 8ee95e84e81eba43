"""What a run settles of its model by the devices at hand, and what by the data set that is there."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bge_ray.errors import DatasetMismatchError, ModelError, SettingsError
from bge_ray.model.feed.chunks import splitting_rules
from bge_ray.pipeline.embed import prepare
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.chunking import Chunking
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.model import ModelSpec
from bge_ray.settings.sections import ChunkingSettings, parse_settings, parse_tree
from tests.support.models import make_m3
from tests.support.reading import jsonl_bytes
from tests.support.records import make_spec


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
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
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


@pytest.mark.slow
def test_a_model_whose_code_fails_is_told_in_a_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shape '[3]' is invalid\nfor input of size 7")

    monkeypatch.setattr("transformers.BertModel.forward", fail)
    spec = prepare._resolve_model(parse_tree({"model": {"name": str(tiny_model)}}), None)
    with pytest.raises(ModelError, match=r"fails on texts .* RuntimeError: shape '\[3\]' is invalid$"):
        prepare.try_task(spec, None, trust_remote_code=False)


def late(model: Path, **asked: object) -> ModelSpec:
    return prepare._resolve_model(parse_tree({"model": {"name": str(model), **asked}}), None)


@pytest.mark.long
def test_late_chunks_are_for_the_mean_of_an_encoder_alone(tmp_path: Path, tiny_model: Path) -> None:
    asked = ChunkingSettings(max_tokens=40, late=True)
    mean = late(tiny_model, pooling="mean")
    settled = prepare.settle_chunking(asked, mean)
    assert settled is not None and settled.late and "windows" in settled.rules
    assert prepare.settle_chunking(ChunkingSettings(max_tokens=40), mean).rules == splitting_rules()
    with pytest.raises(SettingsError, match=r"chunking.late: is for encoders .* pools by cls"):
        prepare.settle_chunking(asked, late(tiny_model))
    with pytest.raises(SettingsError, match=r"chunking.late: is for encoders .* pools by mean_sqrt_len"):
        prepare.settle_chunking(asked, late(tiny_model, pooling="mean_sqrt_len"))
    counted = late(tiny_model, pooling="mean", outputs=["embedding", "bm25"])
    with pytest.raises(SettingsError, match=r"chunking.late: bm25 of model.outputs has no late form"):
        prepare.settle_chunking(asked, counted)
    with pytest.raises(SettingsError, match=r"chunking.*late: there are no chunks without max_tokens"):
        parse_settings(None, ["chunking.late=true"])
    m3 = late(make_m3(tmp_path / "m3"), pooling="mean", outputs=["embedding", "sparse", "colbert"])
    with pytest.raises(SettingsError, match=r"chunking.late: sparse, colbert of model.outputs have no"):
        prepare.settle_chunking(asked, m3)


def test_a_data_set_of_chunks_that_are_not_late_is_what_it_was() -> None:
    before = Chunking(40, 0, "sentence", "en", "first", keep_text=False, rules="2, sentencex 1.0")
    spec = dataclasses.replace(make_spec(), chunking=before)
    assert "chunking.late" not in spec.decisive()
    other = dataclasses.replace(spec, chunking=dataclasses.replace(before, late=True))
    assert other.vector_fingerprint != spec.vector_fingerprint
    with pytest.raises(DatasetMismatchError, match=r"chunking.late: there False, now True"):
        other.check_same(spec, "s3://there")
    tree = json.loads(to_json(spec))
    del tree["chunking"]["late"]  # as it was written before there were any
    assert from_json(DatasetSpec, json.dumps(tree)) == spec
