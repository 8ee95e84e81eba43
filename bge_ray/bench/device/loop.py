"""The bare loop: `Model.run` over units of tokens, by shape, lengths, token budget and kernels."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bge_ray.bench.device.ceilings import square_rate
from bge_ray.bench.device.plan import Note, Plan
from bge_ray.bench.device.shapes import (
    KERNELS,
    SPEED,
    Variant,
    load_encoder,
    make_model,
    natural_lengths,
    random_rows,
)
from bge_ray.bench.machine import count_flop
from bge_ray.model.run.model import Model


def run(plan: Plan, note: Note) -> None:
    """Note tokens/s and the share of the matrix rate of each; what is left out for want of time is named."""
    rate = square_rate(plan, plan.half)
    note("matrix", rate)
    rows: list[dict[str, Any]] = []
    left_out = []
    for shape, budgets, lengths, variants in _sweep(plan):
        if plan.left < 10:
            left_out.append(shape)
            continue
        folder = make_model(SPEED[shape], Path(plan.work) / f"speed-{shape}")
        for kernels in variants:
            model = load_encoder(folder, Variant(plan.half, kernels), plan.device, SPEED[shape].positions)
            for mix in lengths:
                for budget in budgets:
                    if plan.left < 5:
                        left_out.append(f"{shape} {kernels} {mix} {budget}")
                        continue
                    rows.append(_measure(plan, model, (shape, folder, kernels, mix, budget), rate))
                    note("rows", rows)
            del model
            if plan.on_gpu:
                torch.cuda.empty_cache()
    note("left_out", left_out)


def _sweep(plan: Plan) -> list[tuple[str, tuple[int, ...], tuple[str, ...], tuple[str, ...]]]:
    """Shape, budgets, lengths, kernels; the most telling first."""
    if not plan.on_gpu:
        return [("minilm", (512, 1_024, 4_096), ("natural", "512"), KERNELS)]
    most = (16_384, 32_768, 65_536, 131_072)
    both = ("512", "natural")
    return [
        ("base", most, both, ("fused",)),
        ("base", (32_768,), both, ("plain",)),
        ("large", (16_384, 32_768, 65_536), both, ("fused",)),
        ("large", (32_768,), both, ("plain",)),
        ("small", (65_536, 131_072), both, ("fused",)),
        ("m3", (32_768,), ("natural", "8192"), ("fused",)),
        ("small", (65_536,), both, ("plain",)),
        ("m3", (32_768,), ("natural", "8192"), ("plain",)),
        ("base", (8_192,), both, KERNELS),
        ("minilm", (65_536,), ("natural",), KERNELS),
    ]


def lengths_of(mix: str, n_tokens: int) -> np.ndarray:
    """Return lengths of a mix, natural or a number of tokens each, which come to about so many together."""
    if mix == "natural":
        return natural_lengths(n_tokens // 85)
    return np.full(max(1, n_tokens // int(mix)), int(mix), np.int64)


def _measure(plan: Plan, model: Model, case: tuple[str, Path, str, str, int], rate: float) -> dict[str, Any]:
    shape, folder, kernels, mix, budget = case
    lengths = lengths_of(mix, 1_000_000 if plan.on_gpu else 4_000)
    tokens = random_rows(lengths, SPEED[shape].vocabulary)
    batches = model.cut(tokens, budget)
    model.warm_up(budget)
    model.run(tokens, batches[:2] + batches[-2:], model.empty_result(len(tokens)))
    if plan.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    taken: list[float] = []
    deadline = time.perf_counter() + (0.9 if plan.on_gpu else 2.0)
    while len(taken) < 3 or time.perf_counter() < deadline:
        result = model.empty_result(len(tokens))
        started = time.perf_counter()
        model.run(tokens, batches, result)
        taken.append(time.perf_counter() - started)
    second = statistics.median(taken)
    flop = count_flop(str(folder), lengths, one_token=True)
    return {
        "shape": shape,
        "lengths": mix,
        "budget": budget,
        "kernels": kernels,
        "tokens_per_s": float(lengths.sum()) / second,
        "rows_per_s": len(lengths) / second,
        "share": flop / second / rate,
        "batches": len(batches),
        "ms_a_batch": 1e3 * second / len(batches),
        "spread": (max(taken) - min(taken)) / second,
        "peak_bytes": torch.cuda.max_memory_allocated() if plan.on_gpu else None,
    }
