"""Which vectors of an index count in a search, told to FAISS by an id selector, and how hard to look then.

A selector costs memory where it is held: a bit a vector of a flat index or a graph, which know vectors by
their places; about 48 bytes a vector of an IVF index, which knows them by their ids, for those that count or
those that do not, whichever are fewer (FAISS's set of ids and the filter of bits in front of it).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bge_ray.index.package import Index, faiss
from bge_ray.records.ids import IdArray
from bge_ray.records.index import IndexDescription

# What a graph's walk costs for each candidate that it keeps (efSearch), in vectors compared one after the
# other: where fewer pass a filter, all that pass are compared. Measured by `tools/selectivity.py`, see
# docs/measured.md.
WALKED = 14
# Candidates for each result that are scored again where all that passes was compared by a lossy code: of
# those measured in docs/index.md only RaBitQ, of one bit a dimension, then loses more than two results in a
# thousand.
RESCORED_OF_ALL = 4

# (n,) ids -> (n,) whether they count.
Membership: TypeAlias = Callable[[IdArray], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Among:
    """The vectors of an index that count: what tells FAISS which, how many they are, and the ids it holds."""

    selector: Any
    count: int
    held: int


def select(index: Index, passes: Membership) -> Among:
    """Return the selector of the vectors of an index that pass."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        marks = passes(places_of(faiss.downcast_index(index)))
        bits = np.packbits(marks, bitorder="little")
        # A bit a vector: as much as a four-hundredth of them takes as ids.
        return Among(faiss.IDSelectorBitmap(bits), int(np.count_nonzero(marks)), len(marks) // 400)
    chosen, rest = [], []
    for number in range(ivf.nlist):
        ids = _ids_of(ivf.invlists, number)
        marks = passes(ids)
        chosen.append(ids[marks])
        rest.append(ids[~marks])
    wanted, others = (np.concatenate([np.empty(0, np.int64), *parts]) for parts in (chosen, rest))
    if len(wanted) <= len(others):
        return Among(faiss.IDSelectorBatch(wanted), len(wanted), len(wanted))
    return Among(faiss.IDSelectorNot(faiss.IDSelectorBatch(others)), len(wanted), len(others))


def places_of(outer: Index) -> IdArray:
    """Return the (n,) ids of the vectors of an index behind IDMap in the order of their places, as a view."""
    size = outer.id_map.size()
    if not size:
        return np.empty(0, np.int64)
    found: IdArray = faiss.rev_swig_ptr(outer.id_map.data(), size)
    return found


def effort_among(index: IndexDescription, effort: int, passing: int) -> int:
    """Return how hard to look for the best of the vectors that pass a filter.

    The true results among a tenth of all vectors lie as far from a query as ten times as many among all do,
    so that effort grows as fewer pass, up to the largest: then all that pass are compared.

    Args:
        index: what is searched.
        effort: that finds enough among all vectors.
        passing: how many vectors pass, at least 1.
    """
    if index.parameter is None:
        return effort
    wider = math.ceil(effort * max(1.0, index.ntotal / passing))
    if index.parameter == "efSearch" and passing <= WALKED * wider * len(index.files):
        return index.largest_effort
    return min(wider, index.largest_effort)


def rescored_of_all(index: IndexDescription, k: int) -> int:
    """Return the candidates to score again for k results where all that passes was compared; 0 for none."""
    exact = index.factory.endswith("Flat") or index.factory.rpartition(",")[2].startswith("HNSW")
    return 0 if exact else RESCORED_OF_ALL * k


def _ids_of(lists: Any, number: int) -> IdArray:
    """Return a copy of the ids of one list."""
    size = lists.list_size(number)
    if not size:
        return np.empty(0, np.int64)
    pointer = lists.get_ids(number)
    found: IdArray = faiss.rev_swig_ptr(pointer, size).copy()
    lists.release_ids(number, pointer)
    return found
