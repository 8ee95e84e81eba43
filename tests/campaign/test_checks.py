"""The checks of the campaign can fail: each planted fault is noticed, and sound folders pass."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.campaign.checks.dataset import check_dataset, check_index, snapshot
from tests.campaign.checks.reports import check_moment
from tests.campaign.checks.runs import check_run, run_snapshot
from tests.campaign.codes import check_code
from tests.campaign.finished import asked_to_rerank, make_dataset, make_run, write_json, write_run
from tests.campaign.foreign import OUR_SHARD, Foreign, Laid, foreign_bytes
from tests.campaign.jobs import written_folders

FS = fsspec.filesystem("file", auto_mkdir=True)
SHARD = "embeddings/00000001-0000000000.parquet"


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A finished data set with an index, and its snapshot."""
    root = tmp_path / "dataset"
    make_dataset(root)
    return root, json.loads(json.dumps(snapshot(FS, str(root), reuses=False)))


@pytest.fixture
def ran(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The root of a finished, reranked search, and its snapshot."""
    make_run(tmp_path, asked_to_rerank())
    return tmp_path, json.loads(json.dumps(run_snapshot(FS, asked_to_rerank(), str(tmp_path))))


def broken(finished: tuple[Path, dict[str, Any]], **more: Any) -> str:
    root, reference = finished
    return "; ".join(check_dataset(FS, str(root), reference, **more).broken)


def broken_run(ran: tuple[Path, dict[str, Any]]) -> str:
    return "; ".join(check_run(FS, asked_to_rerank(), str(ran[0]), ran[1], frozenset())[0])


def broken_at_once(root: Path) -> str:
    return "; ".join(check_moment(FS, written_folders(str(root)), frozenset())[0])


def change_json(path: Path, **facts: Any) -> None:
    write_json(path, json.loads(path.read_text()) | facts)


def change_rows(folder: Path, change: Callable[[list[tuple[Any, ...]]], list[tuple[Any, ...]]]) -> None:
    """Change a run in both forms."""
    columns = pq.read_table(folder / "run.parquet").to_pydict().values()
    write_run(folder, change(list(zip(*columns, strict=True))))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_sound_data_set_passes(finished: tuple[Path, dict[str, Any]]) -> None:
    root, reference = finished
    findings = check_dataset(FS, str(root), reference)
    assert (findings.broken, findings.rows, findings.lost, findings.doubled) == ([], 90, 0, 0)
    assert check_index(FS, str(root), reference) == []
    assert check_moment(FS, written_folders(str(root.parent)), frozenset()) == ([], 2)


def test_a_removed_shard_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    (finished[0] / SHARD).unlink()
    assert f"{SHARD}: missing" in broken(finished)
    assert "30 rows lost, 0 doubled" in broken(finished)


def test_a_missing_row_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    pq.write_table(pq.read_table(finished[0] / SHARD).slice(1), finished[0] / SHARD)
    assert "1 rows lost, 0 doubled" in broken(finished)


def test_a_doubled_row_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    table = pq.read_table(finished[0] / SHARD)
    pq.write_table(pa.concat_tables([table, table.slice(3, 1)]), finished[0] / SHARD)
    assert "0 rows lost, 1 doubled" in broken(finished)


def test_a_changed_byte_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    flip(finished[0] / SHARD)
    assert f"{SHARD}: other bytes" in broken(finished)


@pytest.mark.parametrize(
    ("reuses", "moved", "says"),
    [
        (True, 1e-6, ""),
        (True, 1e-3, "vectors differ from the clean run's by up to 0.00"),
        (False, 1e-6, "the manifest is not that of the clean run"),
    ],
)
def test_last_bits_may_differ_where_vectors_are_reused(
    tmp_path: Path, *, reuses: bool, moved: float, says: str
) -> None:
    make_dataset(tmp_path)
    reference = json.loads(json.dumps(snapshot(FS, str(tmp_path), reuses=reuses)))
    make_dataset(tmp_path, moved)
    found = broken((tmp_path, reference))
    assert says in found if says else not found
    change_json(tmp_path / "manifest.json", tokens=1)
    assert ("not that of the clean run: tokens" in broken((tmp_path, reference))) == reuses


def test_another_manifest_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    change_json(finished[0] / "manifest.json", tokens=1)
    assert "not that of the clean run: tokens" in broken(finished)
    assert "says complete, but it is of another manifest" in broken(finished)
    assert "says complete, but it is of another manifest" in broken_at_once(finished[0].parent)


@pytest.mark.parametrize("name", ["embeddings/stray.parquet", "done/unit.json", "lease.json", "work/parts/a"])
def test_what_is_left_over_is_noticed(finished: tuple[Path, dict[str, Any]], name: str) -> None:
    path = finished[0] / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(b"{}")
    assert name in broken(finished)


def test_dead_files_are_explained_by_the_grace_alone(finished: tuple[Path, dict[str, Any]]) -> None:
    shutil.copy(finished[0] / SHARD, finished[0] / "embeddings" / "dead.parquet")
    assert "left over: embeddings/dead.parquet" in broken(finished, died_after=1000.0)
    write_json(finished[0] / "_retired.json", {"since": {"embeddings/dead.parquet": 1001.0}})
    assert broken(finished, died_after=1000.0) == ""
    assert "longer than the grace" in broken(finished, died_after=1002.0)
    assert "longer than the grace" in broken(finished)
    write_json(finished[0] / "_retired.json", {"since": {SHARD: 1001.0}})
    assert f"or is live: {SHARD}" in broken(finished, died_after=1000.0)


def test_changes_must_lead_to_the_manifest(finished: tuple[Path, dict[str, Any]]) -> None:
    last = finished[0] / "changes" / "000002.json"
    orphan = json.loads(last.read_text()) | {"number": 3, "before": "a", "after": "b"}
    write_json(finished[0] / "changes" / "000003.json", orphan)
    assert "do not lead" in broken(finished)  # the second leads to nothing that is next
    orphan |= {"before": json.loads(last.read_text())["after"]}
    write_json(finished[0] / "changes" / "000003.json", orphan)
    assert broken(finished) == ""
    (finished[0] / "changes" / "000003.json").unlink()
    change_json(last, added=[])
    assert "the shards that they add" in broken(finished)
    change_json(last, added=["embeddings/00000002-0000000000.parquet"], added_ids=[])
    assert "the ranges of ids" in broken(finished)
    last.unlink()
    assert "do not lead" in broken(finished)


def test_an_unfinished_report_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    change_json(finished[0] / "report.json", complete=False, outcome="incomplete: SIGTERM")
    assert "incomplete: SIGTERM" in broken(finished)


def test_a_lost_journal_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    (finished[0] / "_bge_ray.json").unlink()
    assert "no journal" in broken(finished)


def test_a_half_written_object_is_noticed(finished: tuple[Path, dict[str, Any]]) -> None:
    whole = io.BytesIO()
    pq.write_table(pa.table({"vector_id": [1]}), whole)
    (finished[0] / "embeddings" / "new.parquet").write_bytes(whole.getvalue()[:-9])
    assert "embeddings/new.parquet: half-written" in broken_at_once(finished[0].parent)


def test_a_shard_whose_name_a_foreign_file_has_lies_beside_it(finished: tuple[Path, dict[str, Any]]) -> None:
    root, reference = finished
    assert OUR_SHARD.startswith(f"{root.name}/")
    name = OUR_SHARD.partition("/")[2]
    fact = json.loads(reference["manifest"])["shards"][0]["embeddings"]
    beside = fact["path"].replace(".parquet", f"-{fact['sha256'][:12]}.parquet")
    shutil.move(root / name, root / beside)
    (root / name).write_bytes(foreign_bytes(OUR_SHARD))
    manifest = root / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"{fact["path"]}"', f'"{beside}"'))
    found = broken(finished, foreign=frozenset({str(root / name)}))
    assert "not that of the clean run" not in found
    assert "left over" not in found
    assert "rows lost" not in found
    assert "not that of the clean run" in broken(finished)


@pytest.mark.parametrize("damage", ["missing", "changed", "more", "none at all"])
def test_another_index_is_noticed(finished: tuple[Path, dict[str, Any]], damage: str) -> None:
    root, reference = finished
    index = root / "index" / "0123456789abcdef" / "index.faiss"
    if damage == "missing":
        index.unlink()
    elif damage == "none at all":
        (root / "index" / "index.json").unlink()
    elif damage == "changed":
        index.write_bytes(b"other")
    else:
        (root / "index" / "lease.json").write_bytes(b"{}")
    assert check_index(FS, str(root), reference)


def test_a_sound_run_passes(ran: tuple[Path, dict[str, Any]]) -> None:
    asked = asked_to_rerank()
    assert check_run(FS, asked, str(ran[0]), ran[1], frozenset()) == ([], [True, True])
    assert check_moment(FS, written_folders(str(ran[0])), frozenset()) == ([], 1)


@pytest.mark.parametrize("name", ["run", "run/reranked"])
def test_a_lost_and_a_doubled_result_are_noticed(ran: tuple[Path, dict[str, Any]], name: str) -> None:
    folder = ran[0] / name
    change_rows(folder, lambda rows: rows[:-1])
    assert "1 pairs lost, 0 doubled" in broken_run(ran)
    change_rows(folder, lambda rows: [*rows, rows[-1]])
    assert "1 pairs lost, 1 doubled" in broken_run(ran)
    assert "the ranks of query q-3" in broken_run(ran)


def test_results_in_another_order_are_noticed(ran: tuple[Path, dict[str, Any]]) -> None:
    change_rows(ran[0] / "run", lambda rows: [rows[1], rows[0], *rows[2:]])
    assert "or in another order" in broken_run(ran)
    assert "the ranks of query q-0" in broken_run(ran)
    change_rows(ran[0] / "run", lambda rows: [*rows[2:], *rows[:2]])
    assert "a query stands in two places" in broken_run(ran)


def test_other_scores_tags_and_forms_are_noticed(ran: tuple[Path, dict[str, Any]]) -> None:
    folder = ran[0] / "run"
    change_rows(folder, lambda rows: [(*rows[0][:3], rows[0][3] + 5e-5, rows[0][4]), *rows[1:]])
    assert "1 scores differ" in broken_run(ran)
    change_rows(folder, lambda rows: [(*row[:3], 1.0 / row[2], "other") for row in rows])
    assert "another tag" in broken_run(ran)
    lines = (folder / "run.trec").read_text()
    (folder / "run.trec").write_text(lines.replace("q-0:2", "q-0:9"))
    assert "run.trec and run.parquet differ" in broken_run(ran)


def test_a_report_that_vouches_for_the_files_of_another_run_is_noticed(
    ran: tuple[Path, dict[str, Any]],
) -> None:
    change_rows(ran[0] / "run" / "reranked", lambda rows: [(*row[:4], "other") for row in rows])
    assert "run/report.json says complete, but" in broken_at_once(ran[0])
    assert "run/reranked/run.parquet: other bytes" in broken_at_once(ran[0])
    (ran[0] / "run" / "report.json").unlink()
    assert broken_at_once(ran[0]) == ""
    assert "run/report.json: missing" in broken_run(ran)


def test_a_report_that_forgets_a_file_or_a_row_is_noticed(ran: tuple[Path, dict[str, Any]]) -> None:
    report = ran[0] / "run" / "report.json"
    files = json.loads(report.read_text())["files"]
    change_json(report, files=files[1:])
    assert "does not name every file" in broken_run(ran)
    change_json(report, files=files, results=11)
    assert "the report says" in broken_run(ran)


def test_rejected_rows_that_changed_are_noticed(ran: tuple[Path, dict[str, Any]]) -> None:
    path = ran[0] / "run" / "rejected.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    assert "other rejected rows" in broken_run(ran)


@pytest.mark.parametrize("name", ["work/parts/a.parquet", "reranked/lease.json", "lease.json", "extra"])
def test_what_a_run_leaves_over_is_noticed(ran: tuple[Path, dict[str, Any]], name: str) -> None:
    path = ran[0] / "run" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{}")
    assert f"left over: {path}" in broken_run(ran)
    found, _ = check_run(FS, asked_to_rerank(), str(ran[0]), ran[1], frozenset({str(path)}))
    assert found == []


def test_foreign_files_that_are_touched_are_noticed(tmp_path: Path) -> None:
    ours = tmp_path / "run" / "notes.md"
    ours.parent.mkdir()
    ours.write_text("ours")
    wanted = [
        Foreign("run/notes.md"),
        Foreign("run/work/theirs.txt"),
        Foreign("dataset/theirs.parquet", run=1),
    ]
    laid = Laid(FS, str(tmp_path), wanted)
    laid.lay(0)
    assert (laid.count, ours.read_text()) == (1, "ours")
    laid.lay(1)
    assert (laid.count, laid.check(), laid.touched) == (2, [], set())
    assert laid.paths() == {f"{tmp_path}/run/work/theirs.txt", f"{tmp_path}/dataset/theirs.parquet"}
    flip(tmp_path / "dataset" / "theirs.parquet")
    (tmp_path / "run" / "work" / "theirs.txt").unlink()
    assert laid.check() == [
        "foreign file run/work/theirs.txt: is gone",
        "foreign file dataset/theirs.parquet: has other bytes",
    ]
    assert laid.touched == {"run/work/theirs.txt", "dataset/theirs.parquet"}


def test_only_files_in_the_way_that_a_log_names_are_moved_away(tmp_path: Path) -> None:
    wanted = [
        Foreign("run/report.json", in_the_way=True),
        Foreign("run/run.trec", in_the_way=True),
        Foreign("run/notes.md"),
    ]
    laid = Laid(FS, str(tmp_path), wanted)
    laid.lay(0)
    log = f"search: {tmp_path}/run/report.json: is in the way; {tmp_path}/run/notes.md"
    assert laid.move_away(log) == ["run/report.json"]
    assert not (tmp_path / "run" / "report.json").exists()
    assert laid.paths() == {f"{tmp_path}/run/run.trec", f"{tmp_path}/run/notes.md"}
    assert laid.check() == []


@pytest.mark.parametrize(
    ("code", "struck", "moved", "fine"),
    [
        (0, set(), [], True),
        (1, {"worker"}, [], True),
        (75, set(), [], True),
        (-9, {"driver"}, [], True),
        (-9, {"worker"}, [], False),
        (143, {"sigterm"}, [], True),
        (143, set(), [], False),
        (2, set(), ["run/run.trec"], True),
        (2, {"driver"}, [], False),
        (-11, {"raylet"}, [], False),
    ],
)
def test_exit_codes_are_explained(code: int, struck: set[str], moved: list[str], fine: bool) -> None:
    assert (check_code(code, struck, moved) == []) is fine
