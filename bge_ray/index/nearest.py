"""Nearest centroids and k-means through torch: what training and adding an index spend their time on."""

import numpy as np
import numpy.typing as npt
import torch

from bge_ray.records.ids import FloatArray, IdArray

# float32 products of rows of unit norm differ by about 1e-6 between devices and kernels.
CLOSE_CALL = 1e-5
# Scores on the device at once, 1 GB of them, and numbers of the rows that they are of, 256 MB of them.
BLOCK_SCORES = 1 << 28
BLOCK_NUMBERS = 1 << 26
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
    step = _block_rows(centroids)
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

    A centroid that no point is nearest to takes the place of a point drawn from those of the fullest. The
    device holds the centroids three times and a block of points, however many there are.

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
    drawn = np.ascontiguousarray(points[generator.permutation(len(points))[:n_centroids]])
    centroids = torch.from_numpy(drawn).to(device)
    step = _block_rows(drawn)
    nearest = np.empty(len(points), np.int64)
    for _ in range(iterations):
        sums, counts = torch.zeros_like(centroids), torch.zeros(n_centroids, dtype=torch.int64, device=device)
        for start in range(0, len(points), step):
            block = torch.from_numpy(np.ascontiguousarray(points[start : start + step])).to(device)
            found = _scores(block, centroids, spherical=spherical).argmax(dim=1)
            sums.index_add_(0, found, block)
            counts += torch.bincount(found, minlength=n_centroids)
            nearest[start : start + step] = found.cpu().numpy()
        centroids = sums / counts.clamp(min=1).unsqueeze(1)
        empty = torch.nonzero(counts == 0).flatten()
        if len(empty):
            fullest = counts.topk(min(len(empty), n_centroids)).indices.cpu().numpy()
            taken = generator.choice(np.flatnonzero(np.isin(nearest, fullest)), len(empty), replace=False)
            centroids[empty] = torch.from_numpy(np.ascontiguousarray(points[taken])).to(device)
        if spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
    result: FloatArray = centroids.cpu().numpy()
    return result


def _scores(rows: torch.Tensor, centroids: torch.Tensor, *, spherical: bool) -> torch.Tensor:
    """Return (n, k) scores, the highest nearest; L2 distances without the term that is the same for all."""
    products = rows @ centroids.T
    return products if spherical else products - centroids.square().sum(dim=1) / 2


def _block_rows(centroids: FloatArray) -> int:
    n_centroids, dim = centroids.shape
    return int(max(1, min(BLOCK_SCORES // n_centroids, BLOCK_NUMBERS // dim)))
