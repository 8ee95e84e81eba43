"""One query against stored passages, by each output of an m3 and by weighted sums of them.

It lies beside the index because candidates of an index are what is scored so; it knows no FAISS and no model.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bge_ray.records.arrays import MultiRows, SparseRows
from bge_ray.records.ids import FloatArray

Floats: TypeAlias = npt.NDArray[np.floating[Any]]


def dense_scores(query: Floats, passages: Floats) -> FloatArray:
    """Return the (n,) inner products of a (dim,) query with (n, dim) passages."""
    return passages.astype(np.float32) @ query.astype(np.float32)


def sparse_scores(query: SparseRows, passages: SparseRows) -> FloatArray:
    """Return the (n,) sums, over the tokens that both have, of the product of their weights.

    Args:
        query: one row.
        passages: n rows.
    """
    scores = np.zeros(len(passages), np.float32)
    if not len(query.indices):
        return scores
    places = np.minimum(np.searchsorted(query.indices, passages.indices), len(query.indices) - 1)
    shared = query.indices[places] == passages.indices
    weights = query.values[places[shared]].astype(np.float32) * passages.values[shared].astype(np.float32)
    sums = np.bincount(passages.row_numbers[shared], weights, minlength=len(passages))
    return sums.astype(np.float32)


def colbert_scores(query: Floats, passages: MultiRows) -> FloatArray:
    """Return for n passages the mean, over the vectors of a query, of the largest product with one of theirs.

    FlagEmbedding takes the largest over the zeros of its padding, too: where all products of a query's vector
    are negative and the passage is not the longest of its batch, it counts 0.

    Args:
        query: (m, dim), m at least 1.
        passages: n rows; one without vectors scores 0.
    """
    scores = np.zeros(len(passages), np.float32)
    filled = np.flatnonzero(np.diff(passages.offsets))
    if len(filled):
        products = query.astype(np.float32) @ passages.vectors.astype(np.float32).T  # (m, total)
        best = np.maximum.reduceat(products, passages.offsets[filled], axis=1)  # (m, filled)
        scores[filled] = best.mean(axis=0)
    return scores


def weighted_scores(scores: Sequence[Floats], weights: Sequence[float]) -> FloatArray:
    """Return the weighted mean of several (n,) scores of the same passages.

    Raises:
        ValueError: the weights come to nothing, or are not as many as the scores.
    """
    total = sum(weights)
    if not total > 0:
        raise ValueError(f"weights {list(weights)}: their sum must be above 0")
    parts = [weight * score.astype(np.float32) for weight, score in zip(weights, scores, strict=True)]
    return np.asarray(np.sum(parts, axis=0) / total, np.float32)
