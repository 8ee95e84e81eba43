"""What a model costs, against torch's own count."""

from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from bge_ray.bench.machine import count_flop, matrix_rate
from bge_ray.model.run.inputs import packed_inputs
from bge_ray.model.run.last_layer import keep_one_token
from bge_ray.model.run.packed import ATTENTION, register
from bge_ray.records.tokens import PackedTokens

LENGTHS = [3, 17, 64]


def test_the_flop_of_a_forward_pass_are_those_that_torch_counts(tiny_model: Path) -> None:
    model = AutoModel.from_pretrained(tiny_model, attn_implementation="eager", add_pooling_layer=False)
    counted = 0
    for length in LENGTHS:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(torch.ones((1, length), dtype=torch.long))
        counted += counter.get_total_flops()
    assert count_flop(str(tiny_model), np.array(LENGTHS), one_token=False) == counted


def test_the_flop_of_one_token_a_row_are_those_of_our_packed_forward_pass(tiny_model: Path) -> None:
    register()
    model = AutoModel.from_pretrained(tiny_model, attn_implementation=ATTENTION, add_pooling_layer=False)
    keep_one_token(model, {"first_token"})
    offsets = np.cumsum([0, *LENGTHS]).astype(np.int32)
    tokens = PackedTokens(np.ones(offsets[-1], np.int32), offsets, np.zeros(len(LENGTHS), np.bool_))
    inputs = packed_inputs(tokens, np.arange(len(LENGTHS)), model.config, torch.device("cpu"))
    # The CPU's flash kernel is not among those that torch counts.
    math = sdpa_kernel(SDPBackend.MATH)
    with math, torch.inference_mode(), FlopCounterMode(display=False) as counter:
        hidden = model(**inputs.arguments).last_hidden_state
    assert hidden.shape == (1, len(LENGTHS), 32)
    flop = count_flop(str(tiny_model), np.array(LENGTHS), one_token=True)
    assert counter.get_total_flops() == flop


def test_a_float32_matrix_rate_is_above_what_any_machine_of_today_would_miss() -> None:
    assert matrix_rate("cpu", "float32") > 1e9
