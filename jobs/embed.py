"""Embed a corpus: `python jobs/embed.py --config configs/embed.yaml --set output.uri=s3://bucket/out`."""

import sys

from bge_ray.command import run_job
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings


def job(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    """Embed, and index on request, or say what would be done; returns the last lines to print."""
    from bge_ray.pipeline.embed.job import embed, plan_only

    if dry_run:
        return "\n".join(plan_only(settings).lines())
    result = embed(settings, stop)
    outcome = f"{result.report.outcome}; report at {settings.output.uri}/report.html"
    if not settings.index.build:
        return outcome
    from bge_ray.pipeline.index.job import index_outcome

    return f"{outcome}\n{index_outcome(settings, stop)}"


if __name__ == "__main__":
    sys.exit(
        run_job(
            "embed",
            "Embed a corpus into Parquet shards, doing only what is not done yet.",
            job,
            report="output.uri/report.html",
        )
    )
