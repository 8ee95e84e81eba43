"""Small models of each kind and pooling, made once a session, and texts of every length."""

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from bge_ray.model.encoder import Encoded, Encoder
from bge_ray.model.feed.tokenizer import Tokenizer

from bge_ray.model.source import resolve_model
from bge_ray.records.model import ModelSpec
from bge_ray.settings.sections import ModelSettings
from tests.support.models import SENTENCES, make_cross_encoder, make_encoder

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
torch.set_num_threads(1)

MakeModel = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """(kind, pooling) to the folder of a random encoder with 128 positions."""
    root = tmp_path_factory.mktemp("encoders")
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, pooling: str) -> Path:
        if (kind, pooling) not in made:
            folder = root / f"{kind}-{pooling}"
            made[kind, pooling] = make_encoder(folder, kind=kind, pooling=pooling, positions=128)
        return made[kind, pooling]

    return make


@pytest.fixture(scope="session")
def reranker_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind to the folder of a random cross-encoder with 128 positions."""
    root = tmp_path_factory.mktemp("rerankers")
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_cross_encoder(root / kind, kind=kind, positions=128)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Short, long, overlong and odd texts, in no order of length."""
    rng = random.Random(5)
    words = " ".join(SENTENCES).split()
    made = [" ".join(rng.choices(words, k=rng.choice([1, 2, 5, 20, 60, 200]))) for _ in range(40)]
    return [
        *SENTENCES,
        *made,
        "a",
        "x" * 500,
        "为这个句子生成表示以用于检索相关文章" * 30,
        "tab\tand\n\nlines",
    ]


def resolve(folder: Path, **changes: object) -> ModelSpec:
    return resolve_model(ModelSettings(name=str(folder), **changes), on_gpu=False)


def encode(
    folder: Path,
    texts: Sequence[str],
    *,
    instruction: str = "",
    budget: int = 512,
    packed: bool | None = None,
    **changes: object,
) -> Encoded:
    spec = resolve(folder, **changes)
    encoder = Encoder(spec, device="cpu", packed=packed)
    tokens = Tokenizer(folder, spec.max_length).tokenise(texts, instruction=instruction)
    result = encoder.empty_result(len(texts))
    encoder.encode(tokens, encoder.cut(tokens.lengths, budget), result)
    return result


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
