"""Measure runs: `python jobs/evaluate.py --set evaluate.run=[a/run.trec,b] --set evaluate.qrels=test.tsv`."""

import sys

from bge_ray.command import run_job
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings


def job(settings: Settings, dry_run: bool, _: StopRequest) -> str:
    """Measure, or say what would be measured; returns the table to print."""
    from bge_ray.evaluate import evaluate, to_markdown

    if dry_run:
        settings.require("evaluate.run", "evaluate.qrels")
        where = settings.evaluate.output or "the terminal"
        return f"{settings.evaluate.run} against {settings.evaluate.qrels}, to {where}"
    return to_markdown(evaluate(settings))


if __name__ == "__main__":
    sys.exit(
        run_job(
            "evaluate",
            "Measure runs against judgements, side by side, with significance.",
            job,
            report="evaluate.output/metrics.md",
        )
    )
