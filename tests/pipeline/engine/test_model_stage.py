"""The model stage: outputs in their rows' places, rows with a reason passed by, other models refused."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ray.actor import ActorHandle

from bge_ray.errors import DatasetMismatchError
from bge_ray.model.canary import make_canaries
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
from bge_ray.pipeline.engine.isolation import Attempt, running_ledger
from bge_ray.pipeline.engine.model_stage import ModelJob, ModelStage
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.rows import with_faults, with_tokens
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.model import EMBEDDING, ModelSpec
from bge_ray.records.plan import Unit
from bge_ray.settings.sections import ModelSettings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

TEXTS = ["one", "two words", "and three words", "a longer one " * 20]
UNIT = Unit(0, 0, 6)
BAD = {1: ("empty_text", "nothing"), 4: ("null_text", "null")}


@pytest.fixture(scope="module")
def spec(tiny_model: Path) -> ModelSpec:
    return resolve_encoder(ModelSettings(name=str(tiny_model)), on_gpu=False)


@pytest.fixture(scope="module")
def ledger(ray_cluster: None) -> Iterator[ActorHandle]:
    with running_ledger() as ledger:
        yield ledger


def make_job(spec: ModelSpec, ledger: ActorHandle, **changes: object) -> ModelJob:
    job = ModelJob("encode", spec, "cpu", 1, 64, False, ledger, max_attempts=3)
    return dataclasses.replace(job, **changes)


def make_parcel(spec: ModelSpec) -> Parcel:
    """Return six rows, two of them with a reason and without token ids."""
    rows = np.array([row for row in range(6) if row not in BAD], np.int64)
    table = with_tokens(pa.table({"n": range(6)}), rows, text_feeder(spec).passages(TEXTS))
    return Parcel.of("a unit", UNIT).filled(with_faults(table, BAD), read_s=1.0)


def test_rows_in_are_rows_out_each_with_its_own_vector(spec: ModelSpec, ledger: ActorHandle) -> None:
    stage = ModelStage(make_job(spec, ledger))
    done = Parcel.from_batch(stage(make_parcel(spec).to_batch()))
    table = done.table
    assert table["n"].to_pylist() == list(range(6))
    assert table.column_names == ["n", "reason", "detail", EMBEDDING], "token ids go no further"
    assert [(row, reason) for row, reason in enumerate(table["reason"].to_pylist()) if reason] == [
        (row, fault[0]) for row, fault in BAD.items()
    ]
    found = table[EMBEDDING].to_pylist()
    assert [row for row, vector in enumerate(found) if vector is None] == list(BAD)
    alone = ModelStage(make_job(spec, ledger))
    rows = [row for row in range(6) if row not in BAD]
    for row, text in zip(rows, TEXTS, strict=True):
        tokens = text_feeder(spec).passages([text])
        single = with_faults(with_tokens(pa.table({"n": [row]}), np.zeros(1, np.int64), tokens), {})
        batch = alone(Parcel.of("one", UNIT).filled(single).to_batch())
        assert np.allclose(Parcel.from_batch(batch).table[EMBEDDING][0].as_py(), found[row], atol=1e-6)
    assert done.facts["read_s"] == 1.0, "what earlier stages noted travels on"
    assert done.facts["encode_ended"] >= done.facts["encode_started"]
    assert done.facts["padded_tokens"] >= text_feeder(spec).passages(TEXTS).lengths.sum()


def test_a_unit_without_a_good_row_passes(spec: ModelSpec, ledger: ActorHandle) -> None:
    table = with_tokens(pa.table({"n": [0, 1]}), np.empty(0, np.int64), text_feeder(spec).passages([]))
    bad = with_faults(table, dict.fromkeys((0, 1), ("empty_text", "")))
    done = Parcel.from_batch(
        ModelStage(make_job(spec, ledger))(Parcel.of("bad", UNIT).filled(bad).to_batch())
    )
    assert done.error is None
    assert done.table[EMBEDDING].to_pylist() == [None, None]


def test_what_was_given_up_passes_untouched(spec: ModelSpec, ledger: ActorHandle) -> None:
    batch = make_parcel(spec).failed("cannot be read").to_batch()
    assert ModelStage(make_job(spec, ledger))(batch) is batch


def test_a_unit_that_takes_its_process_down_again_and_again_is_given_up(
    spec: ModelSpec, ledger: ActorHandle
) -> None:
    stage = ModelStage(make_job(spec, ledger))
    for _ in range(3):  # attempts that never ended
        Attempt(ledger, "encode a unit").__enter__()
    done = Parcel.from_batch(stage(make_parcel(spec).to_batch()))
    assert (done.table, done.error) == (None, "its model's process died 3 times")
    again = Parcel.from_batch(stage(make_parcel(spec).to_batch()))
    assert again.error is None, "an attempt that came to its end is forgotten"


def test_a_model_that_makes_other_vectors_does_not_start(spec: ModelSpec, ledger: ActorHandle) -> None:
    model = Model(spec, model_folder(spec), Place())
    canaries = make_canaries(model, text_feeder(spec))
    dataset = DatasetSpec(spec, Columns("id", "text", None), canaries)
    ModelStage(make_job(spec, ledger, dataset=dataset))
    shorter = dataclasses.replace(spec, max_length=8)
    ModelStage(make_job(shorter, ledger, dataset=dataset))  # queries may be cut shorter than passages were
    first = canaries[0]
    turned = dataclasses.replace(first, vector=(first.vector[0] + 0.1, *first.vector[1:]))
    with pytest.raises(DatasetMismatchError, match=r"cosine 0\.\d+ .* at least 0\.99999"):
        other = dataclasses.replace(dataset, canaries=(turned, *canaries[1:]))
        ModelStage(make_job(spec, ledger, dataset=other))
