"""Whose the folder of a rerank is: no input, no other job's output, and nothing foreign in it is lost."""

import json
from pathlib import Path

import pytest

from bge_ray.errors import OutputBusyError, OutputCollisionError
from bge_ray.pipeline.rerank.job import rerank
from bge_ray.storage.lease import Lease
from tests.support.models import make_cross_encoder
from tests.support.searches import STORAGE, by_query, jsonl, read_run, settings_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

FOREIGN = b"not written by any job"


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cross_encoder(tmp_path_factory.mktemp("reranker") / "ce", positions=64)


def lists(queries: int) -> bytes:
    passages = [{"passage_id": f"p{j}", "text": f"the quick fox {j} jumps"} for j in range(4)]
    return jsonl([{"query_id": f"q{i}", "query": f"a fox {i}", "passages": passages} for i in range(queries)])


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def keys_for(reranker: Path, candidates: Path, output: Path, **more: object) -> dict[str, object]:
    keys = {"rerank__model": str(reranker), "rerank__candidates": str(candidates)}
    return keys | {"rerank__output": str(output)} | more


@pytest.mark.parametrize(
    ("candidates", "output", "more"),
    [
        ("first", "first", {}),  # the run that it reranks
        ("first/run.parquet", "first", {}),
        ("first/run.parquet", "first/../first/", {}),
        ("first", "first/run.parquet", {}),
        ("lists.jsonl", "lists.jsonl", {}),
        ("first", "data", {"output__uri": "data"}),
        ("first", "data/index", {"output__uri": "data"}),
        ("first", "corpus", {"corpus__uri": "corpus"}),
        ("first", "corpus/reranked", {"corpus__uri": "corpus"}),
        ("first", "second", {"search__output": "second"}),
        ("first", "second/work", {"search__output": "second"}),
    ],
)
def test_a_rerank_into_what_it_reads_or_what_another_job_writes_is_refused(
    reranker: Path, tmp_path: Path, candidates: str, output: str, more: dict[str, str]
) -> None:
    for name in ("first", "corpus", "data", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / "first/run.parquet").write_bytes(FOREIGN)
    (tmp_path / "lists.jsonl").write_bytes(lists(1))
    before = everything(tmp_path)
    more = {key: str(tmp_path / name) for key, name in more.items()}
    keys = keys_for(reranker, tmp_path / candidates, tmp_path / output, **more)
    keys["rerank__output"] = f"{tmp_path}/{output}"  # as it was typed
    with pytest.raises(OutputCollisionError, match=r"rerank\.output") as caught:
        rerank(settings_for(**keys))
    assert caught.value.exit_code == 2
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["run.parquet", "run.trec", "rejected.parquet", "report.html", "_bge_ray.json"]
)
def test_a_foreign_file_at_a_name_of_ours_is_refused_before_anything_is_written(
    reranker: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "lists.jsonl").write_bytes(lists(1))
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir()
    theirs.write_bytes(FOREIGN)
    before = everything(tmp_path)
    with pytest.raises(OutputCollisionError) as caught:
        rerank(settings_for(**keys_for(reranker, tmp_path / "lists.jsonl", tmp_path / "out")))
    assert caught.value.exit_code == 2
    assert str(theirs) in str(caught.value)
    assert everything(tmp_path) == before


def test_foreign_files_in_the_folder_stay_and_ours_go(reranker: Path, tmp_path: Path) -> None:
    """Also those that look much like ours, and what a run that was killed has left of ours goes."""
    (tmp_path / "lists.jsonl").write_bytes(lists(5))
    out = tmp_path / "out"
    digest = "0123456789abcdef" * 4
    theirs = [
        out / name
        for name in (
            "notes.txt",
            "run.parquet.bak",
            "reranked/run.parquet",
            "work/notes.txt",
            f"work/parts/{digest}.parquet.bak",
            f"work/parts/{digest[1:]}.parquet",
            "work/pieces/rejected-000000.mine",
            "work/groups/00000000.parquet",
        )
    ]
    dead = [
        out / f"work/parts/{digest}.parquet",
        out / f"work/groups/00000000-{digest[:32]}.parquet",
        out / "work/pieces/score-parquet-000000",
    ]
    for path in (*theirs, *dead):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FOREIGN)
    report = rerank(settings_for(**keys_for(reranker, tmp_path / "lists.jsonl", out, rerank__unit_pairs=8)))
    assert (report.queries, report.pairs_out) == (5, 20)
    assert len(by_query(read_run(str(out)))) == 5
    ours = {"run.parquet", "run.trec", "rejected.parquet", "report.json", "report.html", "_bge_ray.json"}
    left = everything(out)
    assert set(left) == {*theirs, *(out / name for name in ours)}
    assert {left[path] for path in theirs} == {FOREIGN}
    assert json.loads((out / "_bge_ray.json").read_text())["owner"] == "reranked"


@pytest.mark.slow
def test_a_second_run_at_once_is_refused_and_writes_nothing(reranker: Path, tmp_path: Path) -> None:
    (tmp_path / "lists.jsonl").write_bytes(lists(1))
    out = tmp_path / "out"
    settings = settings_for(**keys_for(reranker, tmp_path / "lists.jsonl", out))
    with Lease(STORAGE, str(out), renew_s=1), pytest.raises(OutputBusyError, match="is writing") as caught:
        rerank(settings)
    assert caught.value.exit_code == 75
    assert everything(out) == {}
    assert rerank(settings).outcome == "complete"
    empty = [path for path in tmp_path.rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert empty == []


@pytest.mark.slow
def test_no_report_vouches_for_the_files_of_another_run(reranker: Path, tmp_path: Path) -> None:
    for name, queries in (("a", 3), ("b", 2)):
        (tmp_path / f"{name}.jsonl").write_bytes(lists(queries))
    out = tmp_path / "out"
    a, b = (settings_for(**keys_for(reranker, tmp_path / f"{name}.jsonl", out)) for name in "ab")
    rerank(a)
    first, vouching = read_run(str(out)), (out / "report.json").read_bytes()
    for left in (None, vouching):  # of a run that died before its report, and worse
        rerank(b)
        assert len(read_run(str(out))) == 8
        (out / "report.json").unlink()
        if left is not None:
            (out / "report.json").write_bytes(left)
        assert rerank(a).outcome == "complete"
        assert [r["passage_id"] for r in read_run(str(out))] == [r["passage_id"] for r in first]
    assert rerank(a).outcome == "nothing to do"
