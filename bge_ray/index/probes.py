"""Which lists of an IVF index a query is looked for in, chosen once for all files that share centroids."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bge_ray.index.package import Index, faiss
from bge_ray.index.train import rotate
from bge_ray.index.vectors import check_rows, normalise
from bge_ray.records.ids import FloatArray, IdArray


@dataclass(frozen=True)
class Probes:
    """The nearest lists of n queries: (n, nprobe) numbers, and FAISS's distances to their centroids."""

    lists: IdArray
    distances: FloatArray

    def __getitem__(self, rows: IdArray) -> "Probes":
        """Return those of some queries."""
        return Probes(self.lists[rows], self.distances[rows])


def choose_probes(index: Index, queries: npt.NDArray[Any], effort: int | None) -> Probes | None:
    """Compare queries with the centroids of an index, any file of it; None if it has no lists.

    Args:
        index: from `load_index`.
        queries: (n, dim) float16 or float32, unit norm.
        effort: lists to probe, at most nlist; None takes what the file says.

    Raises:
        IndexBuildError: a query that `check_rows` refuses.
    """
    check_rows(queries, index.d, "queries")
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return None
    nprobe = min(effort or ivf.nprobe, ivf.nlist)
    distances, lists = ivf.quantizer.search(rotate(index, normalise(queries)), nprobe)
    return Probes(lists, distances)


def search_probed(
    index: Index, rows: FloatArray, k: int, probes: Probes, selected: dict[str, Any]
) -> tuple[FloatArray, IdArray]:
    """Search the lists that were chosen, and no centroid.

    Args:
        index: an IVF index, maybe behind a transform.
        rows: (n, dim) float32, unit norm.
        k: results a query.
        probes: of these queries.
        selected: a selector as FAISS's parameters take it, or nothing.

    Returns:
        FAISS's (n, k) distances and ids.
    """
    ivf = faiss.extract_index_ivf(index)
    inside = np.ascontiguousarray(rotate(index, rows))
    n, nprobe = probes.lists.shape
    distances, ids = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    # The method behind the wrapper, which takes no parameters, and nprobe from the index that threads share.
    ivf.search_preassigned_c(
        n,
        faiss.swig_ptr(inside),
        k,
        faiss.swig_ptr(np.ascontiguousarray(probes.lists)),
        faiss.swig_ptr(np.ascontiguousarray(probes.distances)),
        faiss.swig_ptr(distances),
        faiss.swig_ptr(ids),
        False,
        faiss.SearchParametersIVF(nprobe=nprobe, **selected),
    )
    return distances, ids
