"""Measure this machine: `python jobs/bench.py`; one table with what a user would pick instead."""

import itertools
import sys

from bge_ray.command import run_job
from bge_ray.formats.docstrings import find_docstrings
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings


def job(settings: Settings, dry_run: bool, _: StopRequest) -> str:
    """Measure, or say what would be measured; returns the table."""
    from bge_ray.bench.run import run_bench, to_markdown

    bench = settings.bench
    if dry_run:
        return f"{bench.rows:,} passages, {bench.repeats} runs each, shapes {', '.join(bench.shapes)}"
    needed = max(bench.rows, bench.pairs)
    passages = list(itertools.islice(find_docstrings(), needed))
    outcome = run_bench(settings, [title for _, title, _ in passages], [text for *_, text in passages])
    return to_markdown(outcome)


if __name__ == "__main__":
    sys.exit(run_job("bench", "Measure tokens/s and utilisation beside what a user would pick instead.", job))
