"""What each job of a trial is asked to do, and where its files are."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.campaign.corpus import UNIT_ROWS
from tests.campaign.moments import EMBED, INDEX, RERANK, SEARCH

CORPUS = "corpus/campaign"
QUERIES = "corpus/queries/queries.jsonl"
TOKENS = 64
# Most passages of the campaign are longer than a chunk.
CHUNK_TOKENS, OVERLAP_TOKENS = 24, 6
Reuse = Literal["object", "corpus"]


@dataclass(frozen=True)
class Models:
    """Folders of the two models that a campaign has."""

    encoder: Path
    reranker: Path


@dataclass(frozen=True)
class Asked:
    """A search, or a rerank of the run that ``over`` published; all that decides its outcome.

    ``exact`` passes the index by; ``reranks`` is search.rerank. ``outside`` puts the reranked run beside
    search.output, not into it. ``max_length`` is in tokens, of a query or, where there is a reranker, of
    a pair.
    """

    job: Literal["search", "rerank"]
    exact: bool
    reranks: bool = False
    outside: bool = False
    k: int = 10
    depth: int = 6
    tag: str = "campaign"
    max_length: int = TOKENS
    over: "Asked | None" = None

    @property
    def title(self) -> str:
        """Name it as the summary counts it."""
        how = "reranked" if self.reranks else "exact" if self.exact else "index"
        return f"search ({how})" if self.job == SEARCH else "rerank"

    @property
    def content(self) -> "Asked":
        """Return what decides the content of the run files: where they are does not."""
        over = self.over.content if self.over is not None else None
        return dataclasses.replace(self, outside=False, over=over)

    def folders(self, root: str) -> list[str]:
        """Return the folders that it writes; the first has the report."""
        reranked = f"{root}/reranked" if self.outside else f"{root}/run/reranked"
        if self.job == RERANK:
            return [reranked]
        return [f"{root}/run", reranked] if self.reranks else [f"{root}/run"]


def written_folders(root: str) -> list[str]:
    """Return every folder below a trial's root that a job may write: those with journals and reports."""
    names = ("dataset", "dataset/index", "run", "run/reranked", "reranked")
    return [f"{root}/{name}" for name in names]


def dataset_settings(
    job: str, root: str, models: Models, *, encoders: int, grace_s: int, chunked: bool, reuse: Reuse
) -> dict[str, object]:
    """Return the settings of every embed or index run of a trial."""
    common: dict[str, object] = {
        "output.uri": f"s3://{root}/dataset",
        "output.storage_timeout_s": 60,
        "output.grace_s": grace_s,
    }
    if job == INDEX:
        return common | {"index.factory": "IVF8,SQ8", "index.num_queries": 50, "index.part_bytes": 100_000}
    assert job == EMBED
    if chunked:
        common |= {"chunking.max_tokens": CHUNK_TOKENS, "chunking.overlap_tokens": OVERLAP_TOKENS}
    return common | {
        "corpus.uri": f"s3://{CORPUS}",
        "corpus.max_rejected_fraction": 0.05,
        "output.reuse": reuse,
        "model.name": models.encoder,
        "model.max_length": TOKENS,
        "batching.unit_rows": UNIT_ROWS,
        "resources.num_encoders": encoders,
        "resources.threads_per_encoder": 1,
    }


def run_settings(asked: Asked, root: str, models: Models) -> dict[str, object]:
    """Return the settings of a search or rerank: some units of some groups each."""
    settings: dict[str, object] = {
        "output.uri": f"s3://{root}/dataset",
        "output.storage_timeout_s": 60,
        "search.queries": f"s3://{QUERIES}",
        "search.tag": asked.tag,
        "resources.num_encoders": 1,
        "resources.threads_per_encoder": 1,
    }
    if asked.job == SEARCH:
        settings |= {
            "search.output": f"s3://{root}/run",
            "search.k": asked.k,
            "search.exact": str(asked.exact).lower(),
            "search.unit_queries": 12,
            "search.num_searchers": 1,
            "search.max_rejected_fraction": 0.1,
            "model.name": models.encoder,
            "model.max_length": TOKENS if asked.reranks else asked.max_length,
        }
    if asked.job == RERANK or asked.reranks:
        settings |= {
            "rerank.model": models.reranker,
            "rerank.max_length": asked.max_length,
            "rerank.depth": asked.depth,
            "rerank.unit_pairs": 60,
            "rerank.join_pairs": 130,
            "rerank.num_rerankers": 1,
            "rerank.threads_per_reranker": 1,
        }
    if asked.job == RERANK:
        settings["rerank.candidates"] = f"s3://{root}/run"
    if asked.job == RERANK or asked.outside:
        settings["rerank.output"] = f"s3://{asked.folders(root)[-1]}"
    if asked.reranks:
        settings["search.rerank"] = "true"
    return settings
