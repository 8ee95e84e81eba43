"""A real Prometheus scrapes from a real Ray what the report says, and log lines say whose they are."""

import json
import logging
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from bge_ray.pipeline.engine.telemetry import COUNTERS, GAUGES, PREFIX, TAGS, Telemetry
from bge_ray.report.facts import RunFacts, read_receipt
from bge_ray.storage.objects import Storage
from tests.infra.head import RayHead, free_ports
from tests.support.corpora import docstrings, jsonl_bytes
from tests.support.runs import REPOSITORY, JobProcess, wait_until
from tests.support.s3 import S3Server

OBSERVABILITY = REPOSITORY / "infra" / "observability"
DISCOVERY_FILE = "/tmp/ray/prom_metrics_service_discovery.json"  # where Ray's head writes it by default
EXPORTED = {f"ray_{PREFIX}{name}_total" for name in COUNTERS} | {f"ray_{PREFIX}{name}" for name in GAUGES}
# What Grafana puts in the place of its variables.
VARIABLES = {"$bge_job": ".*", "$__rate_interval": "1m"}


def dashboard_queries() -> list[str]:
    dashboard = json.loads((OBSERVABILITY / "grafana-dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_every_query_of_the_dashboard_is_about_metrics_that_exist() -> None:
    dashboard = (OBSERVABILITY / "grafana-dashboard.json").read_text()
    named = set(re.findall(r"\bray_\w+", dashboard))
    assert named == EXPORTED  # and none is without a panel
    labels = set(re.findall(r"(\w+)=~", dashboard))
    assert labels == set(TAGS)
    assert "run_id" not in TAGS  # a series of its own for each run, for ever
    for query in dashboard_queries():
        assert set(re.findall(r"\$\w+", query)) <= set(VARIABLES)


def test_metrics_never_fail_a_run(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry("embed")
    telemetry.start(RunFacts("embed"))
    telemetry.finish_unit(read_receipt(1, {"rows_out": "not a number"}))
    telemetry.finish_unit(read_receipt(2, {"reasons": {"empty_text": 1}}))
    telemetry.fail_unit()
    assert [r.message for r in caplog.records if "no metrics of this run" in r.message] != []
    assert len(caplog.records) == 1


@pytest.mark.ray
def test_metrics_cost_next_to_nothing(ray_cluster: None) -> None:
    telemetry = Telemetry("embed")
    telemetry.start(RunFacts("embed", units_planned=1000))
    names = ("tokens", "padded_tokens", "truncated", "text_bytes", "bytes_out", "device_s", "waited_s")
    unit = read_receipt(2, dict.fromkeys(names, 1) | {"reasons": {"empty_text": 1}})
    started = time.perf_counter()
    for _ in range(1000):
        telemetry.finish_unit(unit)
    assert (time.perf_counter() - started) / 1000 < 0.005  # a unit costs some 0.045 s of scheduling


class Prometheus:
    """A Prometheus of the test's own with the product's configuration; only paths and times differ."""

    def __init__(self, folder: Path, discovery: Path) -> None:
        config = (OBSERVABILITY / "prometheus.yml").read_text()
        assert config.count(DISCOVERY_FILE) == config.count("15s") == 1
        path = folder / "prometheus.yml"
        path.write_text(config.replace(DISCOVERY_FILE, str(discovery)).replace("15s", "1s"))
        (port,) = free_ports(1)
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={path}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=(folder / "log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        wait_until(self._ready, 60)

    def _ready(self) -> bool:
        try:
            return requests.get(f"{self._url}/-/ready", timeout=5).ok
        except requests.ConnectionError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = requests.get(f"{self._url}/api/v1/query", params={"query": expression}, timeout=30).json()
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def sum(self, metric: str) -> float:
        return sum(float(series["value"][1]) for series in self.query(metric))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture(scope="module")
def head(s3_server: S3Server) -> Iterator[RayHead]:
    started = RayHead(variables={"RAY_metrics_report_interval_ms": "1000"})
    yield started
    started.kill()


@pytest.fixture
def prometheus(head: RayHead, tmp_path: Path) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus (Debian: apt-get install --no-install-recommends prometheus)")
    started = Prometheus(tmp_path, head.folder / "prom_metrics_service_discovery.json")
    yield started
    started.close()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prometheus_has_the_figures_of_the_report(
    head: RayHead, prometheus: Prometheus, bucket: str, tiny_model: Path
) -> None:
    bad = [{"id": f"bad-{i}", "text": " "} for i in range(3)] + [{"id": "same", "text": "a text"}] * 2
    storage = Storage(20)
    storage.write(f"{bucket}/corpus/a.jsonl", jsonl_bytes(docstrings(600) + bad))
    keys = [f"corpus.uri={bucket}/corpus", f"output.uri={bucket}/out", f"model.name={tiny_model}"]
    keys += ["batching.unit_rows=50", "resources.num_encoders=2", "corpus.max_rejected_fraction=0.5"]
    words = [word for key in keys for word in ("--set", key)]
    ended = head.submit("submit", "--working-dir", ".", "--", "python", "jobs/embed.py", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(storage.read(f"{bucket}/out/report.json"))
    assert (report["rows_out"], report["rows_rejected"]) == (601, 4)

    # The driver is gone; what it counted last must have reached Prometheus all the same.
    label = '{bge_job="embed"}'
    wait_until(lambda: prometheus.sum(f"ray_bge_units_total{label}") == report["units_done"], 30)
    seen = {name: prometheus.sum(f"ray_{PREFIX}{name}_total{label}") for name in COUNTERS}
    assert seen["rows"] == report["rows_out"]
    assert seen["tokens"] == report["tokens"]
    assert seen["truncated_rows"] == report["truncated"]
    assert (seen["bytes_in"], seen["bytes_out"]) == (report["bytes_in"], report["bytes_out"])
    assert seen["failed_units"] == 0
    by_reason = prometheus.query(f"ray_bge_rejected_rows_total{label}")
    assert {s["metric"]["reason"]: float(s["value"][1]) for s in by_reason} == report["rejected_reasons"]
    assert 1 - seen["tokens"] / seen["padded_tokens"] == pytest.approx(report["padding_waste"])
    encoder_s = report["steady_s"] * report["workers"]["encoders"]
    assert seen["device_busy_seconds"] == pytest.approx(report["utilisation"] * encoder_s)
    assert seen["queue_wait_seconds"] == pytest.approx(report["waiting"] * encoder_s)
    (began,) = prometheus.query(f"max_over_time(ray_bge_run_started_seconds{label}[10m])")
    assert float(began["value"][1]) == pytest.approx(report["started"], abs=1e-3)
    left = prometheus.query(f"min_over_time(ray_bge_units_left{label}[10m])")
    assert [float(series["value"][1]) for series in left] == [0.0]

    # A run is no label: one a night would be a new series for ever.
    series = prometheus.query('{__name__=~"ray_bge_.*"}')
    assert series
    assert not any("run_id" in found["metric"] for found in series)

    for query in dashboard_queries():
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        prometheus.query(query)  # fails where Prometheus cannot parse it


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_log_lines_say_whose_they_are(
    bucket: str, s3_server: S3Server, tiny_model: Path, tmp_path: Path
) -> None:
    storage = Storage(20)
    storage.write(f"{bucket}/corpus/a.jsonl", jsonl_bytes(docstrings(40)))
    keys = {"corpus.uri": f"{bucket}/corpus", "output.uri": f"{bucket}/out", "model.name": tiny_model}
    keys |= {"resources.num_encoders": 1, "batching.unit_rows": 20}
    run = JobProcess(tmp_path / "log", keys, "--log-format", "json")
    assert run.wait() == 0, run.log()
    report = json.loads(storage.read(f"{bucket}/out/report.json"))
    lines = [json.loads(line) for line in run.log().splitlines() if line.startswith("{")]
    assert len(lines) >= 3
    for line in lines:
        assert line.keys() >= {"time", "level", "logger", "message", "run_id"}
        assert line["run_id"] == report["run_id"]
        assert line["logger"].startswith("bge_ray")
    # Beside them stand the answer of the command, and the one line of Ray's own that the README explains.
    others = [line for line in run.log().splitlines() if not line.startswith("{")]
    assert [
        line for line in others if "core_worker.cc" not in line and not line.startswith("complete:")
    ] == []

    # A shard is lost: the line about its unit names it, in the text format, too.
    (lost, *_) = storage.list_files(f"{bucket}/out/embeddings")
    storage.delete([lost.uri])
    again = JobProcess(tmp_path / "log2", keys, "--log-format", "json")
    assert again.wait() == 0, again.log()
    found = [json.loads(line) for line in again.log().splitlines() if '"unit"' in line]
    assert [line["unit"] for line in found] == [Path(lost.uri).stem]
    assert found[0]["level"] == "WARNING"
    assert found[0]["run_id"] != report["run_id"]

    text = JobProcess(tmp_path / "log3", keys)
    assert text.wait() == 0, text.log()
    assert len(re.findall(r"embed: run \d{8}T\d{6}Z-[0-9a-f]{6}", text.log())) == 1


def test_a_record_without_a_unit_has_none() -> None:
    from bge_ray.logs import JsonFormatter

    record = logging.LogRecord("bge_ray.x", logging.INFO, "", 0, "done %d", (3,), None)
    assert json.loads(JsonFormatter().format(record)).keys() == {
        "time",
        "level",
        "logger",
        "message",
        "run_id",
    }
