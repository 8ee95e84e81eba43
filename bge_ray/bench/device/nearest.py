"""Training and adding of an index on the device: nearest centroids and k-means beside NumPy."""

import time

import numpy as np
import torch

from bge_ray.bench.device.plan import Note, Plan
from bge_ray.index.nearest import find_nearest, kmeans

DIM = 768


def run(plan: Plan, note: Note) -> None:
    """Note rows/s, agreement with NumPy in float64 and peak memory."""
    n_rows, n_centroids = (1_000_000, 16_384) if plan.on_gpu else (20_000, 512)
    draw = np.random.default_rng(5)
    rows = draw.standard_normal((n_rows, DIM), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    centroids = rows[draw.permutation(n_rows)[:n_centroids]]
    if plan.on_gpu:
        find_nearest(rows[:1_000], centroids, spherical=True, device=plan.device)
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    found, sure = find_nearest(rows, centroids, spherical=True, device=plan.device)
    seconds = time.perf_counter() - started
    sample = slice(0, 2_000)
    started = time.perf_counter()
    wanted = (rows[sample] @ centroids.T).argmax(axis=1)
    numpy_seconds = time.perf_counter() - started
    note(
        "find_nearest",
        {
            "rows": n_rows,
            "centroids": n_centroids,
            "rows_per_s": n_rows / seconds,
            "numpy_rows_per_s": 2_000 / numpy_seconds,
            "disagree_where_sure": int((found[sample] != wanted)[sure[sample]].sum()),
            "sure": float(sure.mean()),
            "peak_bytes": torch.cuda.max_memory_allocated() if plan.on_gpu else None,
        },
    )
    part = rows[: n_rows // 4]
    started = time.perf_counter()
    made = kmeans(part, n_centroids // 4, spherical=True, iterations=4, device=plan.device)
    note(
        "kmeans",
        {
            "points": len(part),
            "centroids": len(made),
            "seconds_an_iteration": (time.perf_counter() - started) / 4,
            "peak_bytes": torch.cuda.max_memory_allocated() if plan.on_gpu else None,
        },
    )
