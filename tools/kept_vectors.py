"""The vectors that `tools/real_vectors.py` wrote, as the tools that measure indexes read them."""

from pathlib import Path

import numpy as np

from bge_ray.index.vectors import normalise
from bge_ray.records.ids import FloatArray


def read_vectors(folder: Path, n_queries: int) -> tuple[FloatArray, FloatArray]:
    """Return (n, dim) passages and (m, dim) queries, float32 of unit norm, of queries the first ones."""
    files = sorted(folder.glob("passages-*.npy"))
    passages = normalise(np.concatenate([np.load(path) for path in files]))
    return passages, normalise(np.load(folder / "queries.npy")[:n_queries])
