"""What a published index is, as index.json says it: read by searches, by the next build, by other people."""

from dataclasses import dataclass
from typing import Literal

from bge_ray.records.dataset import FileFact

# 2: the effort stands under `effort` and its name under `parameter`, which were `nprobe` and `effort`.
INDEX_FORMAT_VERSION = 2


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
    """The trained index that the next build may start from, as training.json says it; ``path`` as above."""

    vector_fingerprint: str
    factory: str
    metric: str
    dim: int
    path: str
    sha256: str


@dataclass(frozen=True)
class IndexDescription:
    """A published index.

    ``inputs`` names all that it was made from, ``files`` and ``parts`` are below the folder of the
    index. ``parameter`` is what FAISS calls the effort of a search, None where it has none, and
    ``effort`` the value that was tuned. Recalls go by their depth, such as "@10"; ``ceiling`` is what
    the code allows at most. ``imbalance`` is what a search scans against equal lists, ``drift`` the
    share of vectors out of place since the training, ``seconds`` what the build took.
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
    training: TrainedOn
    parts: tuple[str, ...]
    parameter: Literal["nprobe", "efSearch"] | None
    effort: int
    recall_target: float
    reached: bool
    queries: str
    num_queries: int
    recall: dict[str, Recall]
    ceiling: dict[str, Recall] | None
    ceiling_queries: int
    recall_after_exact_reranking: Recall
    gain_of_exact_reranking: float
    curve: tuple[CurvePoint, ...]
    imbalance: float
    drift: float
    seconds: float
    format_version: int = INDEX_FORMAT_VERSION

    @property
    def tuned_recall(self) -> Recall:
        """The recall that the target is about: at 10, or at 1 where there are fewer vectors."""
        return self.recall.get("@10") or self.recall["@1"]

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(file.bytes for file in self.files)
