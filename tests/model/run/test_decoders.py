"""Decoders on a CPU: packed, padded and one by one are the same, and the same as transformers' own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from bge_ray.model.run.packed import Reach, attend, attend_by_kernel, equal_runs, is_packable
from tests.model.conftest import encode, vectors
from tests.support.models import make_decoder
from tests.support.slow import slow_but
from tests.support.varlen import register_reference

pytestmark = pytest.mark.long

# What is told apart: the model type, and what of its configuration is changed.
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen2-both-ways": ("qwen2", {"is_causal": False}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None}),
}


@pytest.fixture(
    scope="module",
    params=slow_but(["mistral", "qwen2-windows", "qwen2-both-ways", "qwen3", "gemma2"], KINDS),
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, changes = KINDS[request.param]
    return make_decoder(tmp_path_factory.mktemp("decoders") / request.param, kind, **changes)


def alone(folder: Path, texts: list[str], attention: str = "eager") -> np.ndarray:
    """Return the unit vectors of texts one by one through transformers' own code."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation=attention).eval()
    found = []
    with torch.no_grad():
        for text in texts:
            inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            state = model(**inputs, use_cache=False).last_hidden_state[0, -1]
            found.append(torch.nn.functional.normalize(state, dim=-1).numpy())
    return np.stack(found)


def test_packed_padded_and_one_by_one_are_transformers(folder: Path, texts: list[str]) -> None:
    expected = alone(folder, texts)
    assert is_packable(AutoConfig.from_pretrained(folder))
    for packed in (True, False):
        for budget in (1, 300, 100_000):
            got = encode(folder, texts, packed=packed, budget=budget)
            assert not got.faults
            np.testing.assert_allclose(vectors(got), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", slow_but(["mean"], ["cls", "mean"]))
def test_other_poolings_packed_and_padded(folder: Path, texts: list[str], pooling: str) -> None:
    packed, padded = (encode(folder, texts, packed=how, pooling=pooling) for how in (True, False))
    np.testing.assert_allclose(vectors(packed), vectors(padded), atol=1e-5, rtol=0)


def test_the_soft_cap_changes_vectors(tmp_path: Path, texts: list[str]) -> None:
    """Else the test above would not see it dropped."""
    capped = make_decoder(tmp_path / "capped", "gemma2")
    plain = make_decoder(tmp_path / "plain", "gemma2", attn_logit_softcapping=None)
    difference = np.abs(vectors(encode(capped, texts)) - vectors(encode(plain, texts)))
    assert difference.max() > 0.01


@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("one_query", [True, False])
def test_attention_against_a_loop(
    monkeypatch: pytest.MonkeyPatch, window: int | None, softcap: float | None, causal: bool, one_query: bool
) -> None:
    monkeypatch.setattr("bge_ray.model.run.packed.CAPPED_QUERIES", 3)
    torch.manual_seed(1)
    lengths = np.array([8, 8, 5, 1, 1, 1])
    borders = np.concatenate([[0], np.cumsum(lengths)])
    total, heads, key_heads, dim = int(borders[-1]), 6, 2, 8
    q = torch.randn(len(lengths) if one_query else total, heads, dim)
    k, v = torch.randn(total, key_heads, dim), torch.randn(total, key_heads, dim)
    expected = torch.zeros_like(q)
    at = 0
    for row, length in enumerate(lengths):
        for place in [length - 1] if one_query else range(length):
            first = max(0, place - (window or length) + 1) if causal else 0
            last = place + 1 if causal else length
            seen = slice(int(borders[row]) + first, int(borders[row]) + last)
            for head in range(heads):
                scores = k[seen, head // 3] @ q[at, head] * 0.9
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                expected[at, head] = torch.softmax(scores, 0) @ v[seen, head // 3]
            at += 1
    borders32, reach = torch.from_numpy(borders).int(), Reach(causal, window if causal else None, softcap)
    got = attend(
        q,
        k,
        v,
        cu_seqlens=borders32,
        runs=equal_runs(lengths),
        max_seqlen=8,
        scaling=0.9,
        one_query=one_query,
        reach=reach,
    )
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    if softcap is None:
        got = attend_by_kernel(q, k, v, borders32, 8, 0.9, reach)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def kernel_on_cpu() -> None:
    register_reference()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("mistral", {"is_causal": False}),
        ("gemma2", {"use_bidirectional_attention": True}),
    ],
)
def test_what_is_not_known_to_be_right_is_padded(kind: str, changes: dict[str, object]) -> None:
    assert not is_packable(AutoConfig.for_model(kind, **changes))
