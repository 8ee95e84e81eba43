"""Nearest centroids and k-means through torch: what training and adding an index spend their time on."""

import numpy as np
import numpy.typing as npt
import torch

from bge_ray.records.ids import FloatArray, IdArray

# float32 products of rows of unit norm differ by about 1e-6 between devices and kernels.
CLOSE_CALL = 1e-5
# Scores in memory at once, 1 GB of them.
BLOCK_SCORES = 1 << 28
SEED = 1234


def find_nearest(
    rows: FloatArray, centroids: FloatArray, *, spherical: bool, device: str
) -> tuple[IdArray, npt.NDArray[np.bool_]]:
    """Choose the nearest centroid of each row.

    Args:
        rows: (n, d) float32.
        centroids: (k, d) float32.
        spherical: nearest by inner product instead of L2 distance.
        device: a torch device.

    Returns:
        (n,) int64 numbers of centroids, and (n,) whether the runner-up is so far behind that every float32
        arithmetic chooses the same.
    """
    found = torch.from_numpy(np.ascontiguousarray(centroids)).to(device)
    numbers = np.empty(len(rows), np.int64)
    sure = np.empty(len(rows), np.bool_)
    step = _block_rows(len(centroids))
    for start in range(0, len(rows), step):
        block = torch.from_numpy(np.ascontiguousarray(rows[start : start + step])).to(device)
        best = _scores(block, found, spherical=spherical).topk(min(2, len(centroids)), dim=1)
        numbers[start : start + step] = best.indices[:, 0].cpu().numpy()
        sure[start : start + step] = (best.values[:, 0] - best.values[:, -1] > CLOSE_CALL).cpu().numpy()
    return numbers, sure | (len(centroids) == 1)


def kmeans(
    points: FloatArray, n_centroids: int, *, spherical: bool, iterations: int, device: str
) -> FloatArray:
    """Find centroids by Lloyd's iterations from points drawn at random.

    A centroid that no point is nearest to takes the place of a point drawn from those of the fullest.

    Args:
        points: (n, d) float32, at least as many as centroids.
        n_centroids: k.
        spherical: points are compared by inner product and centroids have unit norm.
        iterations: how many.
        device: a torch device; on CUDA sums are added in any order, so the last bits differ from run to run.

    Returns:
        (k, d) float32.
    """
    generator = np.random.default_rng(SEED)
    data = torch.from_numpy(np.ascontiguousarray(points)).to(device)
    centroids = data[torch.from_numpy(generator.permutation(len(points))[:n_centroids]).to(device)].clone()
    step = _block_rows(n_centroids)
    for _ in range(iterations):
        nearest = torch.cat(
            [
                _scores(block, centroids, spherical=spherical).argmax(dim=1)
                for block in torch.split(data, step)
            ]
        )
        counts = torch.bincount(nearest, minlength=n_centroids)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, data)
        centroids = sums / counts.clamp(min=1).unsqueeze(1)
        empty = torch.nonzero(counts == 0).flatten()
        if len(empty):
            fullest = torch.isin(nearest, counts.topk(min(len(empty), n_centroids)).indices)
            crowd = torch.nonzero(fullest).flatten().cpu().numpy()
            taken = generator.choice(crowd, len(empty), replace=False)
            centroids[empty] = data[torch.from_numpy(taken).to(device)]
        if spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
    found: FloatArray = centroids.cpu().numpy()
    return found


def _scores(rows: torch.Tensor, centroids: torch.Tensor, *, spherical: bool) -> torch.Tensor:
    """Return (n, k) scores, the highest nearest; L2 distances without the term that is the same for all."""
    products = rows @ centroids.T
    return products if spherical else products - centroids.square().sum(dim=1) / 2


def _block_rows(n_centroids: int) -> int:
    return max(1, BLOCK_SCORES // n_centroids)
