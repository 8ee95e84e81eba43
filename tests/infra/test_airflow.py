"""The Airflow DAG, run by a real Airflow against a real Ray head."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import requests

from bge_ray.storage.objects import Storage, join
from tests.infra.head import RayHead
from tests.support.corpora import docstrings, mixed_objects
from tests.support.models import make_cross_encoder
from tests.support.runs import REPOSITORY, wait_until

AIRFLOW = REPOSITORY / ".venv-airflow" / "bin"

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(not AIRFLOW.exists(), reason="no .venv-airflow: run `make test-airflow`"),
]

STORAGE = Storage(30)
DATE = "2026-01-02T01:15:00+00:00"


class Airflow:
    """An Airflow home of its own: SQLite, no examples, our DAG folder, the connection in the environment."""

    def __init__(self, home: Path, head: RayHead) -> None:
        connection = {"conn_type": "http", "host": head.address, "password": os.environ["RAY_AUTH_TOKEN"]}
        own = {
            "AIRFLOW_HOME": home,
            "AIRFLOW__CORE__DAGS_FOLDER": REPOSITORY / "infra/airflow",
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW_CONN_RAY_JOBS": json.dumps(connection),
            "PATH": f"{AIRFLOW}:{os.environ['PATH']}",
        }
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.environment = kept | {key: str(value) for key, value in own.items()}
        self._log = home / "dags-test.log"
        subprocess.run([AIRFLOW / "airflow", "db", "migrate"], env=self.environment, check=True, timeout=280)

    def start(self, conf: dict[str, object]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [AIRFLOW / "airflow", "dags", "test", "bge_ray_chain", DATE, "--conf", json.dumps(conf)],
            env=self.environment,
            stdout=self._log.open("ab"),
            stderr=subprocess.STDOUT,
        )

    def log(self) -> str:
        return self._log.read_text()


def submissions(head: RayHead) -> list[str]:
    answer = requests.get(f"{head.address}/api/jobs/", headers=head.headers, timeout=30)
    return [job["submission_id"] for job in answer.json()]


@pytest.fixture(scope="module")
def airflow(head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Airflow:
    return Airflow(tmp_path_factory.mktemp("airflow"), head)


def upload_chain(root: str, model: Path, reranker: Path) -> dict[str, object]:
    """Store a corpus with one bad row, queries, judgements and the config; return the DAG's parameters."""
    records = docstrings(400)
    records = [*records[:-1], records[-1] | {"text": "", "title": ""}]
    for name, data in mixed_objects(records).items():
        STORAGE.write(join(root, "corpus", name), data)
    queries = [{"_id": str(n), "text": records[n]["text"][:200]} for n in range(20)]
    STORAGE.write(f"{root}/queries.jsonl", "".join(json.dumps(q) + "\n" for q in queries).encode())
    judged = "".join(f"{n}\t{records[n]['id']}\t1\n" for n in range(20))
    STORAGE.write(f"{root}/qrels.tsv", ("query-id\tcorpus-id\tscore\n" + judged).encode())
    sections = {
        "corpus": {"uri": f"{root}/corpus"},
        "model": {"name": str(model)},
        "resources": {"num_encoders": 2},
        "index": {"factory": "IVF4,Flat", "num_queries": 50},
        "search": {"queries": f"{root}/queries.jsonl", "k": 10},
        "rerank": {"model": str(reranker), "depth": 5},
        "evaluate": {"qrels": f"{root}/qrels.tsv"},
    }
    STORAGE.write(f"{root}/nightly.yaml", json.dumps(sections).encode())
    return {
        "config": f"{root}/nightly.yaml",
        "output": f"{root}/out",
        "runs": f"{root}/runs",
        "code": str(REPOSITORY),
        "env_vars": {"PYTHONPATH": str(REPOSITORY)},
    }


@pytest.mark.timeout(1500)
def test_the_chain_runs_survives_a_lost_scheduler_and_its_gate_holds(
    airflow: Airflow, head: RayHead, bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    conf = upload_chain(bucket, tiny_model, make_cross_encoder(tmp_path / "reranker"))

    lost = airflow.start(conf)
    wait_until(lambda: len(submissions(head)) == 1)
    lost.send_signal(signal.SIGKILL)
    lost.wait()
    again = airflow.start(conf)
    assert again.wait(1000) == 0, airflow.log()

    jobs = ["embed", "index", "search", "rerank", "evaluate"]
    names = sorted(name.split("-")[3] for name in submissions(head))
    assert "is still running: following it" in airflow.log()
    assert names == sorted(jobs)  # five jobs, although the chain was started twice
    for name in jobs:
        assert f"INFO {name}: done; exit code 0" in airflow.log()  # the last lines of their logs
    metrics = json.loads(STORAGE.read(f"{bucket}/runs/metrics/metrics.json"))
    assert len(metrics["runs"]) == 2

    strict = airflow.start(conf | {"max_rejected_fraction": 0})
    assert strict.wait(600) != 0
    assert "0.25% of the rows were rejected, 0.00% are allowed: {'empty_text': 1}" in airflow.log()
    assert len(submissions(head)) == 6  # embed, with nothing to do, and then no further


def test_a_killed_task_stops_its_job_and_a_refused_token_says_what_to_do(
    airflow: Airflow, head: RayHead
) -> None:
    script = """
import threading, types, os, ray_jobs
ray_jobs.POLL_S = 0.5
context = {"ti": types.SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=-1)}
operator = ray_jobs.RayJobOperator(task_id="t", command=["sleep", "600"])
failed = []
def run():
    try:
        operator.execute(context)
    except ray_jobs.AirflowException as error:
        failed.append(str(error))
thread = threading.Thread(target=run)
thread.start()
jobs = operator._jobs()
while (jobs.find(ray_jobs.submission_of(context, 1)) or {}).get("status") != "RUNNING":
    thread.join(0.5)
operator.on_kill()
thread.join()
print("KILLED", failed)
try:
    ray_jobs.RayJobs(os.environ["HEAD"], "not-the-token").find("x")
except ray_jobs.AirflowFailException as error:
    print("REFUSED", error)
"""
    run = subprocess.run(
        [AIRFLOW / "python", "-c", script],
        cwd=REPOSITORY / "infra/airflow",
        env=airflow.environment | {"HEAD": head.address},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert "STOPPED" in run.stdout.partition("KILLED")[2], run.stdout + run.stderr
    assert "put its RAY_AUTH_TOKEN into the password" in run.stdout
