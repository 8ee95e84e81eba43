"""Which FAISS index: choose one by size, and check what a user asked for.

A factory string is taken only if its merge is known to equal a build in one go. FAISS itself
accepts many more and then merges some of them into garbage, or corrupts the heap. Three kinds
are left:

    ivf     an IVF index; parts are merged by ranges of lists
    flat    all codes in one list behind IDMap2; parts are merged in order
    shards  HNSW, which cannot be merged: one index file a shard, results merged at search time
"""

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from bge_ray.errors import IndexBuildError
from bge_ray.index.package import faiss

# Recall gained nothing from 108 or 146 points a centroid, and lost from 39 (k-means, dim 96, nlist 1024).
TRAINING_POINTS = 64
MIN_TRAINING_POINTS = 39
# Enough rows to see the range of every dimension of a scalar quantizer.
SCALAR_TRAINING_ROWS = 4096

MAX_NLIST = 1 << 20
FLAT_MAX_ROWS = 100_000
ID_BYTES = 8

_TRANSFORM = r"(?:(?P<transform>RR(?P<rr>\d*)|HR|OPQ(?P<opq>\d+)(?:_(?P<opq_dim>\d+))?),)?"
_CODEC = r"Flat|SQ(?:4|6|8|fp16|bf16)|PQ\d+(?:x(?P<bits>[4-8]))?|RaBitQ[1-9]?|EDEN[1-8]"
_IVF = re.compile(
    rf"{_TRANSFORM}IVF(?P<nlist>\d+)(?P<unit>[kM]?)(?P<quantizer>_HNSW\d*)?,(?P<codec>{_CODEC})"
)
_FLAT = re.compile(r"(?:IDMap2?,)?(?P<codec>Flat|SQ(?:4|6|8|fp16|bf16))")
_HNSW = re.compile(r"(?:IDMap2?,)?(?P<codec>HNSW(?P<m>\d+)(?:[,_](?:Flat|SQ8|SQfp16))?)")

# The first pattern found in a refused string says why, and what to use instead.
_REFUSALS = (
    (
        r"fs(?:r|_\d+)?(?:,|$)",
        "merging FastScan codes corrupts memory in FAISS: build the same string without 'fs' and "
        "convert the finished index with faiss.IndexIVFPQFastScan or faiss.IndexIVFRaBitQFastScan",
    ),
    (r"Panorama", "merging Panorama codes gives garbage in FAISS: use 'IVF...,Flat'"),
    (
        r"Refine|,RFlat|,RSQ",
        "a refining store cannot be merged: leave it out and re-rank from the embedding shards "
        "(search with exact re-ranking)",
    ),
    (r"IDMap.*IVF", "an IVF index stores int64 ids itself: leave IDMap out"),
    (r"NSG", "NSG cannot be merged nor added to: use 'HNSW32' (one index a shard)"),
    (r"IVF.*,PQ\d+\+", "IVFPQR aborts the process when merged: use 'IVF...,PQ...' and re-rank"),
    (r"Dedup", "FlatDedup is not kept through a merge: use 'IVF...,Flat'"),
    (r"IMI", "a multi-index has no list ranges worth merging: use 'IVF...'"),
    (r"L2norm", "vectors are normalised before they are added: leave L2norm out"),
    (
        r"PCA|ITQ|Pad",
        "a transform that changes the length of vectors makes scores no inner products: use "
        "'RR,IVF...,RaBitQ' or 'IVF...,SQ4' for small codes",
    ),
    (r"^(?:IDMap2?,)?(?:PQ|RaBitQ|EDEN)", "small codes without lists are slow: use 'IVF...,' before them"),
    (r"IVF\d+[kM]?$", "the codec is missing: for example 'IVF4096,SQ8'"),
)


class Metric(StrEnum):
    """How FAISS compares vectors; scores are inner products either way."""

    # Preferred: on unit vectors both rank alike, and lossy codes lose less recall with L2.
    L2 = "l2"
    INNER_PRODUCT = "ip"

    @property
    def faiss(self) -> int:
        """The constant that FAISS uses."""
        return int(faiss.METRIC_L2 if self is Metric.L2 else faiss.METRIC_INNER_PRODUCT)


class Kind(StrEnum):
    """How the parts of an index become one result."""

    IVF = "ivf"
    FLAT = "flat"
    SHARDS = "shards"


@dataclass(frozen=True)
class IndexSpec:
    """A checked factory string.

    ``factory`` is the string in full (``IDMap2`` and the rotation's size filled in), ``nlist`` is 1
    for kinds other than IVF, ``code_size`` the bytes of one code without its id (an HNSW entry
    counts its links), ``training_rows`` what to sample and ``min_training_rows`` the least that is
    accepted; both are 0 where nothing is trained.
    """

    factory: str
    kind: Kind
    metric: Metric
    dim: int
    nlist: int
    code_size: int
    training_rows: int
    min_training_rows: int


def check_factory(factory: str, dim: int, metric: Metric) -> IndexSpec:
    """Check a FAISS factory string and work out what the build needs to know.

    ``Flat``, ``SQ8`` and the like, and ``HNSW32``, get the ``IDMap2`` in front that keeps vector ids.

    Args:
        factory: for example ``IVF4096,SQ8``, ``RR,IVF65536,RaBitQ``, ``Flat`` or ``HNSW32``.
        dim: length of a vector.
        metric: what the index compares by.

    Raises:
        IndexBuildError: FAISS does not know the string or the build does not support it; the
            message says what to use instead.
    """
    if match := _IVF.fullmatch(factory):
        return _ivf_spec(match, dim, metric)
    if match := _FLAT.fullmatch(factory):
        codec = match["codec"]
        rows = 0 if codec in ("Flat", "SQfp16", "SQbf16") else SCALAR_TRAINING_ROWS
        size = _code_size(codec, dim, metric, factory)
        return IndexSpec(f"IDMap2,{codec}", Kind.FLAT, metric, dim, 1, size, rows, min(rows, 1))
    if match := _HNSW.fullmatch(factory):
        # An HNSW entry: its vector, 2 * M links of int32 on level 0, and about a sixteenth on top.
        codec = match["codec"].replace("_", ",")
        size = _code_size(codec, dim, metric, factory) + 8 * int(match["m"]) + 16
        rows = SCALAR_TRAINING_ROWS if codec.endswith("SQ8") else 0
        return IndexSpec(f"IDMap2,{codec}", Kind.SHARDS, metric, dim, 1, size, rows, min(rows, 1))
    for pattern, advice in _REFUSALS:
        if re.search(pattern, factory):
            raise IndexBuildError(f"index.factory {factory!r} is not supported: {advice}")
    raise IndexBuildError(
        f"index.factory {factory!r} is not supported: use 'auto', 'Flat', 'IVF<lists>,SQ8', "
        "'RR,IVF<lists>,RaBitQ' or 'HNSW32'"
    )


def _ivf_spec(match: re.Match[str], dim: int, metric: Metric) -> IndexSpec:
    factory = match[0]
    nlist = int(match["nlist"]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[match["unit"]]
    if not 1 <= nlist <= MAX_NLIST:
        raise IndexBuildError(f"index.factory {factory!r}: {nlist} lists, must be 1 to {MAX_NLIST}")
    for size in (match["rr"], match["opq_dim"]):
        if size and int(size) != dim:
            raise IndexBuildError(f"index.factory {factory!r}: the rotation must keep {dim} dimensions")
    codec = match["codec"]
    transform = ""
    if match["transform"]:
        transform = f"RR{dim}," if match["transform"].startswith("RR") else f"{match['transform']},"
    if match["opq"] and not codec.startswith("PQ"):
        raise IndexBuildError(f"index.factory {factory!r}: OPQ helps PQ only, use 'RR' before {codec}")
    centroids = nlist
    if codec.startswith("PQ"):
        centroids = max(nlist, 1 << int(match["bits"] or 8))
    return IndexSpec(
        factory=f"{transform}IVF{nlist}{match['quantizer'] or ''},{codec}",
        kind=Kind.IVF,
        metric=metric,
        dim=dim,
        nlist=nlist,
        # A twin with one list: the empty index of a million lists takes 160 MB.
        code_size=_code_size(f"{transform}IVF1,{codec}", dim, metric, factory),
        training_rows=max(TRAINING_POINTS * centroids, SCALAR_TRAINING_ROWS),
        min_training_rows=MIN_TRAINING_POINTS * centroids,
    )


def _code_size(factory: str, dim: int, metric: Metric, asked: str) -> int:
    try:
        index = faiss.index_factory(dim, factory, metric.faiss)
    except RuntimeError as error:
        reason = str(error).rstrip().rsplit("\n", 1)[-1]
        raise IndexBuildError(f"index.factory {asked!r} is not possible with dim {dim}: {reason}") from error
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        return int(ivf.code_size)
    storage = index.storage if factory.startswith("HNSW") else index
    return int(storage.sa_code_size())


def choose_nlist(n_rows: int) -> int:
    """Return the power of two nearest to 8 * sqrt(n_rows) that leaves TRAINING_POINTS rows a list."""
    wanted = round(math.log2(8 * math.sqrt(max(n_rows, 1))))
    trainable = math.floor(math.log2(max(n_rows // TRAINING_POINTS, 1)))
    return int(min(1 << min(wanted, trainable), MAX_NLIST))


def index_bytes(spec: IndexSpec, n_rows: int) -> int:
    """Estimate the size of the finished index in bytes, within a few per cent."""
    lists = spec.nlist * (ID_BYTES + 4 * spec.dim) if spec.kind is Kind.IVF else 0
    if "_HNSW" in spec.factory:
        lists += spec.nlist * 300  # links of the coarse quantizer, M = 32
    rotation = 4 * spec.dim**2 if spec.factory.startswith(("RR", "OPQ")) else 0
    return n_rows * (spec.code_size + ID_BYTES) + lists + rotation
