"""What it saves to compute once a batch what all rows of a decoder begin with, and from where on.

    python -m tools.prefix_speed [--rows 32]

Two layers of Qwen3-Embedding-0.6B's shape at random, in float32 on one thread, over rows of random tokens
that begin alike; with and without sharing in alternation, seconds of CPU, medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bge_ray.bench.families import Shape, make_model
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, resolve_encoder
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import ModelSettings

SIZES = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 3072,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SHAPE = Shape("Qwen3-Embedding-0.6B", "qwen3", 2, 28, SIZES)
SHARED, OWN, REPEATS = (16, 32, 64, 128, 384), (16, 100), 3


def rows_of(n_rows: int, shared: int, own: int) -> PackedTokens:
    """Return rows that begin with so many equal tokens, with around so many of their own each."""
    rng = np.random.default_rng(0)
    common = rng.integers(1000, 9000, shared)
    lengths = rng.integers(own // 2, own + own // 2 + 1, n_rows)
    rows = [np.concatenate([common, [n + 1], rng.integers(1000, 9000, k)]) for n, k in enumerate(lengths)]
    return PackedTokens.of([row.tolist() for row in rows], np.zeros(n_rows, np.bool_))


def spent(model: Model, tokens: PackedTokens, *, shares: bool) -> float:
    """Return the seconds of CPU that all rows take."""
    model._executor.shares = shares
    started = time.process_time()
    model.run(tokens, model.cut(tokens, model.settle_budget("auto")), model.empty_result(len(tokens)))
    return time.process_time() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    n_rows = parser.parse_args().rows
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(SHAPE, Path(folder))
        asked = ModelSettings(name=str(path), pooling="last_token", dtype="float32")
        spec = resolve_encoder(asked, on_gpu=False)
        model = Model(spec, model_folder(spec), Place())
        print("| alike | own | whole | shared | times |\n|---:|---:|---:|---:|---:|")
        for shared in SHARED:
            for own in OWN:
                tokens = rows_of(n_rows, shared, own)
                runs = [[spent(model, tokens, shares=how) for how in (False, True)] for _ in range(REPEATS)]
                whole, less = (statistics.median(run[how] for run in runs) for how in (0, 1))
                print(f"| {shared} | {own} | {whole:.2f} s | {less:.2f} s | {whole / less:.2f} |", flush=True)


if __name__ == "__main__":
    main()
