"""Two units inside one actor: real kills, by a row and from outside, blame the right one or nobody."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
from bge_ray.pipeline.engine.flow import by_actors, follow, parcels, receipts
from bge_ray.pipeline.engine.isolation import running_ledger
from bge_ray.pipeline.engine.model_stage import ModelJob
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.pools import Pool
from bge_ray.pipeline.engine.rows import with_faults, with_tokens
from bge_ray.records.model import EMBEDDING, ModelSpec
from bge_ray.records.plan import Unit
from bge_ray.settings.sections import ModelSettings
from tests.support.crowded import NotingStage, inside_now, left_inside, log_of
from tests.support.poison import make_poisonous

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400), pytest.mark.usefixtures("ray_cluster")]

UNITS, ROWS, BUDGET = 6, 12, 64
TWO_AT_ONCE = Pool(1, 0.5, 0.0, 1, units_at_once=2)


def texts_of(unit: int, poison: set[tuple[int, int]]) -> list[str]:
    bad = {row for of, row in poison if of == unit}
    return [f"unit {unit} row {row}" + " and a fox" * (row in bad) for row in range(ROWS)]


def unit_parcels(spec: ModelSpec, poison: set[tuple[int, int]]) -> list[Parcel]:
    feeder = text_feeder(spec, trust_remote_code=True)
    found = []
    for unit in range(UNITS):
        tokens = feeder.passages(texts_of(unit, poison))
        table = with_tokens(pa.table({"row": range(ROWS)}), np.arange(ROWS), tokens)
        found.append(Parcel.of(f"unit {unit}", Unit(0, unit, ROWS)).filled(with_faults(table, {})))
    return found


def run(spec: ModelSpec, poison: set[tuple[int, int]]) -> dict[int, pa.Table]:
    """Run all units through one actor that takes two at once; returns their tables by number."""
    booked: list[Parcel] = []
    with running_ledger() as ledger:
        job = ModelJob("encode", spec, "cpu", 1, BUDGET, True, ledger, max_attempts=24, units_at_once=2)

        def start() -> Iterator[Parcel]:
            rows = parcels(unit_parcels(spec, poison))
            return receipts(by_actors(rows, NotingStage, TWO_AT_ONCE, job))

        follow(start, booked.append, lambda: None)
    assert sorted(parcel.name for parcel in booked) == [f"unit {unit}" for unit in range(UNITS)]
    assert [parcel.error for parcel in booked] == [None] * UNITS
    return {int(parcel.name.split()[1]): parcel.table for parcel in booked}


def check_rows(spec: ModelSpec, tables: dict[int, pa.Table], poison: set[tuple[int, int]]) -> None:
    """Every innocent row has its own vector, every guilty one its reason, and no row is missing."""
    safe = Model(spec, model_folder(spec), Place(trust_remote_code=True))
    for unit, table in tables.items():
        assert table["row"].to_pylist() == list(range(ROWS))
        tokens = text_feeder(spec, trust_remote_code=True).passages(texts_of(unit, set()))
        expected = safe.empty_result(ROWS)
        safe.run(tokens, safe.cut(tokens, BUDGET), expected)
        for row, (reason, vector) in enumerate(
            zip(table["reason"].to_pylist(), table[EMBEDDING].to_pylist(), strict=True)
        ):
            if (unit, row) in poison:
                assert (reason, vector) == ("killed_worker", None)
            else:
                assert reason is None
                assert np.allclose(vector, expected.array(EMBEDDING)[row], atol=1e-5)


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    folder = make_poisonous(tmp_path / "poison", "fox")
    settings = ModelSettings(name=str(folder), trust_remote_code=True)
    return resolve_encoder(settings, on_gpu=False)


@pytest.mark.slow
@pytest.mark.parametrize("poison", [{(1, 5)}, {(0, 0), (1, 11)}], ids=str)
def test_the_rows_that_kill_are_rejected_and_their_neighbours_are_not(
    spec: ModelSpec, poison: set[tuple[int, int]]
) -> None:
    tables = run(spec, poison)
    check_rows(spec, tables, poison)
    deaths = left_inside(log_of(spec.name))
    assert len(deaths[0]) == 2, "the first death must have two units inside"
    alone = [names for names in deaths if len(names) == 1]
    assert {name for names in alone for name in names} == {f"unit {unit}" for unit, _ in poison}
    assert len(deaths) <= 2 + 4 * len(poison)


def test_a_process_killed_from_outside_with_two_units_inside_costs_no_row(spec: ModelSpec) -> None:
    log, struck = log_of(spec.name), threading.Event()

    def strike() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            crowded = [process for process, units in inside_now(log).items() if units == 2]
            if crowded:
                os.kill(crowded[0], signal.SIGKILL)
                struck.set()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=strike)
    thread.start()
    tables = run(spec, set())
    thread.join()
    assert struck.is_set()
    check_rows(spec, tables, set())
    assert [len(names) for names in left_inside(log)] == [2]
