"""The way that packed attention takes on a GPU, run on a CPU, of every family that packs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.model.conftest import encode, vectors
from tests.support.models import make_decoder, make_encoder
from tests.support.slow import slow_but
from tests.support.varlen import attend_by_reference

pytestmark = pytest.mark.long

# The model type, and what of its configuration is changed.
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "bert": ("bert", {}),
    "xlm-roberta": ("xlm-roberta", {}),
    "llama": ("llama", {}),
    "mistral-with-windows": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-both-ways": ("qwen2", {"is_causal": False}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None}),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, changes = KINDS[request.param]
    path = tmp_path_factory.mktemp("kernels") / request.param
    if kind in ("bert", "xlm-roberta"):
        return make_encoder(path, kind=kind, positions=128)
    return make_decoder(path, kind, **changes)


@pytest.mark.parametrize("pooling", slow_but(["last_token"], ["cls", "mean", "last_token"]))
def test_it_gives_what_the_padded_path_gives(
    folder: Path, texts: list[str], pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = vectors(encode(folder, texts, pooling=pooling, packed=False))
    attend_by_reference(monkeypatch)
    for budget in (1, 300, 100_000):
        got = encode(folder, texts, pooling=pooling, packed=True, budget=budget)
        assert not got.faults
        np.testing.assert_allclose(vectors(got), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
def test_fused_layers_give_what_they_give_padded(
    tmp_path: Path, texts: list[str], kind: str, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_encoder(tmp_path / kind, kind=kind, positions=128)
    asked = {"pooling": pooling, "kernels": "fused"}
    expected = vectors(encode(folder, texts, packed=False, **asked))
    attend_by_reference(monkeypatch)
    np.testing.assert_allclose(
        vectors(encode(folder, texts, packed=True, **asked)), expected, atol=1e-5, rtol=0
    )


def test_borders_that_are_left_out_of_account_show(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would not see rows that look into each other."""
    folder = make_encoder(tmp_path / "bert", positions=128)
    expected = vectors(encode(folder, texts, pooling="mean", packed=True))

    def leaks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q, k, v))
        ).transpose(0, 1)

    monkeypatch.setattr("bge_ray.model.run.packed.attend", leaks)
    got = vectors(encode(folder, texts, pooling="mean", packed=True, budget=100_000))
    assert (got * expected).sum(1).min() < 0.99
