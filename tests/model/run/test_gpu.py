"""The CUDA path: packed half precision through varlen_attn, overlapping batches, real lack of memory."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bge_ray.model.encoder import Encoded, Encoder
from bge_ray.model.feed.pairs import PairTokenizer
from bge_ray.model.feed.tokenizer import Tokenizer
from bge_ray.model.reranker import Reranker
from bge_ray.model.reranker_spec import resolve_reranker
from bge_ray.records.tokens import PackedTokens
from tests.model.conftest import MakeModel, cosines, encode, resolve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def encode_cuda(
    folder: Path, texts: list[str], dtype: str, packed: bool | None, budget: int = 512
) -> Encoded:
    spec = resolve(folder, dtype=dtype)
    encoder = Encoder(spec, device="cuda", packed=packed)
    tokens = Tokenizer(folder, spec.max_length).tokenise(texts)
    result = encoder.empty_result(len(texts))
    encoder.encode(tokens, encoder.cut(tokens.lengths, budget), result)
    return result


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
    assert cosines(result.embeddings, encode(folder, texts).embeddings).min() > limit
    if packed is None:  # heads of 8 numbers are what the kernels take
        assert result.padded_tokens == Tokenizer(folder, 128).tokenise(texts).offsets[-1]


def test_float32_is_padded_and_equal(encoder_folder: MakeModel, texts: list[str]) -> None:
    folder = encoder_folder("bert", "cls")
    result = encode_cuda(folder, texts, "float32", None)
    np.testing.assert_allclose(result.embeddings, encode(folder, texts).embeddings, atol=1e-5, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_reranker(reranker_folder: Callable[[str], Path], texts: list[str], kind: str, packed: bool) -> None:
    folder = reranker_folder(kind)
    pairs = PairTokenizer(folder, 128).tokenise([texts[0]] * len(texts), texts)
    scores = []
    for device, dtype in (("cpu", "float32"), ("cuda", "float16")):
        spec = resolve_reranker(str(folder), dtype=dtype, on_gpu=True)
        reranker = Reranker(spec, device=device, packed=packed)
        result = reranker.empty_result(len(texts))
        reranker.score(pairs, reranker.cut(pairs.tokens.lengths, 512), result)
        assert not result.faults
        scores.append(result.scores)
    assert np.corrcoef(scores[0], scores[1])[0, 1] > 0.999


@pytest.mark.parametrize("packed", [False, True])
def test_batch_that_does_not_fit_is_halved(encoder_folder: MakeModel, packed: bool) -> None:
    encoder = Encoder(resolve(encoder_folder("bert", "cls"), dtype="float16"), device="cuda", packed=packed)
    n = 20_000
    tokens = PackedTokens(
        np.full(n * 100, 7, np.int32), np.arange(n + 1, dtype=np.int32) * 100, np.zeros(n, np.bool_)
    )
    result = encoder.empty_result(n)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (256 << 20)) / total)
    try:
        encoder.encode(tokens, [np.arange(n, dtype=np.int64)], result)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not result.faults and result.batches > 1
    assert np.isfinite(result.embeddings).all() and result.embeddings.any(axis=1).all()
