"""A report vouches for a run only as long as it is of that run and its files are what was written."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from bge_ray.errors import (
    IncompleteRunError,
    OutputCollisionError,
    RejectedRowsError,
    StorageAccessError,
)
from bge_ray.pipeline.engine.stopping import Stopped
from bge_ray.pipeline.runs.parts import LEFT_OUT_SCHEMA, RunOutput, Totals, _examples
from bge_ray.pipeline.runs.work import RunWork, check_rejected, published_files
from bge_ray.pipeline.work import carry_out
from bge_ray.records.canonical import to_json
from bge_ray.records.dataset import FileFact
from bge_ray.records.reports import Report, RerankReport, SearchReport
from bge_ray.report.facts import EXAMPLES_PER_REASON, RunFacts
from bge_ray.report.run_page import rerank_page, search_page
from bge_ray.settings.sections import Settings
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import OwnedFolder
from bge_ray.storage.reports import write_report
from tests.report.samples import rerank_report, search_report
from tests.storage.doubles import Hooked

STORAGE = Storage(20)
CONTENT = b"12345"


@dataclasses.dataclass(frozen=True)
class Asked:
    """As much of a job as looking at what is published takes."""

    folder: Path
    key: str
    kind: type[Report] = SearchReport
    storage: Storage = STORAGE

    def page(self, report: Report) -> bytes:
        return search_page(report)

    def outputs(self) -> Sequence[RunOutput]:
        return [RunOutput(owned(self.folder), "tag", "first_score")]


def owned(folder: Path) -> OwnedFolder:
    return OwnedFolder(STORAGE, str(folder), "run", "search.output")


def fact_of(path: Path) -> FileFact:
    return FileFact(str(path), len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published search run of two files, one of them elsewhere."""
    run, other = tmp_path / "run", tmp_path / "elsewhere" / "run.parquet"
    for path in (run / "run.parquet", other):
        STORAGE.write(str(path), CONTENT)
    files = published_files(owned(run), Totals(files=[fact_of(run / "run.parquet"), fact_of(other)]))
    assert [file.path for file in files] == ["run.parquet", f"file://{other}"]
    report = search_report(files=files)
    write_report(owned(run), search_page(report), to_json(report))
    return run


def current(folder: Path, key: str = "k", kind: type[Report] = SearchReport) -> Report | None:
    return RunWork(Settings(), Asked(folder, key, kind)).current()


def test_a_published_run_is_current_under_its_key_alone(folder: Path) -> None:
    found = current(folder)
    assert found is not None
    assert (found.key, found.complete, len(found.files)) == ("k", True, 2)
    assert current(folder, "other") is None
    assert current(folder, kind=RerankReport) is None
    assert current(folder / "nothing") is None
    assert b"Search run" in (folder / "report.html").read_bytes()


@pytest.mark.parametrize("name", ["run.parquet", "../elsewhere/run.parquet"])
@pytest.mark.parametrize("content", [b"1", b"54321", None], ids=["cut off", "of the same size", "gone"])
def test_a_file_that_is_not_what_was_written_ends_that(
    folder: Path, name: str, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert current(folder) is None
    assert [record.message.partition(": ")[0].rpartition("/")[2] for record in caplog.records] == [
        "run.parquet"
    ]


def test_damage_is_told_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "run.parquet").unlink()
    work = RunWork(Settings(), Asked(folder, "k"))
    assert [work.current(), work.current()] == [None, None]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("change", [{"complete": False}, {"format_version": 1}, {"job": None}])
def test_an_incomplete_report_and_one_of_another_version_vouch_for_nothing(
    folder: Path, change: dict[str, object]
) -> None:
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert current(folder) is None
    path.write_bytes(b"{half")
    assert current(folder) is None


def test_a_page_that_is_gone_is_made_again(folder: Path) -> None:
    (folder / "report.html").unlink()
    work = RunWork(Settings(), Asked(folder, "k"))
    assert carry_out(work, RunFacts("search", "r"), None).outcome == "nothing to do"
    assert b"Search run" in (folder / "report.html").read_bytes()
    assert not (folder / "lease.json").exists()


def test_a_page_that_was_changed_is_named_and_stays(folder: Path) -> None:
    changed = (folder / "report.html").read_bytes().swapcase()
    (folder / "report.html").write_bytes(changed)
    with pytest.raises(OutputCollisionError, match=r"report\.html: is in the way"):
        carry_out(RunWork(Settings(), Asked(folder, "k")), RunFacts("search", "r"), None)
    assert (folder / "report.html").read_bytes() == changed


def test_a_sweep_leaves_what_is_not_ours_in_the_work_folder(folder: Path) -> None:
    ours = ["parts/" + "a" * 64 + ".parquet", "groups/00000000-" + "b" * 32 + ".parquet"]
    ours += ["pieces/score-trec-000001", "pieces/first_score-parquet-000000", "pieces/rejected-000000"]
    theirs = ["parts/mine.parquet", "groups/notes.txt", "pieces/score", "thesis.tex"]
    for name in (*ours, *theirs):
        STORAGE.write(str(folder / "work" / name), b"anything")
    RunWork(Settings(), Asked(folder, "k")).sweep()
    left = {str(p.relative_to(folder / "work")) for p in (folder / "work").rglob("*") if p.is_file()}
    assert left == set(theirs)
    for name in theirs:
        (folder / "work" / name).unlink()
    RunWork(Settings(), Asked(folder, "k")).sweep()
    assert not (folder / "work").exists(), "empty folders go"


def test_each_job_has_its_page() -> None:
    assert b"Rerank run" in rerank_page(rerank_report())


def test_parts_with_many_rows_left_out_give_few_examples() -> None:
    reasons = ["killed_worker"] * 30 + ["no_result"] * 2
    ids = [str(k) for k in range(len(reasons))]
    table = pa.table([ids, ids, reasons, reasons], schema=LEFT_OUT_SCHEMA)
    first = _examples(table, [])
    assert Counter(row.reason for row in first) == {"killed_worker": EXAMPLES_PER_REASON, "no_result": 2}
    assert (first[0].query_id, first[0].passage_id) == ("0", "0")
    assert Counter(row.reason for row in _examples(table, first)) == {"no_result": 2}


def test_too_much_that_was_left_out_is_mended_by_no_rerun() -> None:
    check_rejected("/run", 0.1, 0.1, "search.max_rejected_fraction", {"null_text": 1})
    said = r"/run: the run is published, but 20\.0% .* \(null_text 2\), more than search\.max_.* 0\.1"
    with pytest.raises(RejectedRowsError, match=said) as caught:
        check_rejected("/run", 0.2, 0.1, "search.max_rejected_fraction", {"null_text": 2})
    assert caught.value.exit_code == 2


@dataclasses.dataclass
class Stopping:
    """A run that is stopped, or fails, after its store began to refuse writes."""

    folder: OwnedFolder
    end: BaseException
    refuses: list[bool]
    storage: Storage = STORAGE

    @property
    def folders(self) -> Sequence[OwnedFolder]:
        return (self.folder,)

    def current(self) -> Report | None:
        return None

    def do(self, facts: RunFacts, watch: object) -> None:
        self.refuses.append(True)
        raise self.end

    def report(self, facts: RunFacts, outcome: str, *, complete: bool) -> Report:
        return search_report(outcome=outcome, complete=complete)

    def page(self, report: Report) -> bytes:
        return search_page(report)


@pytest.mark.parametrize("end", [Stopped(15), IncompleteRunError("a unit is not done")])
def test_a_run_ends_of_what_ended_it_though_the_store_takes_no_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, end: BaseException
) -> None:
    """Embed, search and rerank alike; by the code a scheduler knows a stop from a failure."""
    refuses: list[bool] = []

    def refuse(_: int) -> None:
        if refuses:
            raise StorageAccessError("refused")

    folder = OwnedFolder(Hooked(5, refuse), str(tmp_path / "out"), "run", "search.output")
    with pytest.raises(type(end)) as caught:
        carry_out(Stopping(folder, end, refuses), RunFacts("search"), None)
    assert caught.value is end
    assert "no report of this run: refused" in caplog.text
    assert not (tmp_path / "out/report.json").exists()
    assert not (tmp_path / "out/lease.json").exists()
