"""Train an index once: the empty, trained index whose hash every later artefact carries.

Training is deterministic on the CPU: the same sample gives the same bytes.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from bge_ray.errors import IndexBuildError
from bge_ray.index.factory import IndexSpec, Kind, Metric, check_factory
from bge_ray.index.package import Index, faiss
from bge_ray.index.vectors import check_rows
from bge_ray.records.ids import FloatArray

# 25 iterations found no better centroids than 10.
KMEANS_ITERATIONS = 10
# Below 64 the HNSW coarse quantizer misses the nearest centroid too often while adding.
HNSW_EF_SEARCH = 64
_HASH_ROWS = 8_192

# (points (n, d) float32, nlist, spherical) -> (nlist, d) float32 centroids.
KMeans: TypeAlias = Callable[[FloatArray, int, bool], FloatArray]


@dataclass(frozen=True)
class TrainedIndex:
    """A trained index without vectors.

    ``data`` is an ordinary FAISS file, ``sha256`` its hash in hex.
    """

    spec: IndexSpec
    data: bytes
    sha256: str

    def open(self) -> Index:
        """Return a new FAISS index, trained and empty."""
        return faiss.deserialize_index(np.frombuffer(self.data, np.uint8))


def train(sample: FloatArray, factory: str, metric: Metric, *, kmeans: KMeans | None = None) -> TrainedIndex:
    """Train an index on a sample.

    Args:
        sample: (n, dim) float16 or float32 rows of unit norm, drawn uniformly over the whole
            corpus; ``check_factory(...).training_rows`` of them are enough. Not changed. Kinds that
            learn nothing take (0, dim).
        factory: a string that `check_factory` accepts.
        metric: what the index compares by.
        kmeans: finds the centroids instead of FAISS, for instance on a GPU. It gets the sample
            as the lists see it (after a rotation) and whether centroids must have unit norm.

    Raises:
        IndexBuildError: the factory is refused; the sample has too few rows, too few different
            rows, or a bad one; ``kmeans`` returned another shape or a value that is not finite.
    """
    spec = check_factory(factory, sample.shape[-1], metric)
    check_rows(sample, spec.dim, "training sample")
    if len(sample) < spec.min_training_rows:
        raise IndexBuildError(
            f"{spec.factory} needs at least {spec.min_training_rows} training rows, got {len(sample)}: "
            "use fewer lists or 'Flat'"
        )
    if spec.min_training_rows:
        _check_variety(sample, spec.nlist)
    index = faiss.index_factory(spec.dim, spec.factory, metric.faiss)
    if spec.training_rows:
        rows = np.ascontiguousarray(sample, dtype=np.float32)
        _train_lists(index, rows, spec, kmeans)
        index.train(rows)
    data = faiss.serialize_index(index).tobytes()
    return TrainedIndex(spec, data, hashlib.sha256(data).hexdigest())


def load_trained(data: bytes, factory: str, metric: Metric, dim: int, sha256: str) -> TrainedIndex:
    """Make a trained index from its stored file.

    Args:
        data: what `TrainedIndex.data` was.
        factory: what it was trained with.
        metric: the same.
        dim: the same.
        sha256: the hash noted when it was trained.

    Raises:
        IndexBuildError: the file is not the one that was trained, or not of this factory.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise IndexBuildError(
            f"trained index has sha256 {found}, {sha256} was noted: it is another or damaged"
        )
    trained = TrainedIndex(check_factory(factory, dim, metric), data, sha256)
    try:
        index = trained.open()
    except RuntimeError as error:
        raise IndexBuildError(f"trained index cannot be read: {error}") from error
    ivf = faiss.try_extract_index_ivf(index)
    nlist = 1 if ivf is None else ivf.nlist
    if (index.d, index.metric_type, nlist) != (dim, metric.faiss, trained.spec.nlist):
        raise IndexBuildError(
            f"trained index has dim {index.d}, metric {index.metric_type}, {nlist} lists: not {factory}"
        )
    if not index.is_trained or index.ntotal:
        raise IndexBuildError(f"trained index must be trained and empty, it holds {index.ntotal} vectors")
    return trained


def centroids(trained: TrainedIndex) -> FloatArray:
    """Return the (nlist, d) float32 centroids of an IVF index, in the space after its rotation.

    A row (after `rotate`) belongs to the list ``argmax(x @ C.T)`` for inner product,
    ``argmax(x @ C.T - |C|^2 / 2)`` for L2.

    Raises:
        IndexBuildError: the index has no lists.
    """
    if trained.spec.kind is not Kind.IVF:
        raise IndexBuildError(f"{trained.spec.factory} has no centroids")
    index = trained.open()  # keeps the memory of its quantizer alive
    quantizer = faiss.extract_index_ivf(index).quantizer
    found: FloatArray = quantizer.reconstruct_n(0, trained.spec.nlist)
    return found


def rotate(index: Index, rows: FloatArray) -> FloatArray:
    """Apply the index's pre-transform, if it has one, to (n, dim) float32 rows."""
    # A second name: FAISS frees the index as soon as the name that owns it is bound anew.
    outer = faiss.downcast_index(index)
    if not isinstance(outer, faiss.IndexPreTransform):
        return rows
    for step in range(outer.chain.size()):
        rows = outer.chain.at(step).apply(rows)
    return rows


def default_nprobe(nlist: int) -> int:
    """Return the lists that plain FAISS probes on opening the file, until a better number is tuned."""
    return min(nlist, max(8, math.isqrt(nlist)))


def _train_lists(index: Index, rows: FloatArray, spec: IndexSpec, kmeans: KMeans | None) -> None:
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return
    ivf.cp.niter = KMEANS_ITERATIONS
    ivf.nprobe = default_nprobe(spec.nlist)
    quantizer = faiss.downcast_index(ivf.quantizer)
    if isinstance(quantizer, faiss.IndexHNSW):
        quantizer.hnsw.efSearch = HNSW_EF_SEARCH
    if kmeans is None:
        return
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexPreTransform):
        transform = outer.chain.at(0)
        transform.train(rows)
        rows = transform.apply(rows)
    found = kmeans(rows, spec.nlist, spec.metric is Metric.INNER_PRODUCT)
    if found.shape != (spec.nlist, rows.shape[1]) or not np.isfinite(found).all():
        raise IndexBuildError(f"k-means returned shape {found.shape}, or a value that is not finite")
    # A quantizer that holds nlist centroids already is left alone by index.train.
    quantizer.train(found)
    quantizer.add(np.ascontiguousarray(found, dtype=np.float32))


def _check_variety(sample: FloatArray, least: int) -> None:
    """Refuse a sample with fewer different rows than lists: k-means would invent centroids."""
    factors = np.random.default_rng(0).integers(1, 1 << 63, sample.shape[1], dtype=np.uint64)
    hashes = np.empty(len(sample), np.uint64)
    for start in range(0, len(sample), _HASH_ROWS):
        rows = np.ascontiguousarray(sample[start : start + _HASH_ROWS], dtype=np.float32)
        hashes[start : start + len(rows)] = (rows.view(np.uint32) * factors).sum(axis=1)
    different = len(np.unique(hashes))
    if different < least:
        raise IndexBuildError(f"the training sample has {different} different rows for {least} lists")
