"""What a model costs, against torch's own count."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from bge_ray.bench.machine import count_flop, matrix_rate


def test_the_flop_of_a_forward_pass_are_those_that_torch_counts(tiny_model: Path) -> None:
    model = AutoModel.from_pretrained(tiny_model, attn_implementation="eager", add_pooling_layer=False)
    lengths = [3, 17, 64]
    counted = 0
    for length in lengths:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(torch.ones((1, length), dtype=torch.long))
        counted += counter.get_total_flops()
    assert count_flop(str(tiny_model), np.array(lengths)) == counted


def test_a_float32_matrix_rate_is_above_what_any_machine_of_today_would_miss() -> None:
    assert matrix_rate("cpu", "float32") > 1e9
