"""The mteb job on a real Ray: truth is mteb in this process, on sentence-transformers' models."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mteb as package
import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer

from bge_ray.bench.models import packaged_minilm
from bge_ray.errors import OutputCollisionError
from bge_ray.pipeline.mteb import job as module
from bge_ray.pipeline.mteb.job import mteb, plan_mteb
from bge_ray.pipeline.mteb.tasks import choose_tasks
from bge_ray.records.reports import MtebReport
from bge_ray.settings.sections import MtebSettings
from bge_ray.storage.objects import Storage
from tests.pipeline.mteb.sets import graded, known_items, untitled
from tests.support.models import make_cross_encoder
from tests.support.searches import settings_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

# Those of mteb's own small tasks that are not searched; all of them take one pool of actors.
QUIET = (
    "MockMultilingualBitextMiningTask",
    "MockMultilingualParallelBitextMiningTask",
    "MockClassificationTask",
    "MockRegressionTask",
    "MockMultilingualClusteringTask",
    "MockClusteringTask",
    "LegacyMockClusteringFastTask",
    "MockMultilingualPairClassificationTask",
    "MockMultilingualSTSTask",
    "MockMultilabelClassification",
    "MockSummarizationTask",
    "MockTextZeroShotClassification",
)
SEARCHED = ("MockRerankingTask", "MockInstructionReranking", "MockRetrievalDialogTask")


def figures(scores: Any, at: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of mteb's scores with its place."""
    if isinstance(scores, dict):
        for key, value in scores.items():
            yield from figures(value, f"{at}/{key}")
    elif isinstance(scores, list):
        for number, value in enumerate(scores):
            yield from figures(value, f"{at}/{number}")
    elif isinstance(scores, int | float) and not isinstance(scores, bool):
        yield at, float(scores)


def in_process(model: Any, task: Any) -> dict[str, float]:
    done = package.evaluate(model, task, cache=None, show_progress_bar=False, co2_tracker=False)
    return dict(figures(json.loads(json.dumps(done.task_results[0].scores))))


def written(output: Path, name: str, revision: str, task: str) -> dict[str, float]:
    path = output / "results" / name.replace("/", "__") / revision / f"{task}.json"
    return dict(figures(json.loads(path.read_text())["scores"]))


def assert_same(ours: dict[str, float], truth: dict[str, float]) -> None:
    assert ours.keys() == truth.keys()
    for place, value in truth.items():
        same = math.isclose(ours[place], value, rel_tol=0, abs_tol=1e-6)
        assert same or (math.isnan(value) and math.isnan(ours[place])), (place, value, ours[place])


def run(output: Path, **keys: Any) -> MtebReport:
    return mteb(settings_for(mteb__output=str(output), **keys))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("beir")
    return [str(make(root / make.__name__)) for make in (known_items, graded, untitled)]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The packaged model under its own name: then no card says anything of it, and its folder all."""
    folder = tmp_path_factory.mktemp("weights") / "all-minilm"
    folder.symlink_to(packaged_minilm())
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_set_through_the_jobs_equals_mteb_in_process(
    number: int, folders: list[str], minilm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"mteb__beir": folders[number], "mteb__models": [minilm]}
    assert "1 results of 1 models" in plan_mteb(settings_for(mteb__output=str(tmp_path), **keys))
    assert not list(tmp_path.iterdir())
    report = run(tmp_path, **keys)
    who = report.contestants[0]
    task = choose_tasks(MtebSettings(beir=(folders[number],)), Storage()).tasks[0]
    name, split = task.metadata.name, task.eval_splits[0]
    truth = in_process(SentenceTransformer(minilm), task)
    assert len(truth) > 100
    assert_same(written(tmp_path, who.name, who.revision, name), truth)
    main = truth[f"/{split}/0/main_score"]
    assert [score.score for score in report.results] == [main]
    assert 0.1 < main < 1
    assert report.complete
    assert not (tmp_path / "work").exists()
    # The files are those of mteb: it reads them, and says who made them.
    found = package.ResultCache(tmp_path).load_results(models=[who.name], tasks=[name])
    assert [result.model_name for result in found.model_results] == [who.name]

    with caplog.at_level(logging.INFO):
        again = run(tmp_path, **keys)
    assert again.outcome == "nothing to do"
    assert "rows to embed" not in caplog.text


@pytest.mark.slow
def test_an_index_stands_beside_the_exact_search(folders: list[str], minilm: str, tmp_path: Path) -> None:
    keys = {"mteb__beir": folders[0], "mteb__models": [minilm], "index__factory": "Flat"}
    report = run(tmp_path, mteb__searches=["exact", "index"], **keys)
    exact, index = report.contestants
    assert (exact.name, index.name) == ("local/all-minilm", "local/all-minilm+index")
    assert (exact.search, index.search) == ("exact", "index")
    # A flat index finds what an exact search finds.
    one, two = (written(tmp_path, who.name, who.revision, "known_items") for who in (exact, index))
    assert_same(two, one)


@pytest.mark.slow
def test_tasks_that_are_not_searched_equal_mteb_in_process(tiny_model: Path, tmp_path: Path) -> None:
    report = run(tmp_path, mteb__tasks=list(QUIET), mteb__models=[str(tiny_model)])
    revision = report.contestants[0].revision
    model = SentenceTransformer(str(tiny_model))
    for name in QUIET:
        truth = in_process(model, choose_tasks(MtebSettings(tasks=(name,)), Storage()).tasks[0])
        assert_same(written(tmp_path, report.contestants[0].name, revision, name), truth)


class OfCandidates:
    """A cross-encoder of sentence-transformers as mteb wants one."""

    def __init__(self, model: CrossEncoder, meta: Any) -> None:
        self.model, self.mteb_model_meta = model, meta

    def predict(self, inputs1: Any, inputs2: Any, **_: Any) -> np.ndarray:
        one = [text for batch in inputs1 for text in batch["text"]]
        two = [text for batch in inputs2 for text in batch["text"]]
        return self.model.predict(list(zip(one, two, strict=True)), activation_fn=lambda logits: logits)


@pytest.mark.slow
def test_candidates_that_are_given_are_scored_and_no_others(tiny_model: Path, tmp_path: Path) -> None:
    cross = make_cross_encoder(tmp_path / "cross")
    output = tmp_path / "out"
    report = run(
        output, mteb__tasks=list(SEARCHED), mteb__models=[str(tiny_model)], mteb__rerankers=[str(cross)]
    )
    encoder, reranker, both = report.contestants
    assert (reranker.model, reranker.reranker) == (None, str(cross))
    bi = SentenceTransformer(str(tiny_model))
    meta = package.models.ModelMeta.create_empty()
    scorer = OfCandidates(CrossEncoder(str(cross), max_length=512), meta)
    for name in SEARCHED:
        task = choose_tasks(MtebSettings(tasks=(name,)), Storage()).tasks[0]
        assert_same(written(output, encoder.name, encoder.revision, name), in_process(bi, task))
        if task.metadata.type != "Retrieval":
            assert_same(written(output, reranker.name, reranker.revision, name), in_process(scorer, task))
    # A retrieval task has no candidates but those of the encoder, which both do together.
    assert [score.task for score in report.results if score.model.startswith(both.name)] == list(SEARCHED[2:])
    assert len(report.results) == 2 * len(SEARCHED)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_with_the_next_task(
    folders: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"mteb__beir": folders[:2], "mteb__tasks": ["MockSTSTask"], "mteb__models": [str(tiny_model)]}
    real = module.package.evaluate
    done: list[str] = []

    def evaluate(model: Any, task: Any, **more: Any) -> Any:
        if task.metadata.name == "graded" and len(done) == 2:
            done.append("cut")
            raise KeyboardInterrupt
        done.append(task.metadata.name)
        return real(model, task, **more)

    monkeypatch.setattr(module.package, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **keys)
    assert done == ["MockSTSTask", "known_items", "cut"]
    assert not (tmp_path / "report.json").exists()
    report = run(tmp_path, **keys)
    assert done[3:] == ["graded"]
    assert [score.task for score in report.results] == ["MockSTSTask", "known_items", "graded"]

    # Other settings are another revision, beside the first; a foreign file in the way is refused.
    changed = run(tmp_path, **keys | {"mteb__beir": folders[:1]}, model__max_length=16)
    assert changed.contestants[0].revision != report.contestants[0].revision
    assert done[4:] == ["MockSTSTask", "known_items"]
    path = tmp_path / "results" / "local__tiny-cls" / report.contestants[0].revision / "graded.json"
    path.write_text("{}")
    with pytest.raises(OutputCollisionError, match=r"graded\.json: is in the way"):
        run(tmp_path, **keys)
    path.unlink()
    run(tmp_path, **keys)
    assert done[6:] == ["graded"]
