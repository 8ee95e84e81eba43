"""The whole chain, nightly: embed, index, search, rerank, evaluate, with gates between them.

One YAML file on object storage (`config`) holds the settings of all five jobs, as any job takes them.
Every job is safe to run again, so a retry is a rerun: it does what is missing. The gates read what the jobs
measured and stop the chain before a bad delivery or a bad index reaches anyone.
"""

import datetime
import json
from typing import Any

import fsspec
from airflow.sdk import Param, dag, task
from airflow.sdk.exceptions import AirflowFailException
from ray_jobs import RayJobOperator

PARAMS = {
    "config": Param(
        "s3://bucket/nightly.yaml", type="string", description="settings of all jobs, as one YAML file"
    ),
    "output": Param("s3://bucket/embeddings", type="string", description="output.uri: the data set"),
    "runs": Param("s3://bucket/runs", type="string", description="folder of the runs and of metrics.json"),
    "code": Param("/opt/bge-ray", type="string", description="where the image of the cluster holds jobs/"),
    "max_rejected_fraction": Param(0.01, type="number", minimum=0, maximum=1),
    "min_recall": Param(0.95, type="number", minimum=0, maximum=1, description="recall@10 of the index"),
    "env_vars": Param({}, type="object", description="environment of the jobs, no secrets"),
}
RUNS = "{{ params.runs }}"


def read_json(uri: str) -> dict[str, Any]:
    """Read a JSON object; credentials come from the environment of the worker."""
    with fsspec.open(uri, "rb") as file:
        return dict(json.load(file))


def ray_job(name: str, **settings: str) -> RayJobOperator:
    """Return the task of one of our jobs; settings win over the config file."""
    command = ["python", f"{{{{ params.code }}}}/jobs/{name}.py", "--config", "{{ params.config }}"]
    for key, value in {"output.uri": "{{ params.output }}", **settings}.items():
        command += ["--set", f"{key}={value}"]
    return RayJobOperator(task_id=name, command=command, runtime_env={"env_vars": "{{ params.env_vars }}"})


@dag(
    schedule="15 1 * * *",
    start_date=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    catchup=False,
    max_active_runs=1,
    params=PARAMS,
    render_template_as_native_obj=True,
    default_args={
        "retries": 3,
        # Longer than the lease of a run whose head was lost, which would refuse the next one.
        "retry_delay": datetime.timedelta(minutes=5),
        "execution_timeout": datetime.timedelta(hours=12),
    },
    tags=["bge-ray"],
)
def bge_ray_chain() -> None:
    """Embed, index, search, rerank and evaluate a corpus."""

    @task(retries=0)
    def gate_rejected(report: str, most: float) -> float:
        """Stop the chain if the last run of the embed job rejected too many of its rows."""
        facts = read_json(report)
        share = facts["rows_rejected"] / max(1, facts["rows_in"])
        if share > float(most):
            raise AirflowFailException(
                f"{share:.2%} of the rows were rejected, {float(most):.2%} are allowed: "
                f"{facts['rejected_reasons']}"
            )
        return share

    @task(retries=0)
    def gate_recall(index: str, least: float) -> float:
        """Stop the chain if the index finds too few of the true neighbours."""
        facts = read_json(index)
        recall = (facts["recall"].get("@10") or facts["recall"]["@1"])["value"]
        if recall < float(least):
            raise AirflowFailException(f"recall@10 is {recall:.4f}, {float(least):.4f} is asked for: {index}")
        return recall

    embedded = ray_job("embed")
    rejected_ok = gate_rejected("{{ params.output }}/report.json", "{{ params.max_rejected_fraction }}")
    indexed = ray_job("index")
    recall_ok = gate_recall("{{ params.output }}/index/index.json", "{{ params.min_recall }}")
    searched = ray_job("search", **{"search.output": f"{RUNS}/search"})
    reranked = ray_job(
        "rerank",
        **{"rerank.candidates": f"{RUNS}/search/run.parquet", "rerank.output": f"{RUNS}/reranked"},
    )
    evaluated = ray_job(
        "evaluate",
        **{"evaluate.run": f"[{RUNS}/search, {RUNS}/reranked]", "evaluate.output": f"{RUNS}/metrics"},
    )
    embedded >> rejected_ok >> indexed >> recall_ok >> searched >> reranked >> evaluated


bge_ray_chain()
