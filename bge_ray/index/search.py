"""Open index files and search them. Scores are inner products, higher is better, whatever the metric."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bge_ray.errors import IndexBuildError
from bge_ray.index.package import Index, faiss
from bge_ray.index.probes import Probes, search_probed
from bge_ray.index.selectors import Among, places_of
from bge_ray.index.topk import NO_RESULT, Results, best
from bge_ray.index.vectors import check_rows, normalise
from bge_ray.records.ids import FloatArray, IdArray

# Results asked for beyond k: if place k ties with all of them, more are fetched, up to the second.
_TIE_MARGIN = 8
_MAX_TIE_MARGIN = 4096


def load_index(source: Path | bytes, *, mmap: bool = True, n_bytes: int | None = None) -> Index:
    """Open an index file.

    Args:
        source: a local file, or the bytes of one.
        mmap: map a file into memory instead of reading it; lists are then read when they are probed. The
            file must not be overwritten while it is open. Bytes are always copied.
        n_bytes: the size that the file should have. FAISS itself takes a mapped file that lacks up
            to 7 bytes, and any that has bytes too many.

    Raises:
        IndexBuildError: the file is missing, truncated, of another size or none of FAISS, or holds fewer
            vectors than it says. FAISS has no checksum: compare the sha256 for flipped bits.
    """
    name = "the index" if isinstance(source, bytes) else str(source)
    if n_bytes is not None:
        found = len(source) if isinstance(source, bytes) else source.stat().st_size if source.exists() else 0
        if found != n_bytes:
            raise IndexBuildError(f"{name} cannot be opened: it has {found} bytes, should have {n_bytes}")
    try:
        if isinstance(source, bytes):
            index = faiss.deserialize_index(np.frombuffer(source, np.uint8))
        else:
            index = faiss.read_index(str(source), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
    except RuntimeError as error:
        raise IndexBuildError(f"{name} cannot be opened: {error}") from error
    ivf = faiss.try_extract_index_ivf(index)
    held = index.ntotal if ivf is None else ivf.invlists.compute_ntotal()
    if held != index.ntotal:
        raise IndexBuildError(f"{name} says {index.ntotal} vectors, its lists hold {held}")
    return index


def search(
    index: Index,
    queries: npt.NDArray[Any],
    k: int,
    *,
    effort: int | None = None,
    among: Among | None = None,
    probes: Probes | None = None,
) -> Results:
    """Find the k best vectors for each query.

    Args:
        index: from `load_index`; not changed, so threads may share it.
        queries: (n_queries, dim) float16 or float32, unit norm.
        k: results a query.
        effort: lists to probe (nprobe) of an IVF index, at most nlist; breadth of the walk (efSearch)
            of an HNSW index, which is never less than what is asked for; without meaning for a flat one. None
            takes what the file says.
        among: the vectors that count, from `selectors.select` of this index; None: all. With as much effort
            as an HNSW index has vectors they are compared one after the other, without a walk.
        probes: of these queries with this effort, from `probes.choose_probes`; None has them chosen here.

    Returns:
        Scores (n_queries, w) float32, falling, and ids (n_queries, w) int64, w being k or the vectors that
        count, if these are fewer; ties by id; NO_RESULT with score -inf at the end of rows that found
        fewer.

    Raises:
        IndexBuildError: k or effort below 1, or a query that `check_rows` refuses: FAISS answers a
            NaN query with nothing, and a zero query with anything.
    """
    check_rows(queries, index.d, "queries")
    if k < 1 or (effort is not None and effort < 1):
        raise IndexBuildError(f"k is {k} and effort {effort}, both must be at least 1")
    rows = normalise(queries)
    held = index.ntotal if among is None else among.count
    k = min(k, max(held, 1))
    fetched = _search(index, rows, min(k + _TIE_MARGIN, max(held, 1)), effort, among, probes)
    scores, ids = best(*fetched, k)
    margin = _TIE_MARGIN
    unclear = _unclear(fetched, k)
    while len(unclear) and k + margin < held and margin < _MAX_TIE_MARGIN:
        margin *= 8
        some = None if probes is None else probes[unclear]
        fetched = _search(index, rows[unclear], min(k + margin, held), effort, among, some)
        scores[unclear], ids[unclear] = best(*fetched, k)
        unclear = unclear[_unclear(fetched, k)]
    return scores, ids


def set_default_effort(data: bytes, effort: int) -> bytes:
    """Return an index file whose nprobe or efSearch is ``effort`` when plain FAISS opens it.

    Memory: three times the file.

    Raises:
        IndexBuildError: this is no index file.
    """
    index = load_index(data)
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = min(effort, ivf.nlist)
    else:
        outer = faiss.downcast_index(index)
        inner = faiss.downcast_index(outer.index) if isinstance(outer, faiss.IndexIDMap) else outer
        if isinstance(inner, faiss.IndexHNSW):
            inner.hnsw.efSearch = effort
    return bytes(faiss.serialize_index(index).tobytes())


def _unclear(results: Results, k: int) -> IdArray:
    """Rows whose place k ties with their last result: equals may lie beyond it, and have a lower id."""
    scores, ids = results
    if scores.shape[1] <= k:
        return np.empty(0, np.int64)
    return np.flatnonzero((scores[:, k - 1] == scores[:, -1]) & (ids[:, -1] >= 0))


def _search(
    index: Index, rows: FloatArray, k: int, effort: int | None, among: Among | None, probes: Probes | None
) -> Results:
    if not len(rows) or (among is not None and not among.count):
        return np.full((len(rows), k), -np.inf, np.float32), np.full((len(rows), k), NO_RESULT, np.int64)
    outer = faiss.downcast_index(index)
    if among is not None and isinstance(outer, faiss.IndexIDMap):
        distances, ids = _search_places(outer, rows, k, effort, among)
    else:
        selected = {} if among is None else {"sel": among.selector}
        if probes is not None:
            distances, ids = search_probed(index, rows, k, probes, selected)
        else:
            distances, ids = index.search(rows, k, params=_parameters(index, effort, k, selected))
    # On unit vectors |q - x|^2 = 2 - 2 q.x
    scores = np.float32(1) - distances / np.float32(2) if index.metric_type == faiss.METRIC_L2 else distances
    return best(scores, ids, k)


def _search_places(
    outer: Index, rows: FloatArray, k: int, effort: int | None, among: Among
) -> tuple[FloatArray, IdArray]:
    """Search what is behind IDMap, whose selector knows vectors by their places."""
    inner, selected = faiss.downcast_index(outer.index), {"sel": among.selector}
    parameters = _parameters(inner, effort, k, selected)
    if isinstance(inner, faiss.IndexHNSW) and (effort or inner.hnsw.efSearch) >= inner.ntotal:
        inner, parameters = faiss.downcast_index(inner.storage), faiss.SearchParameters(**selected)
    distances, places = inner.search(rows, k, params=parameters)
    return distances, np.where(places == NO_RESULT, NO_RESULT, places_of(outer)[places])


def _parameters(index: Index, effort: int | None, k: int, selected: dict[str, Any]) -> Any:
    """Return what FAISS is told of a search, None where there is nothing to tell."""
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexPreTransform):
        inside = _parameters(outer.index, effort, k, selected)
        return None if inside is None else faiss.SearchParametersPreTransform(index_params=inside)
    if isinstance(outer, faiss.IndexIVF):
        if effort is None and not selected:
            return None
        nprobe = outer.nprobe if effort is None else min(effort, outer.nlist)
        return faiss.SearchParametersIVF(nprobe=nprobe, **selected)
    inner = faiss.downcast_index(outer.index) if isinstance(outer, faiss.IndexIDMap) else outer
    if not isinstance(inner, faiss.IndexHNSW):
        return faiss.SearchParameters(**selected) if selected else None
    # A walk that keeps fewer candidates than it is asked for misses the last of them.
    return faiss.SearchParametersHNSW(efSearch=max(effort or inner.hnsw.efSearch, k), **selected)
