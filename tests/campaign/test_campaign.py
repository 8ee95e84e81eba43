"""The fault campaign: its checks can fail, its trials can be repeated, and a short one ends well."""

import io
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.campaign.__main__ import main
from tests.campaign.check import check_finished, check_half_way, check_index, snapshot
from tests.campaign.schedule import draw
from tests.campaign.summary import as_markdown, summarise
from tests.support.vectors import make_dataset

SHARD = "embeddings/00000001-0000000000.parquet"


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A finished data set with something in the place of an index, and its snapshot."""
    root = tmp_path / "out"
    make_dataset(str(root), [40, 30, 20])
    (root / "report.json").write_text(json.dumps({"outcome": "complete: 90 rows in 3 units"}))
    (root / "index").mkdir()
    (root / "index" / "index.faiss").write_bytes(b"index")
    (root / "index" / "index.json").write_text(json.dumps({"files": []}))
    return root, snapshot(fsspec.filesystem("file"), str(root))


def broken(finished: tuple[Path, dict[str, Any]]) -> str:
    root, reference = finished
    return "; ".join(check_finished(fsspec.filesystem("file"), str(root), reference).broken)


def test_a_sound_data_set_passes(finished: tuple[Path, dict[str, Any]]) -> None:
    findings = check_finished(fsspec.filesystem("file"), str(finished[0]), finished[1])
    assert (findings.broken, findings.rows, findings.lost, findings.doubled) == ([], 90, 0, 0)
    assert check_half_way(fsspec.filesystem("file"), str(finished[0])) == []


def test_a_removed_shard_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    (finished[0] / SHARD).unlink()
    assert f"{SHARD}: missing" in broken(finished)
    assert "30 rows lost, 0 doubled" in broken(finished)


def test_a_doubled_row_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    table = pq.read_table(finished[0] / SHARD)
    pq.write_table(pa.concat_tables([table, table.slice(3, 1)]), finished[0] / SHARD)
    assert "0 rows lost, 1 doubled" in broken(finished)


def test_a_changed_byte_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    data = bytearray((finished[0] / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (finished[0] / SHARD).write_bytes(data)
    assert f"{SHARD}: other bytes" in broken(finished)


def test_another_manifest_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    path = finished[0] / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokens"] += 1
    path.write_text(json.dumps(manifest))
    assert "not that of the clean run: tokens" in broken(finished)


@pytest.mark.parametrize("name", ["embeddings/stray.parquet", "done/unit.json", "lease.json"])
def test_what_is_left_over_is_noticed(finished: tuple[Path, dict[str, Any]], name: str) -> None:
    path = finished[0] / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"{}")
    assert name in broken(finished)


def test_an_unfinished_report_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    (finished[0] / "report.json").write_text(json.dumps({"outcome": "incomplete: SIGTERM"}))
    assert "report" in broken(finished)


def test_a_half_written_object_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    whole = io.BytesIO()
    pq.write_table(pa.table({"vector_id": [1]}), whole)
    (finished[0] / "embeddings" / "new.parquet").write_bytes(whole.getvalue()[:-9])
    [found] = check_half_way(fsspec.filesystem("file"), str(finished[0]))
    assert "embeddings/new.parquet: half-written" in found


@pytest.mark.parametrize("damage", ["missing", "changed", "more", "none at all"])
def test_another_index_is_noticed(finished: tuple[Path, dict[str, Any]], damage: str) -> None:
    fs, (root, reference) = fsspec.filesystem("file"), finished
    assert check_index(fs, str(root), reference) == []
    if damage == "missing":
        (root / "index" / "index.faiss").unlink()
    elif damage == "none at all":
        (root / "index" / "index.json").unlink()
    else:
        name = "index.faiss" if damage == "changed" else "lease.json"
        (root / "index" / name).write_bytes(b"other")
    assert check_index(fs, str(root), reference)


def test_a_trial_is_drawn_again_from_seed_and_number() -> None:
    trials = [draw(1, number) for number in range(200)]
    assert trials == [draw(1, number) for number in range(200)]
    assert trials[7] != draw(2, 7)
    struck = {blow.what for trial in trials for life in trial.lives for blow in life.blows}
    assert struck == {
        "driver",
        "sigterm",
        "encoder",
        "worker",
        "store",
        "raylet",
        "node",
        "requester",
    }


def test_the_summary_adds_up() -> None:
    line = {
        "trial": 0,
        "jobs": ["embed", "index"],
        "cluster": True,
        "change": None,
        "blows": [["driver @ request 3", "store @ 1.0 s"], []],
        "noise": {"503": 2},
        "runs": 2,
        "rows": 725,
        "lost": 0,
        "doubled": 0,
        "outcome": "ok",
        "seconds": 10.0,
    }
    bad = line | {"trial": 1, "lost": 3, "outcome": "3 rows lost, 0 doubled"}
    summary = summarise([line, bad])
    assert (summary["trials"], summary["ok"], summary["broken"]) == (2, 1, [1])
    assert (summary["kills"], summary["injected"]) == ({"driver": 2, "store": 2}, {"503": 4})
    assert (summary["rows_checked"], summary["rows_lost"], summary["rows_doubled"]) == (1450, 3, 0)
    assert "| rows lost | 3 |" in as_markdown(summary)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_trials_end_well(tmp_path: Path) -> None:
    assert main(["--trials", "3", "--seed", "3", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["trials"], summary["ok"], summary["broken"]) == (3, 3, [])
    assert (summary["rows_lost"], summary["rows_doubled"]) == (0, 0)
    assert summary["rows_checked"] >= 3 * 600
    assert sum(summary["kills"].values()) >= 3
    assert "| rows lost | 0 |" in (tmp_path / "summary.md").read_text()
