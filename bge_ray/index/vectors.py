"""What every vector must be before FAISS sees it.

FAISS drops a NaN row but counts it, truncates float ids, stores negative ids that read as "no
result", and converts any dtype without a word; nothing of that passes here.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from bge_ray.errors import IndexBuildError
from bge_ray.records.ids import FloatArray, IdArray

# Embeddings stored as float16 have norms of 0.9998 to 1.0002; a vector that was never normalised is far off.
NORM_TOLERANCE = 1e-2
_CHECK_ROWS = 16_384


def check_rows(rows: npt.NDArray[Any], dim: int, what: str = "vectors") -> None:
    """Refuse an array that is not rows of unit norm.

    Args:
        rows: (n, dim) float16 or float32; n may be 0.
        dim: the length every row must have.
        what: the name of the array in messages.

    Raises:
        IndexBuildError: shape or dtype differ, or a row holds NaN or infinity or has a norm off 1
            by more than NORM_TOLERANCE; the message names the first such row.
    """
    if rows.dtype not in (np.float16, np.float32):
        raise IndexBuildError(f"{what} are {rows.dtype}, must be float16 or float32")
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise IndexBuildError(f"{what} have shape {rows.shape}, must be (rows, {dim})")
    for start in range(0, len(rows), _CHECK_ROWS):
        norms = _norms(rows[start : start + _CHECK_ROWS].astype(np.float32, copy=False))
        good = np.abs(norms - 1) <= NORM_TOLERANCE  # false for NaN, too
        if not good.all():
            row = int(np.argmin(good))
            fault = f"norm {norms[row]:.4g}, must be 1" if np.isfinite(norms[row]) else "NaN or infinity"
            raise IndexBuildError(f"{what}: row {start + row} has {fault} ({(~good).sum()} such rows here)")


def check_vectors(vectors: npt.NDArray[Any], ids: npt.NDArray[Any], dim: int) -> tuple[FloatArray, IdArray]:
    """Check vectors with their ids and normalise them in float32.

    Args:
        vectors: (n, dim) float16 or float32 of about unit norm; read-only and strided arrays are fine.
        ids: (n,) int64, all >= 0, without a repetition.
        dim: length of a vector.

    Returns:
        A new (n, dim) float32 array in C order with rows of unit L2 norm, and the ids in C order.

    Raises:
        IndexBuildError: what `check_rows` refuses, or ids of another shape, dtype, below 0 or twice.
    """
    check_rows(vectors, dim)
    if ids.dtype != np.int64 or ids.shape != (len(vectors),):
        raise IndexBuildError(f"ids are {ids.dtype} of shape {ids.shape}, must be int64 ({len(vectors)},)")
    if len(ids) and ids.min() < 0:
        raise IndexBuildError(f"id {ids.min()} is negative; FAISS reads -1 as 'no result'")
    check_unique(ids)
    return normalise(vectors), np.ascontiguousarray(ids)


def check_unique(ids: IdArray) -> None:
    """Refuse (n,) ids of which one is there twice: FAISS would return both."""
    ordered = np.sort(ids)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise IndexBuildError(f"{len(repeated)} ids are there twice, the first is {repeated[0]}")


def normalise(vectors: npt.NDArray[Any]) -> FloatArray:
    """Return a new (n, dim) float32 array in C order, each row divided by its L2 norm (not 0)."""
    rows = np.array(vectors, dtype=np.float32, order="C")
    rows /= _norms(rows)[:, None]
    return rows


def _norms(rows: FloatArray) -> FloatArray:
    squares: FloatArray = np.einsum("ij,ij->i", rows, rows)
    return np.sqrt(squares)
