"""An LLM embedder of seven billion parameters on a device: loading, speed by budget, shared beginnings."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from bge_ray.bench.device.ceilings import square_rate
from bge_ray.bench.device.plan import Note, Plan
from bge_ray.bench.device.shapes import SEED, load_decoding, natural_lengths, random_rows
from bge_ray.model.run.batching import token_budget_batches
from bge_ray.model.run.executor import Executor
from bge_ray.model.run.prefix import counted_lengths, shared_tokens
from bge_ray.model.run.result import Result
from bge_ray.records.ids import IdArray
from bge_ray.records.outputs import Output
from bge_ray.records.tokens import PackedTokens

# That of e5-mistral-7b-instruct and its kin; of a CPU's only the proportions are alike.
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32_000,
}
SMALL = SIZES | {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# Tokens of an instruction with its examples, and of what is behind it.
INSTRUCTION, QUESTION = 192, 24


def run(plan: Plan, note: Note) -> None:
    """Note seconds of loading, tokens/s by lengths and budget, and what sharing an instruction is worth."""
    sizes, dtype = (SIZES, "bfloat16") if plan.on_gpu else (SMALL, "float32")
    rate = square_rate(plan, dtype)
    started = time.perf_counter()
    folder, parameters = _make(plan, sizes, dtype)
    note("model", {"parameters": parameters, "dtype": dtype, "made_s": time.perf_counter() - started})
    started = time.perf_counter()
    executor = load_decoding(folder, dtype, plan.device, packed=True)
    if plan.on_gpu:
        torch.cuda.synchronize()
    note("loaded_s", time.perf_counter() - started)
    rows: list[dict[str, Any]] = []
    for mix, lengths, budget in _cases(plan):
        if plan.left < 8:
            rows.append({"lengths": mix, "budget": budget, "left_out": "no time was left"})
            continue
        tokens = random_rows(lengths, sizes["vocab_size"])
        batches = token_budget_batches(tokens.lengths, budget, packed=True)
        taken = _seconds(plan, executor, tokens, batches, sizes["hidden_size"])
        flop = count_flop(sizes, lengths)
        rows.append(
            {
                "lengths": mix,
                "budget": budget,
                "tokens_per_s": float(lengths.sum()) / taken,
                "share": flop / taken / rate,
                "peak_bytes": torch.cuda.max_memory_allocated() if plan.on_gpu else None,
            }
        )
        note("rows", rows)
    note("shared", _shared(plan, executor, sizes))


def _make(plan: Plan, sizes: dict[str, int], dtype: str) -> tuple[Path, int]:
    """Save random weights, made on the device; returns their folder and how many they are."""
    folder = Path(plan.work) / "big"
    config = AutoConfig.for_model("mistral", sliding_window=None, max_position_embeddings=4096, **sizes)
    torch.manual_seed(SEED)
    with torch.device(plan.device):
        model = AutoModel.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder, sum(weights.numel() for weights in model.parameters())


def _cases(plan: Plan) -> Sequence[tuple[str, np.ndarray, int]]:
    if not plan.on_gpu:
        return [("natural", natural_lengths(16), 1_024)]
    natural, full = natural_lengths(600), np.full(96, 512, np.int64)
    budgets = (4_096, 8_192, 16_384, 32_768)
    return [
        (mix, lengths, budget) for budget in budgets for mix, lengths in (("natural", natural), ("512", full))
    ]


def count_flop(sizes: dict[str, int], lengths: np.ndarray) -> float:
    """Return the floating-point operations of the last token's state of rows of (n,) lengths.

    Counted are products, 2 a multiply-add, of attention those that a causal mask leaves; of the last layer
    keys and values for all, the rest for one token a row.
    """
    dim, inner, layers = (sizes[n] for n in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    keys = 2 * dim * sizes["num_key_value_heads"] * sizes["head_dim"]
    wide = sizes["num_attention_heads"] * sizes["head_dim"]
    rest = 2 * dim * wide + 3 * dim * inner
    tokens, squares = float(lengths.sum()), float(np.square(lengths.astype(np.float64)).sum())
    layer = 2 * (rest + keys) * tokens + 2 * wide * squares
    return (layers - 1) * layer + 2 * (rest * len(lengths) + keys * tokens) + 4 * wide * tokens


def _seconds(plan: Plan, executor: Executor, tokens: PackedTokens, batches: list[IdArray], dim: int) -> float:
    outputs = (Output("embedding", "dense", dim, "float32"),)
    if plan.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    executor.run(tokens, batches[:1], Result(outputs, len(tokens)))
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        executor.run(tokens, batches, Result(outputs, len(tokens)))
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _shared(plan: Plan, executor: Executor, sizes: dict[str, int]) -> dict[str, float]:
    """Rows that begin with one instruction: rows/s where it is computed for each, and once a batch."""
    n_rows = 256 if plan.on_gpu else 8
    tokens = random_rows(np.full(n_rows, INSTRUCTION + QUESTION, np.int64), sizes["vocab_size"])
    ids = tokens.input_ids.reshape(n_rows, -1).copy()
    ids[:, :INSTRUCTION] = ids[0, :INSTRUCTION]
    tokens = PackedTokens(ids.reshape(-1), tokens.offsets, tokens.truncated)
    alike = shared_tokens(tokens)
    found = {"alike": float(alike), "others": float(INSTRUCTION + QUESTION - alike)}
    for name, shares in (("rows_per_s", 0), ("shared_rows_per_s", alike)):
        executor.shares = bool(shares)
        counted = counted_lengths(tokens.lengths, shares) if shares else tokens.lengths
        batches = token_budget_batches(counted, 16_384 - shares, packed=True)
        found[name] = n_rows / _seconds(plan, executor, tokens, batches, sizes["hidden_size"])
    executor.shares = False
    return found
