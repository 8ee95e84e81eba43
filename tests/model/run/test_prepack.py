"""Prepacked linear layers compute what torch.nn.Linear computes, on every way through them."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel

from bge_ray.model.run.prepack import PrepackedLinear, prepack_linears

BFLOAT16 = pytest.param(
    torch.bfloat16,
    2e-2,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 kernel for this CPU"
    ),
)


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), BFLOAT16])
def test_layer(rows: int, gelu: bool, bias: bool, dtype: torch.dtype, close: float) -> None:
    torch.manual_seed(rows)
    linear = torch.nn.Linear(48, 33, bias=bias, dtype=dtype)
    packed = PrepackedLinear(linear)
    if gelu:
        packed.fuse_gelu()
    states = torch.randn(2, rows, 48, dtype=dtype)
    with torch.inference_mode():
        expected = torch.nn.functional.gelu(linear(states)) if gelu else linear(states)
        torch.testing.assert_close(packed(states), expected, atol=close, rtol=close)
        torch.testing.assert_close(packed.plain(states), expected, atol=close, rtol=close)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)size|shape|dim"), torch.inference_mode():
        PrepackedLinear(torch.nn.Linear(8, 8))(torch.randn(2, 9))


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new"])
def test_whole_model(activation: str) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    config.hidden_act = activation
    model = BertModel(config).eval()
    packed = copy.deepcopy(model)
    prepack_linears(packed, torch.float32)
    assert not any(type(module) is torch.nn.Linear for module in packed.modules())
    ids = torch.arange(40).view(4, 10)
    with torch.inference_mode():
        expected, got = model(input_ids=ids).last_hidden_state, packed(input_ids=ids).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
