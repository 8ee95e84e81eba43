"""A training on real weights that loses a worker and its driver, and learns all the same."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from bge_ray.bench.models import packaged_minilm
from bge_ray.formats import docstrings
from bge_ray.model.modules import write_modules
from bge_ray.records.reports import TrainReport, read_report
from bge_ray.storage.objects import Storage
from tests.support.runs import JobProcess, wait_until
from tests.support.training import write_lines

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HELD_OUT, TRAINED = 200, 1000


def two_layers_of_minilm(folder: Path) -> Path:
    """Real weights that have much to learn: nobody trained the second layer to be the last."""
    source = packaged_minilm()
    AutoModel.from_pretrained(source, num_hidden_layers=2, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    write_modules(folder, "mean", 384)
    return folder


def known_items() -> list[dict[str, object]]:
    """Return docstrings of the standard library: their first sentence finds the rest."""
    found: dict[str, str] = {}
    for first, rest in itertools.islice(docstrings.known_items(), 4000):
        if (
            20 <= len(first) <= 120
            and len(rest) >= 60
            and first not in found
            and rest[:300] not in found.values()
        ):
            found[first] = rest[:300]
    rows: list[dict[str, object]] = [{"query": query, "pos": [rest]} for query, rest in found.items()]
    random.Random(0).shuffle(rows)
    assert len(rows) >= HELD_OUT + TRAINED
    return rows[: HELD_OUT + TRAINED]


@pytest.mark.timeout(2700)
def test_known_items_are_found_better_although_a_worker_and_the_driver_are_killed(tmp_path: Path) -> None:
    rows = known_items()
    out = tmp_path / "out"
    settings: dict[str, object] = {
        "model.name": two_layers_of_minilm(tmp_path / "model"),
        "train.data": write_lines(tmp_path / "data.jsonl", rows[HELD_OUT:]),
        "train.held_out": write_lines(tmp_path / "held_out.jsonl", rows[:HELD_OUT]),
        "train.output": out,
        "train.workers": 2,
        "train.group": 1,
        "train.batch_queries": 32,
        "train.steps": 60,
        "train.learning_rate": 3e-4,
        "train.temperature": 0.05,
        "train.query_max_length": 40,
        "train.checkpoint_steps": 10,
        "report.log_interval_s": 2,
    }
    storage = Storage(20)

    def checkpoints() -> list[str]:
        names = (info.uri.rpartition("/")[2] for info in storage.list_files(f"{out}/work"))
        return sorted(name for name in names if name.startswith("checkpoint-") and name.endswith(".json"))

    run = JobProcess(tmp_path / "log", settings, job="train")
    wait_until(lambda: len(checkpoints()) >= 1, 600)
    run.kill()
    left = checkpoints()[-1]
    assert not (out / "config.json").exists()

    run = JobProcess(tmp_path / "log", settings, job="train")
    wait_until(lambda: checkpoints() and checkpoints()[-1] > left, 600)
    run.actors("RayTrainWorker")[-1].kill()
    assert run.wait(900) == 0, run.log()[-3000:]

    report = read_report(TrainReport, (out / "report.json").read_bytes())
    assert report is not None
    assert report.restarts >= 1
    assert report.resumed_from >= 10
    assert report.figures is not None
    assert report.figures.difference is not None
    assert report.figures.difference.mean >= 0.1, report.figures
    assert report.figures.difference.low > 0
    assert [point.step for point in report.curve] == list(range(1, 61))

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = JobProcess(tmp_path / "again", settings, job="train")
    assert again.wait(300) == 0
    assert "nothing to do" in again.log()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    refused = JobProcess(tmp_path / "other", settings | {"train.steps": 61}, job="train")
    assert refused.wait(300) == 2
    assert "train.steps was 60, now 61" in refused.log()
    assert json.loads((out / "training.json").read_text())["settings"]["steps"] == 60
