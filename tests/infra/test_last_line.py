"""The last line of a job's log tells how it ended, whatever happened; no Ray is needed to see that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import open_folder
from bge_ray.storage.reports import write_report
from tests.support.runs import REPOSITORY
from tests.support.warm import warm_environment

pytestmark = pytest.mark.long

DEFECT = """
import sys
from bge_ray.command import run_job
from bge_ray.jobs import Job
from bge_ray.storage.reports import write_report
from bge_ray.errors import SettingsError
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import open_folder
def job(settings, dry_run, stop):
    if "reported" in sys.argv[0]:
        folder = open_folder(Storage(), settings.output.uri, "dataset", "output.uri")
        write_report(folder, b"<html></html>", b"{}")
    raise SettingsError("of the index") if "refused" in sys.argv[0] else ZeroDivisionError("unforeseen")
raise SystemExit(run_job(Job("embed", "", (), job, "output.uri/report.html"), sys.argv[1:]))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env={**os.environ, **warm_environment()},
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


def test_an_unforeseen_error_keeps_the_log_whole(tmp_path: Path) -> None:
    earlier = open_folder(Storage(), str(tmp_path), "dataset", "output.uri")
    write_report(earlier, b"of an earlier run", b"{}")
    for script, report in [
        ("failed.py", ""),
        ("reported_and_failed.py", f"; report at {tmp_path}/report.html"),
    ]:
        (tmp_path / script).write_text(DEFECT)
        words = ("--log-format", "json", "--set", f"output.uri={tmp_path}")
        done = run(str(tmp_path / script), *words)
        assert done.returncode == 1, done.stderr
        *_, failure, last = [json.loads(line) for line in done.stderr.splitlines()]
        assert "ZeroDivisionError: unforeseen" in failure["traceback"]
        assert last["message"] == f"embed: incomplete; exit code 1{report}"


SIGNALLED = """
import os, signal, sys
from bge_ray.command import run_job
from bge_ray.jobs import Job
from bge_ray.pipeline.engine.cluster import connect
from bge_ray.settings.sections import ResourcesSettings
def job(settings, dry_run, stop):
    if "midway" in __file__:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise SystemError("an exception lost in foreign code")
    connect(ResourcesSettings())
    import ray._private.node
    kill = ray._private.node.Node.kill_all_processes
    def killed_under_a_signal(node, **how):  # Ray's core is down then, and has taken every handler away
        os.kill(os.getpid(), signal.SIGTERM)
        kill(node, **how)
    ray._private.node.Node.kill_all_processes = killed_under_a_signal
raise SystemExit(run_job(Job("embed", "", (), job), sys.argv[1:]))
"""


def test_a_signal_that_is_lost_in_foreign_code_stops_the_job_all_the_same(tmp_path: Path) -> None:
    script = tmp_path / "midway.py"
    script.write_text(SIGNALLED)
    done = run(str(script))
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("INFO embed: stopped; exit code 143")


@pytest.mark.ray
@pytest.mark.slow
def test_a_signal_that_comes_when_all_is_done_changes_nothing(tmp_path: Path) -> None:
    script = tmp_path / "at_the_end.py"
    script.write_text(SIGNALLED)
    done = run(str(script))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].endswith("INFO embed: done; exit code 0")


def test_what_is_refused_after_something_was_written_does_not_deny_it(tmp_path: Path) -> None:
    script = tmp_path / "reported_and_refused.py"
    script.write_text(DEFECT)
    done = run(str(script), "--set", f"output.uri={tmp_path}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        f"INFO embed: refused; exit code 2; report at {tmp_path}/report.html"
    )
