"""What a training refuses before anything is written, and what a step is made of; no Ray."""

import json
from pathlib import Path
from typing import Any

import pytest

from bge_ray.errors import (
    BgeRayError,
    CorpusError,
    DatasetMismatchError,
    ModelError,
    OutputCollisionError,
    SettingsError,
)
from bge_ray.formats.training import read_examples
from bge_ray.model.train.examples import Schedule, draw
from bge_ray.pipeline.train.job import TrainWork, plan_train
from bge_ray.pipeline.train.run import to_table
from bge_ray.records.canonical import to_json
from bge_ray.storage.objects import Storage
from tests.support.models import make_decoder, make_encoder
from tests.support.training import as_settings, example, training_keys, write_lines


def refused(keys: dict[str, object]) -> BgeRayError:
    """Return why a training is not begun; nothing may lie in its output afterwards."""
    with pytest.raises(BgeRayError) as found:
        plan_train(as_settings(keys))
    output = Path(str(keys["train.output"]))
    assert not output.exists() or not any(output.iterdir())
    assert found.value.exit_code == 2
    return found.value


@pytest.fixture
def keys(tmp_path: Path, tiny_model: Path) -> dict[str, object]:
    return training_keys(tmp_path, tiny_model, tmp_path / "out")


def test_a_plan_writes_nothing(keys: dict[str, object]) -> None:
    assert "4 steps of 8 queries with 3 passages each, out of 48 examples" in plan_train(as_settings(keys))
    assert not Path(str(keys["train.output"])).exists()


def broken(record: dict[str, object], **changes: object) -> dict[str, object]:
    return {name: value for name, value in (record | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({"query": " "}, {}, "empty_query"),
        ({"pos": []}, {}, "no_positive"),
        ({"neg": [1]}, {}, "expected neg to be a list of texts"),
        ({"neg": None, "neg_scores": None}, {}, "neg is missing or empty, and train.group 3 takes negatives"),
        ({"pos_scores": None}, {"train.distill": "kl"}, "pos_scores is missing, which train.distill kl"),
        ({"neg_scores": [1.0]}, {}, "expected neg_scores to have one finite number for each text of neg"),
        ({"neg_scores": [1.0, float("nan"), 0.0]}, {}, "expected neg_scores"),
        ({"pos_scores": [True]}, {}, "expected pos_scores"),
        ({"query_id": "q1"}, {}, "duplicate_query q1"),
    ],
)
def test_lines_that_cannot_be_used_are_named(
    tmp_path: Path, keys: dict[str, Any], changes: dict[str, object], settings: dict[str, object], said: str
) -> None:
    records = [example(number, scores=True) for number in range(48)]
    records[6] = broken(records[6], **changes)
    write_lines(Path(keys["train.data"]), records)
    error = refused(keys | settings)
    assert isinstance(error, CorpusError)
    assert said in str(error)
    assert "1 lines" in str(error)
    if "duplicate" not in said:
        assert "data.jsonl: line 7" in str(error)


def test_groups_need_no_negatives_where_the_loss_takes_none(tmp_path: Path, keys: dict[str, Any]) -> None:
    write_lines(Path(keys["train.data"]), [example(number, negatives=0) for number in range(48)])
    assert "neg is missing" in str(refused(keys))
    assert "1 passages each" in plan_train(as_settings(keys | {"train.group": 1}))


def test_data_below_a_step_is_refused(keys: dict[str, object]) -> None:
    assert "48 queries" in str(refused(keys | {"train.batch_queries": 64}))


def test_held_out_queries_are_not_trained_on(tmp_path: Path, keys: dict[str, Any]) -> None:
    held_out = [example(number) for number in (3, 5, 200)]
    held_out[1]["query"] = f" {held_out[1]['query'].upper()}  "  # the same question
    write_lines(Path(keys["train.held_out"]), held_out)
    work = TrainWork(as_settings(keys))
    assert work.data.n_left_out == 2
    assert {row.query_id for row in work.data.left_out} == {"q3", "q5"}
    assert len(work.data.examples) == 46


def test_models_that_are_not_trained_here(tmp_path: Path, tiny_model: Path, keys: dict[str, object]) -> None:
    decoder = make_decoder(tmp_path / "decoder", "qwen2")
    reranker = keys | {"train.kind": "reranker", "rerank.model": str(decoder)}
    assert isinstance(error := refused(reranker), ModelError)
    assert "is a decoder" in str(error)
    assert "train.dims 64" in str(refused(keys | {"train.dims": [8, 64]}))
    assert "sparse_linear" in str(refused(keys | {"train.unified": True}))
    assert "train.query_max_length 1000" in str(refused(keys | {"train.query_max_length": 1000}))
    assert "no such folder" in str(refused(keys | {"model.name": "/nowhere"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": 3}, "multiple of workers"),
        ({"kind": "reranker", "dims": [8]}, "dims: is of embedders"),
        ({"group": 1, "distill": "kl"}, "group: must be at least 2"),
        ({"group": 1, "negatives": "own"}, "group: must be at least 2"),
        ({"distill": "m3_kd", "negatives": "own"}, "distill m3_kd"),
        ({"unified": True, "dims": [8]}, "unified"),
        ({"self_distill_after": 3}, "needs unified"),
    ],
)
def test_settings_that_do_not_go_together(
    keys: dict[str, object], changes: dict[str, object], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        as_settings(keys | {f"train.{name}": value for name, value in changes.items()})


def test_an_output_that_is_not_ours(tmp_path: Path, keys: dict[str, object]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"somebody's")
    with pytest.raises(OutputCollisionError, match=r"model.safetensors: is in the way"):
        plan_train(as_settings(keys))
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    with pytest.raises(OutputCollisionError, match="both are"):
        plan_train(as_settings(keys | {"train.output": keys["model.name"]}))


def test_another_training_is_refused_by_name(tmp_path: Path, keys: dict[str, Any]) -> None:
    work = TrainWork(as_settings(keys))
    folder = work.folders[0]
    folder.claim()
    folder.put("training.json", to_json(work._identity))
    plan_train(as_settings(keys))
    # These decide nothing of the model.
    plan_train(as_settings(keys | {"train.checkpoint_steps": 1, "train.max_failures": 9}))
    other = make_encoder(tmp_path / "other", seed=5)
    records = [example(number, scores=True) for number in range(47)]
    for change, said in (
        ({"train.learning_rate": 2e-3}, "train.learning_rate was 0.001, now 0.002"),
        ({"train.steps": 5}, "train.steps was 4, now 5"),
        ({"model.name": str(other)}, "model: weights_sha256 was"),
        ({"model.query_instruction": "find: "}, 'model: query_instruction was "", now "find: "'),
        ({"train.data": str(write_lines(tmp_path / "less.jsonl", records))}, "data: train.data was"),
        ({"train.held_out": None}, "data: train.held_out was"),
    ):
        with pytest.raises(DatasetMismatchError) as found:
            plan_train(as_settings(keys | change))
        assert said in str(found.value), str(found.value)
        assert "choose" in str(found.value) or "give it another train.output" in str(found.value)


def test_a_schedule_has_every_example_once_an_epoch() -> None:
    schedule = Schedule(examples=50, batch_queries=8, steps=20, seed=3)
    assert schedule.steps_an_epoch == 6
    seen: dict[int, list[int]] = {}
    for position in range(schedule.positions):
        epoch, place = schedule.epoch_of(position)
        seen.setdefault(epoch, []).append(int(schedule.order(epoch)[place]))
    assert [len(rows) for rows in seen.values()] == [48, 48, 48, 16]
    assert all(len(set(rows)) == len(rows) for rows in seen.values())
    assert seen[0] != seen[1]


def test_draws_follow_from_seed_epoch_and_example(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [example(n, negatives=4, scores=True) for n in range(5)])
    examples = list(read_examples(Storage(), str(path), lambda *_: None))
    table = to_table(examples)
    group = draw(table, 2, 0, 4, seed=1)
    assert group == draw(table, 2, 0, 4, seed=1)
    assert any(draw(table, 2, epoch, 4, seed=1) != group for epoch in range(1, 5))
    assert group.passages[0] in examples[2].texts
    assert len(set(group.passages[1:])) == 3
    scores = dict(zip(examples[2].negatives, examples[2].negative_scores or (), strict=True))
    assert group.scores is not None
    assert group.scores[1:] == pytest.approx([scores[text] for text in group.passages[1:]])
    # Too few are taken over again, each as often as the others but for one.
    many = draw(table, 2, 0, 10, seed=1).passages[1:]
    counts = [many.count(text) for text in examples[2].negatives]
    assert sum(counts) == 9
    assert max(counts) - min(counts) <= 1
    assert json.loads(path.read_text().splitlines()[2])["query"] == group.query
