"""What the last layer gives for one token a row is what the whole layer gives there."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from bge_ray.model.run.inputs import packed_inputs
from bge_ray.model.run.last_layer import keep_one_token
from bge_ray.model.run.packed import ATTENTION, register
from bge_ray.records.tokens import PackedTokens


@pytest.fixture(scope="module")
def whole() -> BertModel:
    register()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    config._attn_implementation = ATTENTION
    return BertModel(config, add_pooling_layer=False).eval()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(["first_token", "last_token"]))
@settings(max_examples=60)
def test_one_token_of_rows_of_any_lengths(whole: BertModel, lengths: list[int], token: str) -> None:
    one = copy.deepcopy(whole)
    keep_one_token(one, {token})
    borders = np.cumsum([0, *lengths])
    ids = (np.arange(borders[-1]) * 7 % 50).astype(np.int32)
    tokens = PackedTokens(ids, borders.astype(np.int32), np.zeros(len(lengths), np.bool_))
    inputs = packed_inputs(tokens, np.arange(len(lengths)), whole.config, torch.device("cpu"))
    taken = borders[:-1] if token == "first_token" else borders[1:] - 1
    with torch.inference_mode():
        expected = whole(**inputs.arguments).last_hidden_state[:, taken]
        got = one(**inputs.arguments).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
