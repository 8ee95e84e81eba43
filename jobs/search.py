"""Answer queries: `python jobs/search.py --config configs/search.yaml --set search.queries=queries.jsonl`."""

import sys

from bge_ray.command import run_job
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings


def job(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    """Search, or say what would be done; returns the last line to print."""
    from bge_ray.pipeline.search.job import plan_search, search

    if dry_run:
        return plan_search(settings)
    report = search(settings, stop)
    return (
        f"{report.outcome}: {report.queries_out:,} of {report.queries_in:,} queries answered, "
        f"{report.results:,} results in {settings.search.output}/run.parquet"
    )


if __name__ == "__main__":
    sys.exit(
        run_job(
            "search",
            "Answer queries from a data set, as a TREC run and Parquet.",
            job,
            report="search.output/report.html",
        )
    )
