"""What this machine can do at best, and what a model costs: the two numbers behind utilisation."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
SECONDS = 2.0


def describe_machine() -> dict[str, Any]:
    """Return what to print above a table: processor, cores, GPU, versions."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def matrix_rate(device: str, dtype: str) -> float:
    """Return the best rate of square matrix products, in FLOP/s, all cores or the device."""
    size = MATRIX_SIZE[device]
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    best = 0.0
    deadline = time.perf_counter() + SECONDS
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def copy_rate(device: str) -> float:
    """Return the rate of copies within memory (CPU) or from pinned memory to the device, in bytes/s."""
    source = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=device == "cuda")
    target = torch.empty_like(source, device=device)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, source.numel() / (time.perf_counter() - started))
    return best


def count_flop(model_folder: str, lengths: np.ndarray, *, one_token: bool) -> float:
    """Return the floating-point operations that the vectors of some rows ask for, without padding.

    Counted are matrix products of the layers and of attention (2 a multiply-add); norms, activations
    and the embedding look-up are not.

    Args:
        model_folder: for its config.json; BERT-like.
        lengths: (n,) tokens of each row.
        one_token: pooling takes one token a row; the last layer owes it nothing else but keys and values.
    """
    config = json.loads((Path(model_folder) / "config.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "intermediate_size")
    dim, layers, inner = (int(config[name]) for name in names)
    tokens, squares = float(lengths.sum()), float(np.square(lengths.astype(np.float64)).sum())
    rest = 2 * dim * dim + 2 * dim * inner  # all of a layer but keys and values, in multiply-adds a token
    layer = 2 * (rest + 2 * dim * dim) * tokens + 4 * dim * squares
    if not one_token:
        return layers * layer
    last = 2 * (rest * len(lengths) + 2 * dim * dim * tokens) + 4 * dim * tokens
    return (layers - 1) * layer + last
