"""Small models of each kind and pooling, made once a session, and texts of every length."""

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from bge_ray.model.run.model import Model, Place
from bge_ray.model.run.result import Result
from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
from bge_ray.records.model import EMBEDDING, ModelSpec
from bge_ray.records.tokens import PackedTokens
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
    return resolve_encoder(ModelSettings(name=str(folder), **changes), on_gpu=False)


def load(spec: ModelSpec, device: str = "cpu", packed: bool | None = None) -> Model:
    return Model(spec, model_folder(spec), Place(device), packed)


def run(model: Model, tokens: PackedTokens, budget: int = 512) -> Result:
    result = model.empty_result(len(tokens))
    model.run(tokens, model.cut(tokens, budget), result)
    return result


def encode(
    folder: Path, texts: Sequence[str], *, budget: int = 512, packed: bool | None = None, **changes: object
) -> Result:
    """Run texts as passages; vectors stay float32, also where they are computed in half precision."""
    spec = resolve(folder, **changes).stored_as("float32")
    return run(load(spec, packed=packed), text_feeder(spec).passages(texts), budget)


def vectors(result: Result) -> np.ndarray:
    return result.array(EMBEDDING)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
