"""Several result lists of the same queries as one: by reciprocal rank, or by scores brought to one scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from bge_ray.records.ids import FloatArray, IdArray

Doubles: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fusion:
    """How lists become one; ``weights`` are of the lists in their order, ``rrf_k`` is what ranks begin at."""

    by: Literal["rrf", "minmax"]
    weights: tuple[float, ...]
    rrf_k: int


def ranks(numbers: IdArray) -> IdArray:
    """Return the rank from 0 on of each of (r,) results within its query, by their ascending numbers."""
    found: IdArray = np.arange(len(numbers)) - np.searchsorted(numbers, numbers)
    return found


def fuse(lists: Sequence[tuple[IdArray, FloatArray]], fusion: Fusion) -> list[Doubles]:
    """Return what each result of each list adds to the score of what it is.

    By ``rrf`` that is weight / (rrf_k + rank), with ranks from 1 on. By ``minmax`` the best score of a
    query's list counts 1 and its worst 0, times the weight's share of all; where all are equal, all count 1.
    What a list does not hold adds nothing.

    Args:
        lists: of each the (r,) numbers of the queries, ascending, and the (r,) scores, best first.
        fusion: with a weight a list.

    Raises:
        ValueError: the weights are not as many as the lists.
    """
    total = sum(fusion.weights)
    gains = []
    for (numbers, scores), weight in zip(lists, fusion.weights, strict=True):
        if fusion.by == "rrf":
            gains.append(weight / (fusion.rrf_k + 1 + ranks(numbers)))
            continue
        gains.append(weight / total * scaled(numbers, scores))
    return gains


def scaled(numbers: IdArray, scores: FloatArray | Doubles) -> Doubles:
    """Return (r,) finite scores as shares: of the results of a query the best is 1 and the worst 0.

    Where all of a query are equal, all are 1. ``numbers`` are of the queries, ascending.
    """
    exact = scores.astype(np.float64)
    _, starts, query = np.unique(numbers, return_index=True, return_inverse=True)
    worst = np.minimum.reduceat(exact, starts)[query]
    width = np.maximum.reduceat(exact, starts)[query] - worst
    shares: Doubles = np.divide(exact - worst, width, out=np.ones_like(exact), where=width > 0)
    return shares
