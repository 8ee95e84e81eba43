"""Build the FAISS index of a data set: `python jobs/index.py --set output.uri=s3://bucket/embeddings`."""

import sys

from bge_ray.command import run_job
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings


def job(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    """Build, or say what would be built; returns the last line to print."""
    from bge_ray.pipeline.index.job import index_outcome, plan_index

    if dry_run:
        return plan_index(settings)
    return index_outcome(settings, stop)


if __name__ == "__main__":
    sys.exit(
        run_job(
            "index",
            "Build a FAISS index from embedding shards, and measure its recall.",
            job,
            report="output.uri/index/report.html",
        )
    )
