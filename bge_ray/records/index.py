"""What a published index is, as index.json says it: read by searches, by the next build, by other people."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bge_ray.records.dataset import FileFact

# 3: which shards are in it, and what its effort was tuned for.
INDEX_FORMAT_VERSION = 3
# Of a shard's sha256, enough to tell it from any other.
SHARD_DIGITS = 16


@dataclass(frozen=True)
class Recall:
    """Share of the true k best that were found, averaged over queries.

    ``low`` and ``high`` are a 95 % Wilson interval with one trial a query: results of one query hang
    together, so it is never too narrow, and it says something at a recall of 1, too.
    """

    k: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CurvePoint:
    """Recall by depth ("@10") that one effort gave while the index was tuned."""

    effort: int
    recall: dict[str, float]


@dataclass(frozen=True)
class TrainedOn:
    """The trained index that the parts were made with, by path below the folder of the index."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Training:
    """The trained index that the next build may start from, as training.json says it; ``path`` as above.

    ``ceiling`` is what the first index with it recalls at most; None until there is one.
    """

    vector_fingerprint: str
    factory: str
    metric: str
    dim: int
    path: str
    sha256: str
    ceiling: float | None = None


@dataclass(frozen=True)
class Shortfall:
    """A recall below its target; ``rescore`` candidates scored again give ``rescored``, if that is enough."""

    recall: Recall
    target: float
    rescore: int | None = None
    rescored: float | None = None

    def __str__(self) -> str:
        """Say what was reached, and what was asked for."""
        return (
            f"recall@{self.recall.k} of its index is {self.recall.value:.4f}, and index.recall_target asked "
            f"for {self.target:g}"
        )


@dataclass(frozen=True)
class IndexDescription:
    """A published index.

    ``inputs`` names all that it was made from, ``shards`` the embedding shards that are in it by the first
    SHARD_DIGITS of their sha256; ``files`` and ``parts`` are below the folder of the index. ``parameter`` is
    what FAISS calls the effort of a search, None where it has none, and ``effort`` the value that was tuned,
    for ``recall_target`` at ``k`` results of ``rescore`` candidates that are scored again (0: none are).
    Recalls go by their depth, such as "@10": ``recall`` is what such a search finds, ``recall_of_codes`` what
    it finds without scoring again, ``ceiling`` what it finds at the largest effort, and
    ``recall_after_exact_reranking`` what it would find at k with ``reranked_candidates``. ``imbalance`` is
    what a search scans against equal lists, ``drift`` the share of vectors out of place since the training,
    ``seconds`` what the build took. ``results`` says what was counted: vectors, or passages in chunks.
    """

    inputs: str
    vector_fingerprint: str
    factory: str
    kind: str
    metric: str
    dim: int
    ntotal: int
    nlist: int
    files: tuple[FileFact, ...]
    shards: tuple[str, ...]
    training: TrainedOn
    parts: tuple[str, ...]
    parameter: Literal["nprobe", "efSearch"] | None
    effort: int
    recall_target: float
    k: int
    rescore: int
    reached: bool
    queries: str
    num_queries: int
    recall: dict[str, Recall]
    recall_of_codes: dict[str, Recall]
    ceiling: dict[str, Recall] | None
    ceiling_queries: int
    recall_after_exact_reranking: Recall
    reranked_candidates: int
    gain_of_exact_reranking: float
    curve: tuple[CurvePoint, ...]
    imbalance: float
    drift: float
    seconds: float
    results: Literal["vectors", "passages"] = "vectors"
    format_version: int = INDEX_FORMAT_VERSION

    @property
    def tuned_recall(self) -> Recall:
        """The recall that the target is about."""
        return self.recall[f"@{self.k}"]

    @property
    def largest_effort(self) -> int:
        """The effort beyond which searches find no more."""
        return self.nlist if self.parameter == "nprobe" else self.ntotal

    def rescored(self, k: int) -> int:
        """Return the candidates to score again for k results, in the proportion that was tuned; 0: none."""
        return -(-self.rescore * max(k, self.k) // self.k)

    def shortfall(self, k: int, rescored: int) -> Shortfall | None:
        """Return what a search for k results misses that scores so many candidates again; None: nothing."""
        enough = -(-self.reranked_candidates * max(k, self.k) // self.k)
        best = self.recall_after_exact_reranking.value
        reaches = best >= self.recall_target
        if self.reached or (reaches and rescored >= enough):
            return None
        return Shortfall(
            self.tuned_recall, self.recall_target, *((enough, best) if reaches else (None, None))
        )

    def lacks(self, shard_hashes: Iterable[str]) -> list[str]:
        """Return those of a data set's shards, by their sha256, that are not in the index."""
        there = set(self.shards)
        return [sha256 for sha256 in shard_hashes if sha256[:SHARD_DIGITS] not in there]

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(file.bytes for file in self.files)
