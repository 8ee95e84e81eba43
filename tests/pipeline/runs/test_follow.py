"""A report vouches for a run only as long as it is of that run and its files are there."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from bge_ray.pipeline.runs.follow import publish_report, published_files, read_current

from bge_ray.pipeline.runs.parts import REJECTED_SCHEMA, Totals, _examples
from bge_ray.records.dataset import FileFact
from bge_ray.records.reports import RerankReport, SearchReport
from bge_ray.report.facts import EXAMPLES_PER_REASON
from bge_ray.storage.objects import Storage
from tests.report.samples import rerank_report, search_report

STORAGE = Storage(20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published search run of two files, one of them elsewhere."""
    run, other = tmp_path / "run", tmp_path / "reranked" / "run.parquet"
    STORAGE.write(str(run / "run.parquet"), b"12345")
    STORAGE.write(str(other), b"123")
    totals = Totals(files=[FileFact(f"{run}/run.parquet", 5, "f", 1), FileFact(str(other), 3, "f", 1)])
    files = published_files(str(run), totals)
    assert [file.path for file in files] == ["run.parquet", str(other)]
    publish_report(STORAGE, str(run), search_report(files=files))
    return run


def current(folder: Path, key: str = "k") -> SearchReport | None:
    return read_current(STORAGE, str(folder), key, SearchReport)


def test_a_published_run_is_current_under_its_key_alone(folder: Path) -> None:
    found = current(folder)
    assert found is not None
    assert (found.key, found.complete, len(found.files)) == ("k", True, 2)
    assert current(folder, "other") is None
    assert read_current(STORAGE, str(folder), "k", RerankReport) is None
    assert current(folder / "nothing") is None
    assert b"Search run" in (folder / "report.html").read_bytes()


@pytest.mark.parametrize("name", ["run.parquet", "../reranked/run.parquet"])
def test_a_file_that_is_gone_or_cut_off_ends_that(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / name).write_bytes(b"1")
    assert current(folder) is None
    (folder / name).unlink()
    assert current(folder) is None
    assert [record.message.partition(":")[0].endswith("run.parquet") for record in caplog.records] == [
        True
    ] * 2


@pytest.mark.parametrize("change", [{"complete": False}, {"format_version": 1}, {"job": None}])
def test_an_incomplete_report_and_one_of_another_version_vouch_for_nothing(
    folder: Path, change: dict[str, object]
) -> None:
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert current(folder) is None
    path.write_bytes(b"{half")
    assert current(folder) is None


def test_each_job_has_its_page(tmp_path: Path) -> None:
    publish_report(STORAGE, str(tmp_path), dataclasses.replace(rerank_report(), files=()))
    assert b"Rerank run" in (tmp_path / "report.html").read_bytes()


def test_parts_with_many_rows_left_out_give_few_examples() -> None:
    reasons = ["killed_worker"] * 30 + ["no_result"] * 2
    ids = [str(k) for k in range(len(reasons))]
    table = pa.table([ids, ids, reasons, reasons], schema=REJECTED_SCHEMA)
    first = _examples(table, [])
    assert Counter(row.reason for row in first) == {"killed_worker": EXAMPLES_PER_REASON, "no_result": 2}
    assert (first[0].query_id, first[0].passage_id) == ("0", "0")
    assert Counter(row.reason for row in _examples(table, first)) == {"no_result": 2}
