"""Clustered unit vectors and trained indexes, each made once."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from bge_ray.index.factory import Metric
from bge_ray.index.package import faiss
from bge_ray.index.train import TrainedIndex, train

DIM = 32
MakeVectors = Callable[..., np.ndarray]
MakeTrained = Callable[..., TrainedIndex]


@functools.cache
def _centres(dim: int) -> np.ndarray:
    return np.random.default_rng(99).normal(size=(24, dim))


def _vectors(n: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    rng = np.random.default_rng([seed, 1])
    rows = _centres(dim)[rng.integers(0, 24, n)] + 0.6 * rng.normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@functools.cache
def _trained(factory: str, metric: Metric = Metric.L2, dim: int = DIM) -> TrainedIndex:
    return train(_vectors(1300, seed=7, dim=dim), factory, metric)


@pytest.fixture(scope="session")
def make_vectors() -> MakeVectors:
    """(n, seed, dim) -> (n, dim) float32 unit vectors around 24 centres."""
    return _vectors


@pytest.fixture(scope="session")
def make_trained() -> MakeTrained:
    """(factory, metric, dim) -> an index trained on 1,300 vectors."""
    return _trained


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """A second thread only costs time on problems this small."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)
