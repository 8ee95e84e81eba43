"""Build the FAISS index of a data set: `python jobs/index.py --set output.uri=s3://bucket/embeddings`."""

import sys

from bge_ray.command import run_job
from bge_ray.errors import RecallError
from bge_ray.pipeline.stopping import StopRequest
from bge_ray.settings import Settings


def job(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    """Build, or say what would be built; returns the last line to print."""
    from bge_ray.pipeline.index import build_index, plan_index

    if dry_run:
        return plan_index(settings)
    index = build_index(settings, stop)
    recall = index["recall"].get("@10") or index["recall"]["@1"]
    line = (
        f"{index['factory']}: {index['ntotal']:,} vectors, recall@{recall['k']} {recall['value']:.4f} at nprobe "
        f"{index['nprobe']}, {index['recall_after_exact_reranking']['value']:.4f} with exact re-ranking; "
        f"see {settings.output.uri}/index/index.json"
    )
    if not index["reached"]:
        target = index["recall_target"]
        raise RecallError(f"{line}; index.recall_target {target:g} was not reached: use a larger code")
    return line


if __name__ == "__main__":
    sys.exit(run_job("index", "Build a FAISS index from embedding shards, and measure its recall.", job))
