"""The last line of a job's log tells how it ended, whatever happened; no Ray is needed to see that."""

import json
import os
import subprocess
import sys

from tests.support.runs import REPOSITORY

DEFECT = """
from bge_ray.command import run_job
def job(settings, dry_run, stop):
    raise ZeroDivisionError("unforeseen")
raise SystemExit(run_job("embed", "", job, report="output.uri/report.html"))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_wrong_settings_are_refused_without_a_report() -> None:
    done = run("jobs/embed.py", "--set", "corpus.ury=x")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("INFO embed: refused, nothing was written; exit code 2"), (
        done.stderr
    )


def test_an_unforeseen_error_keeps_the_log_whole() -> None:
    done = run("-c", DEFECT, "--log-format", "json", "--set", "output.uri=/data/out")
    assert done.returncode == 1, done.stderr
    *_, failure, last = [json.loads(line) for line in done.stderr.splitlines()]
    assert "ZeroDivisionError: unforeseen" in failure["traceback"]
    assert last["message"] == "embed: incomplete; exit code 1; report at /data/out/report.html"
