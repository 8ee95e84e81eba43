"""The three outputs of an m3 equal those of FlagEmbedding, whatever shares the batch."""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.run.model import Model
from bge_ray.model.run.result import Result
from bge_ray.model.spec import text_feeder
from bge_ray.records.model import ModelSpec
from tests.model.conftest import load, resolve, run, vectors
from tests.support.models import make_m3

ALL = ("embedding", "sparse", "colbert")
ODD = ["", " ", "</s> fox </s>", "fox <unk> <mask> fox fox", "狐狸和狗" * 100, "the " * 500]
Lexical = dict[int, float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads in .pt, as FlagEmbedding reads them."""
    return make_m3(tmp_path_factory.mktemp("m3") / "model", colbert_dim=24, pickled=True)


@functools.cache
def spec_of(folder: Path, **changes: Any) -> ModelSpec:
    """What is stored stays float32."""
    return resolve(folder, **({"outputs": ALL} | changes)).stored_as("float32")


@functools.cache
def model_of(spec: ModelSpec, *, packed: bool) -> tuple[Model, TextFeeder]:
    return load(spec, packed=packed), text_feeder(spec)


def outputs(
    folder: Path, texts: Sequence[str], *, budget: int = 512, packed: bool = True, **changes: Any
) -> Result:
    """Run texts as passages."""
    model, feeder = model_of(spec_of(folder, **changes), packed=packed)
    return run(model, feeder.passages(texts), budget)


def lexical(result: Result) -> list[Lexical]:
    rows = result.columns()["sparse"].to_pylist()
    for row in rows:
        assert row["indices"] == sorted(set(row["indices"]))
    return [dict(zip(row["indices"], row["values"], strict=True)) for row in rows]


def colbert(result: Result) -> list[np.ndarray]:
    column, dtype = result.columns()["colbert"], result.outputs[-1].dtype
    rows = [np.frombuffer(b"".join(row), dtype) for row in column.to_pylist()]
    return [row.reshape(-1, result.outputs[-1].dim) for row in rows]


def assert_same(a: Result, b: Result, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(vectors(a), vectors(b), atol=atol, rtol=0)
    for ours, theirs in zip(lexical(a), lexical(b), strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=atol, rtol=0)
    for one, other in zip(colbert(a), colbert(b), strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def flag(folder: Path):
    from FlagEmbedding import BGEM3FlagModel

    return BGEM3FlagModel(str(folder), use_fp16=False, devices="cpu", colbert_dim=24)


@pytest.mark.parity
@pytest.mark.parametrize("max_length", [16, 128])
def test_equal_flagembedding(folder: Path, flag, texts: list[str], max_length: int) -> None:
    texts = [*texts, *ODD]
    theirs = flag.encode_corpus(
        texts,
        batch_size=7,
        max_length=max_length,
        return_dense=True,
        return_sparse=True,
        return_colbert_vecs=True,
    )
    for packed, budget in ((True, 512), (True, 60), (False, 512), (False, 128)):
        ours = outputs(folder, texts, budget=budget, packed=packed, max_length=max_length)
        assert not ours.faults
        np.testing.assert_allclose(vectors(ours), theirs["dense_vecs"], atol=1e-5, rtol=0)
        n_weights = sum(len(weights) for weights in theirs["lexical_weights"])
        assert 0.3 < n_weights / sum(len(vecs) for vecs in theirs["colbert_vecs"]) < 0.9
        for mine, flags in zip(lexical(ours), theirs["lexical_weights"], strict=True):
            assert mine.keys() == {int(token) for token in flags}
            np.testing.assert_allclose(
                list(mine.values()), [flags[str(token)] for token in mine], atol=1e-4, rtol=0
            )
        for mine, flags in zip(colbert(ours), theirs["colbert_vecs"], strict=True):
            assert mine.shape == flags.shape
            np.testing.assert_allclose(mine, flags, atol=1e-4, rtol=0)


def test_a_row_alone_is_as_in_a_full_batch(folder: Path, texts: list[str]) -> None:
    texts = [*texts[:12], *ODD]
    together = outputs(folder, texts, budget=4096)
    assert together.batches == 1
    for packed in (True, False):
        assert_same(outputs(folder, texts, budget=1, packed=packed), together)
    assert_same(outputs(folder, texts, budget=4096, packed=False), together)


def test_an_empty_text_has_one_vector_and_no_weight(folder: Path) -> None:
    result = outputs(folder, ["", "fox", ""])
    assert [len(row) for row in lexical(result)][::2] == [0, 0]
    assert [len(row) for row in colbert(result)] == [
        1,
        len(text_feeder(resolve(folder)).passages(["fox"]).input_ids) - 1,
        1,
    ]


@pytest.mark.slow
def test_any_subset_gives_the_same_columns(folder: Path, texts: list[str]) -> None:
    whole = outputs(folder, texts)
    for asked in (("sparse",), ("embedding", "colbert"), ("embedding",)):
        result = outputs(folder, texts, outputs=asked)
        assert list(result.columns()) == [name for name in ALL if name in asked]
        for name in asked:
            if name != "embedding":
                assert result.columns()[name].equals(whole.columns()[name]), name
        if "embedding" in asked:  # whose last layer is done for one token where it is the only one
            np.testing.assert_allclose(vectors(result), vectors(whole), atol=1e-5, rtol=0)
    assert [o.name for o in spec_of(folder, outputs=("colbert", "sparse")).outputs] == ["sparse", "colbert"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(folder: Path, texts: list[str], dtype: str) -> None:
    """Float32 arithmetic after the linear layers: vectors of unit norm, weights that hardly move."""
    exact, half = outputs(folder, texts), outputs(folder, texts, dtype=dtype, packed=False)
    digits = 5e-3 if dtype == "float16" else 5e-2
    for mine, truth in zip(colbert(half), colbert(exact), strict=True):
        np.testing.assert_allclose(np.linalg.norm(mine, axis=1), 1, atol=1e-6)
        assert (mine * truth).sum(1).min() > 1 - digits
    for mine, truth in zip(lexical(half), lexical(exact), strict=True):
        for token in mine.keys() | truth.keys():
            assert abs(mine.get(token, 0.0) - truth.get(token, 0.0)) < 4 * digits


def test_stored_halves_are_those_of_the_exact_numbers(folder: Path, texts: list[str]) -> None:
    exact = outputs(folder, texts).columns()
    spec = resolve(folder, outputs=ALL)  # as a data set has them
    assert [(o.name, o.dtype) for o in spec.outputs] == [
        ("embedding", "float32"),
        ("sparse", "float16"),
        ("colbert", "float16"),
    ]
    stored = run(load(spec), text_feeder(spec).passages(texts)).columns()
    assert stored["sparse"].type == spec.output("sparse").type()
    for mine, truth in zip(stored["sparse"].to_pylist(), exact["sparse"].to_pylist(), strict=True):
        assert mine["indices"] == truth["indices"]
        assert mine["values"] == np.asarray(truth["values"], np.float16).tolist()
    for mine, truth in zip(stored["colbert"].to_pylist(), exact["colbert"].to_pylist(), strict=True):
        assert b"".join(mine) == np.frombuffer(b"".join(truth), np.float32).astype(np.float16).tobytes()


def test_a_weight_that_is_no_number_is_found_out(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    torch.save(
        {"weight": torch.full((1, 32), float("nan")), "bias": torch.zeros(1)}, broken / "sparse_linear.pt"
    )
    for packed in (True, False):
        result = outputs(broken, ["a fox", "a dog"], outputs=("sparse",), packed=packed)
        assert {reason for reason, _ in result.faults.values()} == {"non_finite"}
        assert sorted(result.faults) == [0, 1]


@pytest.mark.slow
def test_8192_tokens(tmp_path: Path) -> None:
    folder = make_m3(tmp_path / "long", dim=8, positions=8192)
    spec = spec_of(folder)
    assert spec.max_length == 8192
    feeder = text_feeder(spec)
    tokens = feeder.passages(["the fox and the dog " * 3000, "a fox"])
    assert tokens.lengths.tolist() == [8192, len(feeder.passages(["a fox"]).input_ids)]
    assert tokens.truncated.tolist() == [True, False]
    packed, padded = (run(load(spec, packed=p), tokens, 16_384) for p in (True, False))
    assert [len(row) for row in colbert(packed)] == (tokens.lengths - 1).tolist()
    assert_same(packed, padded)
