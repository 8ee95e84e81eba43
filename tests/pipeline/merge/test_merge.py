"""Merged models against numpy and against LM-Cocktail's arithmetic in torch; what other libraries load."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from bge_ray.errors import CorpusError, ModelError, OutputCollisionError, SettingsError
from bge_ray.model.modules import write_modules
from bge_ray.model.run.merging import NEGATIVES, group_loss, loss_weights, merged_bytes
from bge_ray.model.source import fetch_model, hash_model
from bge_ray.pipeline.merge.job import MergeWork, merge, plan_merged
from bge_ray.pipeline.work import carry_out
from bge_ray.report.facts import RunFacts
from bge_ray.settings.sections import Settings, parse_settings
from bge_ray.storage.ownership import OwnedFolder
from tests.support.models import make_cross_encoder, make_encoder, make_m3
from tests.support.searches import STORAGE, query_vectors

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one tokenizer: trained anew, another would have other words."""
    folder = tmp_path_factory.mktemp("merged")
    first = make_encoder(folder / "model-0", dim=16)

    def noise(tensors: dict[str, torch.Tensor], seed: int) -> None:
        for tensor in tensors.values():
            tensor += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))

    return [first, *(changed(folder / f"model-{k}", first, lambda t, k=k: noise(t, k)) for k in (1, 2))]


def settings_for(models: list[Path] | list[str], output: Path | str, **keys: object) -> Settings:
    words = [f"merge.models={json.dumps([str(model) for model in models])}", f"merge.output={output}"]
    return parse_settings(
        None, [*words, *(f"merge.{key}={json.dumps(value)}" for key, value in keys.items())]
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(folder: Path, source: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a model and change its weights in place."""
    shutil.copytree(source, folder)
    tensors = weights_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def vectors(folder: Path, texts: list[str]) -> np.ndarray:
    """By transformers alone: the first token's state, at unit norm."""
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[:, 0]
    return torch.nn.functional.normalize(states, dim=-1).numpy()


def snapshot(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(("report.", "_bge_ray"))
    }


@pytest.mark.parametrize("given", [None, [0.2, 0.3, 0.5]])
def test_the_merged_weights_equal_numpy(
    encoders: list[Path], tmp_path: Path, given: list[float] | None
) -> None:
    report = merge(settings_for(encoders, tmp_path / "out", weights=given))
    found = {name: tensor.numpy() for name, tensor in weights_of(tmp_path / "out").items()}
    parts = [{n: t.numpy().astype(np.float64) for n, t in weights_of(path).items()} for path in encoders]
    assert found.keys() == parts[0].keys()
    for name, tensor in found.items():
        truth = sum(w * part[name] for w, part in zip(given or [1 / 3] * 3, parts, strict=True))
        np.testing.assert_allclose(tensor, truth, atol=3e-7, rtol=0, err_msg=name)
        assert tensor.dtype == np.float32
    assert report.parameters == sum(tensor.size for tensor in found.values())
    assert report.rows_out == len(found)
    assert sum(model.weight for model in report.models) == pytest.approx(1)


def test_a_model_merged_with_its_copy_is_itself(encoders: list[Path], tmp_path: Path) -> None:
    twin = changed(tmp_path / "twin", encoders[0], lambda tensors: None)
    merge(settings_for([encoders[0], twin], tmp_path / "out"))
    before, after = weights_of(encoders[0]), weights_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_libraries_and_this_one_load_the_merged_model(encoders: list[Path], tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    out = tmp_path / "out"
    merge(settings_for(encoders, out))
    texts = ["the quick brown fox", "a corpus in object storage", "faiss"]
    truth = vectors(out, texts)
    ours = query_vectors(out, texts)
    np.testing.assert_allclose(ours, truth, atol=1e-5)
    theirs = sentence_transformers.SentenceTransformer(str(out), device="cpu").encode(texts)
    np.testing.assert_allclose(theirs, truth, atol=1e-5)
    assert not np.allclose(truth, vectors(encoders[0], texts), atol=1e-2)


def test_models_in_object_storage_are_merged_there(encoders: list[Path], tmp_path: Path, bucket: str) -> None:
    for path in encoders:
        for file in path.rglob("*"):
            if file.is_file():
                STORAGE.write(f"{bucket}/{path.name}/{file.relative_to(path)}", file.read_bytes())
    names = [f"{bucket}/{path.name}" for path in encoders]
    merge(settings_for(names, f"{bucket}/merged"))
    merge(settings_for(encoders, tmp_path / "out"))
    folder, _ = fetch_model(f"{bucket}/merged", None)
    assert hash_model(folder) == hash_model(tmp_path / "out")
    assert STORAGE.list_files(f"{bucket}/merged/work") == []
    assert merge(settings_for(names, f"{bucket}/merged")).outcome == "nothing to do"


def test_the_card_names_sources_hashes_and_weights(encoders: list[Path], tmp_path: Path) -> None:
    import yaml

    report = merge(settings_for(encoders[:2], tmp_path / "out", weights=[0.25, 0.75]))
    _, head, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == ["model-0", "model-1"]
    for path, model, weight in zip(encoders, report.models, ("0.250000", "0.750000"), strict=False):
        assert f"| `{path}` | {weight} | `{model.weights_sha256}` |" in text
    assert b"0.750000" in (tmp_path / "out" / "report.html").read_bytes()


def test_half_precision_is_kept_and_summed_in_single(encoders: list[Path], tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):

        def cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype = dtype) -> None:
            tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

        name = str(dtype).rpartition(".")[2]
        halves = [changed(tmp_path / f"{name}-{i}", path, cast) for i, path in enumerate(encoders)]
        merge(settings_for(halves, tmp_path / f"out-{name}"))
        parts = [weights_of(path) for path in halves]
        for tensor, merged in weights_of(tmp_path / f"out-{name}").items():
            assert merged.dtype == dtype
            # Not 1/3 of each in half precision: the sum is exact to its last digit.
            truth = sum(part[tensor].double() for part in parts) / 3
            torch.testing.assert_close(merged.double(), truth.to(dtype).double(), atol=1e-3, rtol=8e-3)


def test_heads_modules_and_integers(tmp_path: Path) -> None:
    first = make_m3(tmp_path / "first", dim=16)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor += 0.5

    second = changed(tmp_path / "second", first, add)
    for name in ("sparse_linear", "colbert_linear"):
        head = load_file(second / f"{name}.safetensors")
        save_file({k: t + 1 for k, t in head.items()}, second / f"{name}.safetensors")
    # A buffer that old versions saved, in one of the models alone.
    first = changed(tmp_path / "old", first, lambda t: t.update({"embeddings.position_ids": torch.arange(9)}))
    merge(settings_for([first, second], tmp_path / "out", weights=[0.5, 0.5]))
    for name in ("sparse_linear", "colbert_linear"):
        before, after = (load_file(at / f"{name}.safetensors") for at in (first, tmp_path / "out"))
        for key in before:
            torch.testing.assert_close(after[key], before[key] + 0.5)
    merged = weights_of(tmp_path / "out")
    assert torch.equal(merged["embeddings.position_ids"], torch.arange(9))
    query_vectors(tmp_path / "out", ["it loads"], outputs=["embedding", "sparse", "colbert"])


def test_shards_are_merged_into_one_file(encoders: list[Path], tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    model = AutoModel.from_pretrained(encoders[1])
    model.save_pretrained(sharded, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(encoders[1]).save_pretrained(sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    merge(settings_for([sharded, encoders[0]], tmp_path / "out"))
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    one, two = weights_of(encoders[0]), weights_of(encoders[1])
    for name, tensor in weights_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)


def test_what_is_not_the_same_is_refused_by_name(encoders: list[Path], tmp_path: Path) -> None:
    base = encoders[0]

    def without(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["pooler.dense.bias"]

    def reshaped(tensors: dict[str, torch.Tensor]) -> None:
        tensors["pooler.dense.bias"] = torch.zeros(7)

    config = shutil.copytree(base, tmp_path / "config")
    facts = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(facts | {"hidden_act": "relu"}))
    tokenizer = shutil.copytree(base, tmp_path / "tokenizer")
    words = json.loads((tokenizer / "tokenizer.json").read_text())
    words["model"]["vocab"]["other"] = words["model"]["vocab"].pop("the")
    (tokenizer / "tokenizer.json").write_text(json.dumps(words))
    pooled = shutil.copytree(base, tmp_path / "pooled")
    write_modules(pooled, "mean", 16)
    pickled = shutil.copytree(base, tmp_path / "pickled")
    torch.save(weights_of(pickled), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    cut = shutil.copytree(base, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-9])
    for other, said in (
        (changed(tmp_path / "without", base, without), "has pooler.dense.bias in model.safetensors"),
        (changed(tmp_path / "reshaped", base, reshaped), r"pooler.dense.bias has the shape \[16\]"),
        (config, "hidden_act of config.json is 'gelu'"),
        (tokenizer, "tokenizer.json differs"),
        (pooled, "1_Pooling/config.json differs"),
        (make_cross_encoder(tmp_path / "reranker", dim=16), "of config.json is"),
        (pickled, "pytorch_model.bin, which is no safetensors"),
        (cut, "is no whole safetensors file"),
    ):
        for models in ([base, other], [other, base]):
            with pytest.raises(ModelError, match=said if models[0] == base else None):
                merge(settings_for(models, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_a_training_leaves_in_the_files_is_no_difference(encoders: list[Path], tmp_path: Path) -> None:
    tuned = shutil.copytree(encoders[1], tmp_path / "tuned")
    facts = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(
        json.dumps(facts | {"_name_or_path": "x", "transformers_version": "4"})
    )
    words = json.loads((tuned / "tokenizer.json").read_text())
    words["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (tuned / "tokenizer.json").write_text(json.dumps(words))
    # As versions of sentence-transformers write them.
    modules = json.loads((tuned / "modules.json").read_text())
    for module in modules:
        name = module["type"].rpartition(".")[2]
        module["type"] = f"sentence_transformers.base.modules.{name.lower()}.{name}"
    (tuned / "modules.json").write_text(json.dumps(modules))
    flags = json.loads((tuned / "1_Pooling/config.json").read_text())
    (mode,) = (flag for flag, on in flags.items() if on is True and flag.startswith("pooling_mode_"))
    other = {"embedding_dimension": 32, "pooling_mode": {"pooling_mode_cls_token": "cls"}.get(mode, "mean")}
    (tuned / "1_Pooling/config.json").write_text(json.dumps(other))
    merge(settings_for([encoders[0], tuned], tmp_path / "renamed"))
    for name in ("modules.json", "1_Pooling/config.json"):
        (tuned / name).unlink()
    merge(settings_for([encoders[0], tuned], tmp_path / "out"))
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([0.5, 0.6], "sum to 1"),
        ([1.0, 0.0], r"each must be above 0, 0 is not"),
        ([1.2, -0.2], r"each must be above 0, -0.2 is not"),
        ([float("nan"), 0.5], r"each must be above 0, nan is not"),
        ([1.0], "one for each"),
        ([0.1, 0.2], "sum to 1"),
    ],
)
def test_impossible_weights_are_refused(given: list[float], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        settings_for([Path("a"), Path("b")], "c", weights=given)


def test_a_rerun_has_nothing_to_do_and_a_killed_one_leaves_no_model(
    encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "out", settings_for(encoders, tmp_path / "out")
    assert "to be done" in plan_merged(asked)
    assert not out.exists()
    merge(asked)
    whole = snapshot(out)
    assert merge(asked).outcome == "nothing to do"
    assert "up to date" in plan_merged(asked)
    others = settings_for(encoders[:2], out)

    class Killed(BaseException):
        pass

    # A merge that dies on the way leaves no config.json: no half of it is a model.
    put, left = OwnedFolder.put, [4]

    def dying(self: OwnedFolder, name: str, data: bytes) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        put(self, name, data)

    monkeypatch.setattr(OwnedFolder, "put", dying)
    with pytest.raises(Killed):
        merge(others)
    monkeypatch.undo()
    assert not (out / "config.json").exists()
    merge(others)
    merge(settings_for(encoders[:2], tmp_path / "twin"))
    assert snapshot(out) == snapshot(tmp_path / "twin") != whole
    assert not (out / "work").exists()


def test_a_foreign_file_is_refused_before_anything_is_written(encoders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    with pytest.raises(OutputCollisionError, match=r"config\.json"):
        merge(settings_for(encoders, out))
    assert [path.name for path in out.iterdir()] == ["config.json"]
    with pytest.raises(OutputCollisionError):
        merge(settings_for(encoders, encoders[0]))
    with pytest.raises(SettingsError, match="named twice"):
        merge(settings_for([encoders[0], encoders[0]], tmp_path / "x"))


def examples(path: Path) -> str:
    records = [
        {
            "query": f"what is {word}",
            "pos": [f"{word} is a word"],
            "neg": [f"{other} jumps" for other in ("fox", "ray", "index")],
        }
        for word in ("faiss", "dog", "corpus", "storage", "python")
    ]
    records += [{"query": "without negatives", "pos": ["p"]}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def loss_by_torch(folder: Path, path: str) -> float:
    """LM-Cocktail's loss: batches of two, passages of both, cosine over 0.05, the mean over batches."""
    records = [json.loads(line) for line in Path(path).read_text().splitlines()][:5]
    losses = []
    for start in range(0, 5, 2):
        batch = records[start : start + 2]
        passages = [text for r in batch for text in (r["pos"][0], *(r["neg"] * 3)[:7])]
        q = torch.from_numpy(vectors(folder, [r["query"] for r in batch]))
        scores = q @ torch.from_numpy(vectors(folder, passages)).T / 0.05
        losses.append(torch.nn.functional.cross_entropy(scores, torch.arange(len(batch)) * 8).item())
    return float(np.mean(losses))


def test_weights_from_examples_equal_the_softmax_of_losses(encoders: list[Path], tmp_path: Path) -> None:
    path = examples(tmp_path / "examples.jsonl")
    report = merge(settings_for(encoders, tmp_path / "out", examples=path, temperature=0.1))
    losses = [loss_by_torch(folder, path) for folder in encoders]
    assert [model.loss for model in report.models] == pytest.approx(losses, abs=1e-4)
    truth = torch.softmax(-torch.tensor(losses) / 0.1, -1).tolist()
    assert [model.weight for model in report.models] == pytest.approx(truth, abs=1e-3)
    assert report.examples == 5
    parts = [weights_of(folder)["pooler.dense.weight"] for folder in encoders]
    mean = sum(m.weight * part for m, part in zip(report.models, parts, strict=True))
    torch.testing.assert_close(weights_of(tmp_path / "out")["pooler.dense.weight"], mean)
    again = settings_for(encoders, tmp_path / "out", examples=path, temperature=0.1)
    assert merge(again).outcome == "nothing to do"
    with pytest.raises(CorpusError, match="no line has"):
        (tmp_path / "none.jsonl").write_text('{"query": "q", "pos": ["p"]}\n')
        merge(settings_for(encoders, tmp_path / "x", examples=str(tmp_path / "none.jsonl")))


def test_the_loss_of_groups_by_hand() -> None:
    one = np.zeros((1, 4), np.float32)
    one[0, 0] = 1
    passages = np.zeros((1 + NEGATIVES, 4), np.float32)
    passages[0, 0] = 1
    passages[1:, 1] = 1
    # Only the positive has a score, 20: the loss is log(1 + 7 exp(-20)).
    assert group_loss(one, passages) == pytest.approx(np.log1p(7 * np.exp(-20.0)), rel=1e-6)
    assert loss_weights([1.0, 1.0], 5) == [0.5, 0.5]
    assert loss_weights([0.0, 1e6], 0.1) == [1.0, 0.0]


def test_a_large_model_is_never_held(tmp_path: Path, encoders: list[Path]) -> None:
    """Its tensors pass one by one: as many pieces of bytes as there are tensors, and a header."""
    work = MergeWork(settings_for(encoders, tmp_path / "out"))
    seen = [len(data) for data in merged_bytes(work.plan.weights[0], [1 / 3] * 3)]
    carry_out(work, RunFacts("merge"), None)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        names = list(file.keys())
    assert len(seen) == 1 + len(names)
    assert sum(seen) == (tmp_path / "out" / "model.safetensors").stat().st_size
