"""Embed a corpus: `python jobs/embed.py --config configs/embed.yaml --set output.uri=s3://bucket/out`."""

import sys

from bge_ray.command import run_job
from bge_ray.pipeline.stopping import StopRequest
from bge_ray.settings import Settings


def job(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    """Embed, or say what would be done; returns the last line to print."""
    from bge_ray.pipeline.embed import embed, plan_only

    if dry_run:
        return "\n".join(plan_only(settings).lines())
    result = embed(settings, stop)
    return f"{result.report['outcome']}; report at {settings.output.uri}/report.html"


if __name__ == "__main__":
    sys.exit(run_job("embed", "Embed a corpus into Parquet shards, doing only what is not done yet.", job))
