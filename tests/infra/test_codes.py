"""Cron and Airflow act on the exit codes: 0 is done, 1 goes on, 2 is not tried again, 75 later."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import REPOSITORY


def cron_line() -> str:
    lines = (REPOSITORY / "infra/cron/crontab").read_text().splitlines()
    [line] = [line for line in lines if line[:1].isdigit()]
    return line.split(maxsplit=5)[5]


@pytest.mark.parametrize(
    ("code", "mails", "runs"), [(0, 0, 3), (1, 3, 3), (2, 1, 1), (75, 3, 3), (143, 3, 3)]
)
def test_cron_tries_again_what_a_rerun_mends(tmp_path: Path, code: int, mails: int, runs: int) -> None:
    program, told = tmp_path / "bge-ray", tmp_path / "told"
    program.write_text(f'#!/bin/sh\necho "$@" >> "{told}"\nexit {code}\n')
    program.chmod(0o755)
    own = {"BGE_RAY": program, "CONFIG": "x.yaml", "LOG": tmp_path / "log", "LOCK": tmp_path / "lock"}
    environment = {**os.environ, **{k: str(v) for k, v in own.items()}}

    def night() -> str:
        line = ["/bin/sh", "-c", cron_line()]
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False).stdout

    mail = [night() for _ in range(3)]
    assert [text for text in mail if text] == [f"embed: exit code {code}; see {tmp_path}/log\n"] * mails
    assert told.read_text().splitlines() == ["embed --config x.yaml"] * runs
    if code == 2:  # and again once five hours have passed
        os.utime(tmp_path / "lock.refused", (time.time() - 18_060,) * 2)
        assert night()


AIRFLOW = """
import logging, types
class AirflowException(Exception): pass
class AirflowFailException(AirflowException): pass
class BaseOperator:
    def __init__(self, **_): self.log = logging.getLogger("task")
class Connection:
    @staticmethod
    def get(_): return types.SimpleNamespace(host=HOST, password="token")
import sys
sdk, exceptions = types.ModuleType("airflow.sdk"), types.ModuleType("airflow.sdk.exceptions")
sdk.BaseOperator, sdk.Connection, sdk.exceptions = BaseOperator, Connection, exceptions
exceptions.AirflowException, exceptions.AirflowFailException = AirflowException, AirflowFailException
airflow = types.ModuleType("airflow")
airflow.sdk = sdk
sys.modules |= {"airflow": airflow, "airflow.sdk": sdk, "airflow.sdk.exceptions": exceptions}
import ray_jobs
ray_jobs.POLL_S = ray_jobs.BUSY_S = 0.01
context = {"ti": types.SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=-1)}
try:
    print("RETURNED", ray_jobs.RayJobOperator(task_id="t", command=["x"]).execute(context)["exit_code"])
except AirflowException as error:
    print("RAISED", type(error).__name__, error)
"""


@pytest.fixture
def head() -> Iterator[tuple[str, list[int], list[str]]]:
    """A server that speaks the part of Ray's Jobs API that is used: address, codes to come, submissions."""
    codes: list[int] = []
    jobs: dict[str, int] = {}

    class Api(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/api/jobs/")
            if name.endswith("/logs"):
                self.answer(200, {"logs": "a line\n"})
            elif name in jobs:
                status = "FAILED" if jobs[name] else "SUCCEEDED"
                self.answer(200, {"status": status, "driver_exit_code": jobs[name], "message": "m"})
            else:
                self.answer(404, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            jobs[body["submission_id"]] = codes.pop(0)
            self.answer(200, {})

        def answer(self, status: int, content: object) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", codes, jobs  # type: ignore[misc]
        server.shutdown()


@pytest.mark.parametrize(
    ("codes", "says", "submissions"),
    [
        ([0], "RETURNED 0", 1),
        ([1, 0], "RAISED AirflowException ", 1),  # which Airflow retries
        ([2, 0], "RAISED AirflowFailException ", 1),  # which it does not
        ([75, 75, 0], "RETURNED 0", 3),
        ([75, 1, 0], "RAISED AirflowException ", 2),
    ],
)
def test_the_operator_acts_on_the_code(
    head: tuple[str, list[int], dict[str, int]], codes: list[int], says: str, submissions: int
) -> None:
    """The operator with stand-ins for the few names of Airflow, which has an environment of its own."""
    address, to_come, jobs = head
    to_come += codes
    done = subprocess.run(
        [sys.executable, "-c", f"HOST = {address!r}\n{AIRFLOW}"],
        cwd=REPOSITORY / "infra/airflow",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith(says), done.stdout + done.stderr
    assert len(jobs) == submissions
