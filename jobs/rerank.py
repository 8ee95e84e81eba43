"""Rerank candidates: `python jobs/rerank.py --set rerank.candidates=... --set rerank.output=...`."""

import sys

from bge_ray.command import run_job
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings


def job(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    """Rerank, or say what would be done; returns the last line to print."""
    from bge_ray.pipeline.rerank.job import plan_rerank, rerank

    if dry_run:
        return plan_rerank(settings)
    report = rerank(settings, stop)
    return (
        f"{report.outcome}: {report.pairs_out:,} of {report.pairs_in:,} pairs scored, "
        f"{report.queries:,} queries in {settings.rerank.output}/run.parquet"
    )


if __name__ == "__main__":
    sys.exit(
        run_job(
            "rerank",
            "Score candidate lists with a cross-encoder, as a TREC run and Parquet.",
            job,
            report="rerank.output/report.html",
        )
    )
