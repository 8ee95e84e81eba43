"""The CUDA path: packed half precision through varlen_attn, overlapping batches, real lack of memory."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.run.memory import card_of
from bge_ray.model.run.result import Result
from bge_ray.model.spec import pair_feeder, resolve_reranker, text_feeder
from bge_ray.records.model import SCORE
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import RerankSettings
from tests.model.conftest import MakeModel, cosines, encode, load, resolve, run, vectors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def encode_cuda(folder: Path, texts: list[str], dtype: str, packed: bool | None, budget: int = 512) -> Result:
    spec = resolve(folder, dtype=dtype).stored_as("float32")
    return run(load(spec, "cuda", packed), text_feeder(spec).passages(texts), budget)


@pytest.mark.parametrize("packed", [False, True, None])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
def test_close_to_float32_on_the_cpu(
    encoder_folder: MakeModel, texts: list[str], kind: str, pooling: str, dtype: str, packed: bool | None
) -> None:
    folder = encoder_folder(kind, pooling)
    result = encode_cuda(folder, texts, dtype, packed)
    assert not result.faults
    limit = 0.999 if dtype == "float16" else 0.99
    assert cosines(vectors(result), vectors(encode(folder, texts))).min() > limit
    if packed is None:  # heads of 8 numbers are what the kernels take
        assert result.padded_tokens == TextFeeder(folder, 128).passages(texts).offsets[-1]


def test_float32_is_padded_and_equal(encoder_folder: MakeModel, texts: list[str]) -> None:
    folder = encoder_folder("bert", "cls")
    result = encode_cuda(folder, texts, "float32", None)
    np.testing.assert_allclose(vectors(result), vectors(encode(folder, texts)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_reranker(reranker_folder: Callable[[str], Path], texts: list[str], kind: str, packed: bool) -> None:
    folder = reranker_folder(kind)
    scores = []
    for device, dtype in (("cpu", "float32"), ("cuda", "float16")):
        spec = resolve_reranker(RerankSettings(model=str(folder), dtype=dtype, max_length=128), on_gpu=True)
        pairs = pair_feeder(spec).pairs([texts[0]] * len(texts), texts)
        result = run(load(spec, device, packed), pairs)
        assert not result.faults
        scores.append(result.array(SCORE))
    assert np.corrcoef(scores[0], scores[1])[0, 1] > 0.999


@pytest.mark.parametrize("packed", [False, True])
def test_batch_that_does_not_fit_is_halved(encoder_folder: MakeModel, packed: bool) -> None:
    model = load(resolve(encoder_folder("bert", "cls"), dtype="float16"), "cuda", packed)
    n = 20_000
    tokens = PackedTokens(
        np.full(n * 100, 7, np.int32), np.arange(n + 1, dtype=np.int32) * 100, np.zeros(n, np.bool_)
    )
    result = model.empty_result(n)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (256 << 20)) / total)
    try:
        model.run(tokens, [np.arange(n, dtype=np.int64)], result)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not result.faults and result.batches > 1
    assert np.isfinite(vectors(result)).all() and vectors(result).any(axis=1).all()


def test_the_card_tells_what_its_batches_are_reckoned_from(encoder_folder: MakeModel) -> None:
    card = card_of(torch.device("cuda"))
    assert card is not None
    assert card.cache_bytes >= 1 << 20
    assert card.processors >= 8
    model = load(resolve(encoder_folder("bert", "cls"), dtype="float16"), "cuda")
    assert model.settle_budget("auto") >= 4096
    assert model.settle_budget(77) == 77
