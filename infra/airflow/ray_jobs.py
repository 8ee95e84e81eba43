"""An operator that runs a command as a Ray job, over the Jobs API alone.

Why it exists (looked up in November 2026): `astro-provider-ray` is discontinued and its authors say so on
its page; a Ray provider within Apache Airflow was proposed and closed; `apache-airflow-providers-google`
ships Ray operators, which bring Google's client libraries with them and need the same Ray version on both
sides. Plain HTTP needs neither: no Ray is installed beside Airflow, and the cluster may be
upgraded on its own.

The connection (default `ray_jobs`) holds the address of the head's dashboard and its token:

    AIRFLOW_CONN_RAY_JOBS='{"conn_type": "http", "host": "http://head:8265", "password": "<RAY_AUTH_TOKEN>"}'
"""

import hashlib
import json
import re
import shlex
import time
from typing import Any

import requests
from airflow.sdk import BaseOperator, Connection
from airflow.sdk.exceptions import AirflowException, AirflowFailException

POLL_S = 5.0
# How long the head may be out of reach before a task gives up; the job itself goes on meanwhile.
PATIENCE_S = 600.0
REQUEST_S = 60.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
# What `ray job stop` waits for before it kills: enough to give the lease back and write the report.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
# Exit codes of the jobs (bge_ray/errors.py): what no rerun mends, and an output that another run holds.
REFUSED, BUSY = 2, 75
# A run that holds the output is waited for without using up a try: so often, and for so long.
BUSY_S = 300.0
BUSY_PATIENCE_S = 6 * 3600.0


class RayJobs:
    """The Jobs API of one head."""

    def __init__(self, address: str, token: str | None) -> None:
        self._jobs = f"{address.rstrip('/')}/api/jobs/"
        self._session = requests.Session()
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def find(self, submission_id: str) -> dict[str, Any] | None:
        """Return what the head knows of a job, or None if it does not know it."""
        answer = self._ask("GET", submission_id)
        return None if answer is None else dict(answer)

    def submit(self, submission_id: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
        """Start a job; a head that has this submission already refuses it."""
        body = {"submission_id": submission_id, "entrypoint": entrypoint, "runtime_env": runtime_env}
        self._ask("POST", "", json=body)

    def logs(self, submission_id: str) -> str:
        """Return all that the job has written so far."""
        return str((self._ask("GET", f"{submission_id}/logs") or {}).get("logs") or "")

    def stop(self, submission_id: str) -> None:
        """Ask the job to stop, as `ray job stop` does."""
        self._ask("POST", f"{submission_id}/stop")

    def _ask(self, method: str, path: str, **body: Any) -> dict[str, Any] | None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = self._session.request(method, self._jobs + path, timeout=REQUEST_S, **body)
            except (requests.ConnectionError, requests.Timeout) as error:
                # A submission that may have arrived is not sent twice: the retry of the task finds it.
                if method == "POST" or time.monotonic() > deadline:
                    raise AirflowException(
                        f"the Ray head does not answer at {self._jobs}: {error}"
                    ) from error
                time.sleep(POLL_S)
                continue
            if answer.status_code == requests.codes.not_found:
                return None
            if answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
                raise AirflowFailException(
                    f"the Ray head at {self._jobs} refuses the token; put its RAY_AUTH_TOKEN into the "
                    "password of the connection"
                )
            if not answer.ok:
                raise AirflowException(
                    f"{method} {self._jobs}{path}: {answer.status_code} {answer.text[-2000:]}"
                )
            return answer.json()


class RayJobOperator(BaseOperator):
    """Run a command as a Ray job: its log, its exit code, and never two of it at once.

    Submission ids count up from the DAG run and the task. A try that finds the job of an earlier one still
    running (the worker or the scheduler was lost, the job was not) follows it instead of submitting another.

    Args:
        command: words of the entrypoint; templated.
        runtime_env: of the job, as `ray job submit` takes it; templated.
        conn_id: connection with the head's address and token.
    """

    template_fields = ("command", "runtime_env")

    def __init__(
        self,
        *,
        command: list[str],
        runtime_env: dict[str, Any] | None = None,
        conn_id: str = "ray_jobs",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.command = command
        self.runtime_env = runtime_env or {}
        self.conn_id = conn_id
        self._running: str | None = None

    def execute(self, context: Any) -> dict[str, Any]:
        """Submit or join the job, follow its log, and return how it ended.

        Raises:
            AirflowFailException: exit code 2, which no retry mends.
            AirflowException: any other end but success; a retry goes on where this one ended.
        """
        jobs = self._jobs()
        patience = time.monotonic() + BUSY_PATIENCE_S
        while True:
            self._running, there = next_submission(jobs, context)
            if there:
                self.log.info("%s is still running: following it", self._running)
            else:
                self._submit(jobs, self._running)
            job = self._follow(jobs, self._running)
            code = job.get("driver_exit_code")
            if job["status"] == "SUCCEEDED":
                return {"submission_id": self._running, "status": job["status"], "exit_code": code}
            message = f"{self._running} {job['status']}, exit code {code}: {job.get('message') or ''}"[:4000]
            if code == REFUSED:
                raise AirflowFailException(message)
            if code != BUSY or time.monotonic() > patience:
                raise AirflowException(message)
            self.log.info("another run holds the output: trying again in %.0f s", BUSY_S)
            time.sleep(BUSY_S)

    def on_kill(self) -> None:
        """Stop the job: it gives its lease back, and the next try goes on where it was."""
        if self._running is not None:
            self._jobs().stop(self._running)

    def _jobs(self) -> RayJobs:
        connection = Connection.get(self.conn_id)
        return RayJobs(str(connection.host), connection.password)

    def _submit(self, jobs: RayJobs, submission_id: str) -> None:
        environment = {**STOP_WAIT, **self.runtime_env.get("env_vars", {})}
        entrypoint = shlex.join(map(str, self.command))
        self.log.info("submitting %s: %s", submission_id, entrypoint)
        jobs.submit(submission_id, entrypoint, {**self.runtime_env, "env_vars": environment})

    def _follow(self, jobs: RayJobs, submission_id: str) -> dict[str, Any]:
        shown = 0
        while True:
            job = jobs.find(submission_id)
            if job is None:
                raise AirflowException(f"the Ray head has forgotten {submission_id}: it was started anew")
            lines = jobs.logs(submission_id)
            ended = job["status"] in ENDED
            whole = len(lines) if ended else lines.rfind("\n") + 1
            for line in lines[shown:whole].splitlines():
                self.log.info("%s", line)
            shown = max(shown, whole)
            if ended:
                return job
            time.sleep(POLL_S)


def submission_of(context: Any, number: int) -> str:
    """Return the id of the nth submission of a task instance: readable, unique, and fit for a URL.

    A DAG run is known by its date, where it has one, so that a second attempt at a date finds the first.
    """
    task = context["ti"]
    date = context.get("logical_date")
    run = task.run_id if date is None else date.isoformat()
    digest = hashlib.sha256(json.dumps([task.dag_id, run, task.task_id, task.map_index]).encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9]+", "-", f"{task.dag_id}-{task.task_id}")
    return f"{readable}-{digest[:12]}-{number}"


def next_submission(jobs: RayJobs, context: Any) -> tuple[str, bool]:
    """Return the submission of a task instance that has not ended, and whether the head has it already."""
    number = 1
    while True:
        submission_id = submission_of(context, number)
        job = jobs.find(submission_id)
        if job is None or job["status"] not in ENDED:
            return submission_id, job is not None
        number += 1
