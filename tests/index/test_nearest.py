"""Centroids and lists through torch: the index that FAISS alone would have built, or one as good."""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bge_ray.index import nearest
from bge_ray.index.factory import Metric, check_factory
from bge_ray.index.nearest import CLOSE_CALL, find_nearest, kmeans
from bge_ray.pipeline.index.tasks import TrainedFile, add_task, train_task
from bge_ray.storage.objects import Storage
from tests.support.vectors import clustered, make_dataset

DIM = 24


def cost(points: np.ndarray, centroids: np.ndarray) -> float:
    distances, _ = faiss.knn(points, centroids, 1)
    return float(distances.mean())


@pytest.mark.parametrize("spherical", [False, True])
def test_the_nearest_is_that_of_brute_force_wherever_it_is_said_to_be_sure(spherical: bool) -> None:
    rows, centroids = clustered(3000, DIM, 1), clustered(200, DIM, 2)
    centroids = centroids if spherical else centroids * np.linspace(0.5, 1.5, 200, dtype=np.float32)[:, None]
    centroids[7] = centroids[3]  # a tie, which nobody can decide
    numbers, sure = find_nearest(rows, centroids, spherical=spherical, device="cpu")
    scores = rows.astype(np.float64) @ centroids.T.astype(np.float64)
    scores -= 0 if spherical else (centroids.astype(np.float64) ** 2).sum(axis=1) / 2
    ordered = np.sort(scores, axis=1)
    np.testing.assert_array_equal(numbers[sure], scores.argmax(axis=1)[sure])
    gaps = ordered[:, -1] - ordered[:, -2]
    assert not sure[np.isin(scores.argmax(axis=1), (3, 7))].any()
    assert sure[gaps > 2 * CLOSE_CALL].all()


def test_a_single_centroid_is_nearest_to_all() -> None:
    numbers, sure = find_nearest(clustered(10, DIM, 1), clustered(1, DIM, 2), spherical=False, device="cpu")
    assert not numbers.any()
    assert sure.all()


@pytest.mark.parametrize("spherical", [False, True])
def test_its_centroids_are_as_good_as_those_of_faiss(spherical: bool) -> None:
    points = clustered(6000, DIM, 3, clusters=40)
    ours = kmeans(points, 64, spherical=spherical, iterations=10, device="cpu")
    theirs = faiss.Kmeans(DIM, 64, niter=10, spherical=spherical, seed=5)
    theirs.train(points)
    assert cost(points, ours) < 1.03 * cost(points, theirs.centroids)
    if spherical:
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation takes or gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_the_device_holds_a_block_of_points_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "BLOCK_NUMBERS", 100 * DIM)
    points = clustered(5000, DIM, 3, clusters=40)
    whole = kmeans(points, 16, spherical=True, iterations=4, device="cpu")
    with LargestTensor() as largest:
        blocks = kmeans(points, 16, spherical=True, iterations=4, device="cpu")
    assert largest.numbers <= 100 * DIM
    monkeypatch.setattr(nearest, "BLOCK_NUMBERS", 1 << 26)
    np.testing.assert_allclose(
        blocks, kmeans(points, 16, spherical=True, iterations=4, device="cpu"), atol=1e-5
    )
    np.testing.assert_array_equal(blocks, whole)


def test_centroids_without_points_are_placed_anew() -> None:
    # 60 copies of one point and 12 points apart: points drawn at random leave most of them out.
    apart = 10 * np.eye(12, DIM, dtype=np.float32)
    points = np.concatenate([np.zeros((60, DIM), np.float32), apart])
    found = kmeans(points, 13, spherical=False, iterations=30, device="cpu")
    assert np.isfinite(found).all()
    assert cost(points, found) < cost(points, np.zeros((1, DIM), np.float32)) / 2


@pytest.mark.parametrize("factory", ["IVF32,SQ8", "RR,IVF32,RaBitQ"])
@pytest.mark.parametrize("metric", list(Metric))
def test_the_tasks_make_the_same_part_with_and_without_a_device(
    tmp_path: Path, factory: str, metric: Metric
) -> None:
    made = make_dataset(str(tmp_path), [2000, 1, 900], DIM)
    storage, spec = Storage(10), check_factory(factory, DIM, metric)
    shards = tuple(marker.embeddings for marker in made.publish().shards)
    sample = clustered(2100, DIM, 9)
    uri = str(tmp_path / "trained.faiss")
    sha256 = train_task(storage, uri, spec, 1, "cpu", (sample, np.arange(len(sample))))
    trained = TrainedFile(uri, sha256, spec.factory, metric.value, DIM)
    for name, device in (("faiss", None), ("torch", "cpu")):
        add_task(storage, str(tmp_path), trained, shards, str(tmp_path / name), device)
    assert (tmp_path / "torch").read_bytes() == (tmp_path / "faiss").read_bytes()
