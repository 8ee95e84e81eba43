"""Weights in every form that the hub has: the same vectors from each, and nothing in them is run."""

import fnmatch
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bge_ray.errors import ModelError
from bge_ray.model.folder import ModelFolder
from bge_ray.model.source import fetch_model, hash_model
from bge_ray.model.spec import resolve_reranker
from bge_ray.model.weights import weight_files
from bge_ray.settings.sections import RerankSettings
from tests.model.conftest import MakeModel, encode, load, resolve, vectors

TEXTS = ["the quick brown fox", "", "为这个句子生成表示", "jumps over " * 30]


@pytest.fixture(params=["bert", "xlm-roberta"])
def copy(request: pytest.FixtureRequest, encoder_folder: MakeModel, tmp_path: Path) -> Path:
    """A writable folder of an encoder with its weights in one file of safetensors."""
    return Path(shutil.copytree(encoder_folder(request.param, "cls"), tmp_path / "some-model"))


def take_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Remove the weights of a folder and return them."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    return weights


def one_pickle(folder: Path) -> None:
    torch.save(take_weights(folder), folder / "pytorch_model.bin")


def pickle_of_old(folder: Path) -> None:
    torch.save(take_weights(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def sharded(folder: Path, pattern: str, index: str, save: Callable) -> None:
    weights = take_weights(folder)
    names = sorted(weights)
    parts = {pattern.format(n=i + 1): names[i::3] for i in range(3)}
    for file, part in parts.items():
        save({name: weights[name].contiguous() for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def pickles(folder: Path) -> None:
    sharded(folder, "pytorch_model-{n:05}-of-00003.bin", "pytorch_model.bin.index.json", torch.save)


def safetensors(folder: Path) -> None:
    def save(part: dict, path: Path) -> None:
        save_file(part, path, {"format": "pt"})

    sharded(folder, "model-{n:05}-of-00003.safetensors", "model.safetensors.index.json", save)


FORMS = [one_pickle, pickle_of_old, pickles, safetensors]


@pytest.mark.parametrize("rewrite", FORMS)
def test_every_form_gives_the_same_vectors(copy: Path, rewrite: Callable[[Path], None]) -> None:
    names, expected = ModelFolder(copy).weights, vectors(encode(copy, TEXTS))
    rewrite(copy)
    assert ModelFolder(copy).weights == names
    np.testing.assert_array_equal(vectors(encode(copy, TEXTS)), expected)


@pytest.mark.parametrize("rewrite", FORMS)
def test_every_byte_of_the_weights_is_in_the_hash(copy: Path, rewrite: Callable[[Path], None]) -> None:
    rewrite(copy)
    hashes = {hash_model(copy)}
    for path in weight_files(copy).files:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        hashes.add(hash_model(copy))
    assert len(hashes) == 1 + len(weight_files(copy).files)


def test_a_pickle_in_half_precision_gives_what_the_library_gives(copy: Path) -> None:
    from sentence_transformers import SentenceTransformer

    weights = {name: tensor.half() for name, tensor in take_weights(copy).items()}
    torch.save(weights, copy / "pytorch_model.bin")
    theirs = SentenceTransformer(
        str(copy), device="cpu", model_kwargs={"dtype": torch.float32, "use_safetensors": False}
    ).encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(vectors(encode(copy, TEXTS)), theirs, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("copy", ["bert"], indirect=True)
def test_a_process_without_torch_has_another_read_the_shapes(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickles(copy)
    here = ModelFolder(copy).weights
    monkeypatch.delitem(sys.modules, "torch")
    assert ModelFolder(copy).weights == here
    assert "torch" not in sys.modules
    (path, *_) = weight_files(copy).files
    torch.save(Trap(copy / "sprung"), path)
    with pytest.raises(ModelError, match=rf"{path.name}: refused, .*mkdir.* only tensors are read"):
        _ = ModelFolder(copy).weights
    assert "torch" not in sys.modules
    assert not (copy / "sprung").exists()


def test_a_reranker_is_told_by_its_pickled_head(
    reranker_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(reranker_folder("xlm-roberta"), tmp_path / "some-reranker"))
    one_pickle(folder)
    settings = RerankSettings(model=str(folder))
    assert resolve_reranker(settings, on_gpu=False).family == "cross_encoder"
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del weights["classifier.out_proj.bias"]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"1 weights of its head are not in its files .* classifier.out_proj.bias"
    ):
        resolve_reranker(settings, on_gpu=False)


def test_safetensors_are_preferred_and_the_twin_is_no_part_of_the_model(copy: Path) -> None:
    before = hash_model(copy)
    torch.save({"embeddings.word_embeddings.weight": torch.zeros(3, 3)}, copy / "pytorch_model.bin")
    (copy / "pytorch_model.bin.index.json").write_text("{")
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "trainer_state.json"):
        (copy / name).write_bytes(os.urandom(9))
    assert hash_model(copy) == before
    assert not weight_files(copy).pickled
    encode(copy, TEXTS)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_that_would_run_something_is_refused_by_name(
    copy: Path, tmp_path: Path, inside: bool, zipped: bool
) -> None:
    weights, trap = take_weights(copy), tmp_path / "sprung"
    state = weights | {"extra": Trap(trap)} if inside else Trap(trap)
    torch.save(state, copy / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refusal = r"pytorch_model\.bin: refused, .*mkdir.* only tensors are read"
    with pytest.raises(ModelError, match=refusal):
        load(resolve(copy))
    with pytest.raises(ModelError, match=refusal):
        _ = ModelFolder(copy).weights
    assert not trap.exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def a_list(path: Path) -> None:
    torch.save([torch.zeros(2)], path)


def a_module(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize("spoil", [cut, empty, garbage, a_list, a_module])
@pytest.mark.parametrize("old", [False, True])
def test_a_spoiled_pickle_is_refused_by_name(copy: Path, spoil: Callable[[Path], None], old: bool) -> None:
    (pickle_of_old if old else one_pickle)(copy)
    spoil(copy / "pytorch_model.bin")
    for read in (lambda: load(resolve(copy)), lambda: ModelFolder(copy).weights):
        with pytest.raises(ModelError, match=r"pytorch_model\.bin: ") as caught:
            read()
        assert "\n" not in str(caught.value)
        assert "\x1b" not in str(caught.value)
        assert "can still be loaded" not in str(caught.value)


def test_weights_of_other_shapes_than_the_configuration_says(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ModelError, match=r"its weights have other shapes than config\.json says") as caught:
        load(resolve(copy))
    assert "ignore_mismatched_sizes" not in str(caught.value)


def test_a_shard_that_is_missing_is_named(copy: Path) -> None:
    pickles(copy)
    (copy / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(
        ModelError, match=r"1 of its 3 files are missing, such as pytorch_model-00002-of-00003"
    ):
        hash_model(copy)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}'])
def test_an_index_that_is_none(copy: Path, content: str) -> None:
    safetensors(copy)
    (copy / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: "):
        hash_model(copy)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    with pytest.raises(
        ModelError, match=r"has no weights: neither model\.safetensors nor pytorch_model\.bin"
    ):
        hash_model(copy)


@pytest.mark.parametrize("with_safetensors", [False, True])
def test_pickles_are_fetched_where_there_is_nothing_else(copy: Path, with_safetensors: bool) -> None:
    weights = load_file(copy / "model.safetensors")
    if not with_safetensors:
        (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    torch.save([1], copy / "training_args.bin")
    store = fsspec.filesystem("memory")
    uri = f"memory://models/{copy.parent.name}/{with_safetensors}"
    store.put(str(copy), uri, recursive=True)
    fetched = {path.name for path in fetch_model(uri, None)[0].iterdir()}
    assert "training_args.bin" not in fetched
    assert ("model.safetensors" in fetched, "pytorch_model.bin" in fetched) == (
        with_safetensors,
        not with_safetensors,
    )


@pytest.mark.parametrize("with_safetensors", [True, False])
def test_pickles_are_fetched_from_the_hub_where_there_is_nothing_else(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_safetensors: bool
) -> None:
    weights, commit = load_file(copy / "model.safetensors"), "c" * 40
    if not with_safetensors:
        (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    torch.save([1], copy / "training_args.bin")
    revisions = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        """Fetch as the hub's client does: what the patterns name, to a folder that is named by the commit."""
        assert name == "own/model"
        revisions.append(revision)
        snapshot = tmp_path / "snapshots" / commit
        for path in copy.rglob("*"):
            there = path.relative_to(copy)
            if path.is_file() and any(fnmatch.fnmatch(str(there), pattern) for pattern in allow_patterns):
                (snapshot / there).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / there)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder, revision = fetch_model("own/model", "main")
    fetched = {path.name for path in folder.iterdir()}
    assert "training_args.bin" not in fetched
    assert ("pytorch_model.bin" in fetched) == (not with_safetensors)
    assert revision == commit
    assert revisions == (["main"] if with_safetensors else ["main", commit])
    assert hash_model(folder) == hash_model(copy)
