"""How a corpus is cut into units for the encoders that there are, and which small objects go together."""

import itertools
from pathlib import Path

import pytest

from bge_ray.pipeline.embed.planning import (
    GROUP_OBJECTS,
    LEAST_AUTO_ROWS,
    MOST_AUTO_ROWS,
    UNITS_PER_ENCODER,
    extend_plan,
    scan_task,
    settle_limits,
    unchanged_objects,
)
from bge_ray.records.plan import Plan
from bge_ray.settings.sections import BatchingSettings, CorpusSettings
from bge_ray.storage.objects import Storage
from tests.support.reading import compress, csv_bytes, jsonl_bytes, parquet_bytes, resolve

STORAGE = Storage(5)
ROWS = [{"id": str(i), "text": "word " * (5 + i * 7919 % 60)} for i in range(6000)]
ENCODINGS = {
    "a.parquet": lambda rows: parquet_bytes(rows),
    "b.parquet": lambda rows: parquet_bytes(rows, row_group_size=50),
    "a.jsonl": jsonl_bytes,
    "a.jsonl.gz": lambda rows: compress(jsonl_bytes(rows), ".gz"),
    "a.csv": csv_bytes,
}


def plan_of(folder: Path, encoders: int, previous: Plan | None = None, **batching: int) -> Plan:
    """Plan what lies in a folder, as a run does."""
    settings = CorpusSettings(uri=str(folder))
    listed = STORAGE.list_files(str(folder))
    unchanged = unchanged_objects(listed, previous, settings)
    changed = [info for info in listed if info.uri not in unchanged]
    limits = settle_limits(BatchingSettings(**batching), changed, encoders, vector_bytes=128)
    scanned = scan_task(STORAGE, changed, settings, limits) if changed else []
    assert not any(isinstance(found, str) for found in scanned), scanned
    columns = resolve(scanned) if previous is None else resolve(scan_task(STORAGE, listed, settings, limits))
    return extend_plan(unchanged, previous, scanned, columns, limits)


@pytest.mark.parametrize("name", list(ENCODINGS))
@pytest.mark.parametrize("encoders", [1, 2, 8])
def test_every_encoder_gets_several_units_of_one_file(tmp_path: Path, name: str, encoders: int) -> None:
    (tmp_path / name).write_bytes(ENCODINGS[name](ROWS))
    units = plan_of(tmp_path, encoders).units()
    assert sum(unit.n_rows for unit in units) == len(ROWS)
    wanted = min(encoders * UNITS_PER_ENCODER, len(ROWS) // LEAST_AUTO_ROWS)
    assert wanted / 2 <= len(units) <= wanted * 1.1
    rows = [unit.n_rows for unit in units]
    assert min(rows) >= LEAST_AUTO_ROWS / 2, "no unit is a mere remainder"
    # The last units decide how long an encoder idles.
    assert max(rows) <= 1.5 * len(ROWS) / len(units)


def test_units_are_no_larger_than_their_limits(tmp_path: Path) -> None:
    limits = settle_limits(BatchingSettings(), STORAGE.list_files(str(tmp_path)), 8, 128)
    assert (limits.max_rows, limits.max_bytes) == (MOST_AUTO_ROWS, 96_000_000)
    (tmp_path / "a.jsonl").write_bytes(jsonl_bytes(ROWS))
    assert max(u.n_rows for u in plan_of(tmp_path, 1, unit_rows=70).units()) == 70


def test_other_encoders_change_no_unit_that_is_planned(tmp_path: Path) -> None:
    """A rerun on another machine goes on with the same units; only a new object is cut for it."""
    (tmp_path / "a.jsonl").write_bytes(jsonl_bytes(ROWS[:3000]))
    (tmp_path / "b.jsonl").write_bytes(jsonl_bytes(ROWS[3000:3010]))
    first = plan_of(tmp_path, 2)
    assert plan_of(tmp_path, 64, first) == first
    (tmp_path / "c.jsonl").write_bytes(jsonl_bytes(ROWS[:3000]))
    again = plan_of(tmp_path, 1, first)
    assert again.objects[:2] == first.objects
    assert len(again.objects[2].units()) == UNITS_PER_ENCODER


def test_small_objects_are_grouped_up_to_a_unit(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i:03d}.jsonl").write_bytes(jsonl_bytes(ROWS[3 * i : 3 * i + 3]))
    (tmp_path / "100b.jsonl").write_bytes(jsonl_bytes(ROWS[:4000]))
    (tmp_path / "200b.jsonl").write_bytes(b"")
    plan = plan_of(tmp_path, 1)
    assert [len(o.units()) for o in plan.objects if o.n_rows == 3] == [1] * 300
    assert all(o.group is None for o in plan.objects if o.n_rows != 3)
    groups = [list(g) for _, g in itertools.groupby((o for o in plan.objects if o.group is not None), _group)]
    assert sum(len(g) for g in groups) == 300
    assert [g[0].group for g in groups] == [g[0].object_no for g in groups]
    share = 4900 / UNITS_PER_ENCODER
    assert all(sum(o.n_rows for o in g) <= 1.5 * share for g in groups)
    assert len(groups) <= 5
    # A number that is given bounds the groups, too, and so does the number of objects.
    assert {_group(o) for o in plan_of(tmp_path, 1, unit_rows=2).objects} == {None}
    few = plan_of(tmp_path, 1, unit_rows=6)
    assert (
        max(
            sum(o.n_rows for o in few.objects if o.group == g)
            for g in {_group(o) for o in few.objects if o.group}
        )
        == 6
    )
    many = [o.group for o in plan_of(tmp_path, 1, unit_rows=40_000).objects]
    assert max(many.count(g) for g in set(many) if g is not None) == GROUP_OBJECTS


def _group(corpus_object) -> int | None:
    return corpus_object.group
