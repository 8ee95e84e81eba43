"""Whose the folders of a search are: nothing foreign is lost, no report vouches for files of another run."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from bge_ray.errors import BgeRayError, OutputBusyError, OutputCollisionError, RejectedRowsError
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.engine.stopping import Stopped, StopRequest
from bge_ray.pipeline.index.job import build_index
from bge_ray.pipeline.rerank.job import plan_rerank, rerank
from bge_ray.pipeline.runs.work import RunWork
from bge_ray.pipeline.search.job import SearchJob, plan_search, search
from bge_ray.pipeline.work import carry_out
from bge_ray.report.facts import RunFacts
from bge_ray.storage.lease import Lease
from tests.support.corpora import docstrings, jsonl_bytes
from tests.support.models import make_cross_encoder
from tests.support.searches import STORAGE, jsonl, read_run, settings_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PASSAGES, QUERIES, K = 30, 6, 4
FOREIGN = b"not written by any job"


@pytest.fixture(scope="module")
def place(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set on a local disk, in two objects, with queries and a reranker beside it."""
    place = tmp_path_factory.mktemp("owned")
    passages = docstrings(PASSAGES)[:PASSAGES]
    (place / "corpus").mkdir()
    for number in range(2):
        (place / f"corpus/{number}.jsonl").write_bytes(jsonl_bytes(passages[number::2]))
    records = [{"_id": f"q{i}", "text": p["title"]} for i, p in enumerate(passages[:QUERIES])]
    (place / "queries.jsonl").write_bytes(jsonl(records))
    make_cross_encoder(place / "reranker", positions=64)
    keys = {"corpus__uri": str(place / "corpus"), "output__uri": str(place / "data")}
    embed(settings_for(**keys, model__name=str(tiny_model)))
    return place


def keys_for(place: Path, output: Path, **more: object) -> dict[str, object]:
    keys = {
        "output__uri": str(place / "data"),
        "search__queries": str(place / "queries.jsonl"),
        "search__output": str(output),
        "search__k": K,
        "rerank__model": str(place / "reranker"),
        "rerank__depth": K,
    }
    return keys | more


def everything(*folders: Path) -> dict[Path, bytes]:
    """Return the content of every file there is, hidden ones and leases included."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files}


def ranked(folder: Path) -> list[tuple[object, ...]]:
    return [(r["query_id"], r["passage_id"], r["rank"], r["tag"]) for r in read_run(str(folder))]


def refused(act: Callable[[], object]) -> BgeRayError:
    with pytest.raises(OutputCollisionError) as caught:
        act()
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_a_search_under_way_ends_with_what_it_began_with(
    place: Path, tiny_model: Path, tmp_path: Path, exact: bool
) -> None:
    """Embed and index publish meanwhile, and leave the files of the state before for their grace."""
    shutil.copytree(place / "corpus", tmp_path / "corpus")
    grace = {"output__uri": str(tmp_path / "data"), "output__grace_s": 3600}
    embedding = settings_for(corpus__uri=str(tmp_path / "corpus"), model__name=str(tiny_model), **grace)
    indexing = settings_for(index__factory="Flat", **grace)

    def keys(name: str) -> dict[str, object]:
        return keys_for(place, tmp_path / name, output__uri=str(tmp_path / "data"), search__exact=exact)

    embed(embedding)
    build_index(indexing)
    search(settings_for(**keys("before")))
    settings = settings_for(**keys("during"))
    work = RunWork(settings, SearchJob(settings))
    (tmp_path / "corpus/0.jsonl").write_bytes(jsonl_bytes(docstrings(500)[400:420]))
    embed(embedding)
    build_index(indexing)
    carry_out(work, RunFacts("search", "r"), None)
    assert ranked(tmp_path / "during") == ranked(tmp_path / "before")
    search(settings_for(**keys("after")))
    assert ranked(tmp_path / "after") != ranked(tmp_path / "before")


@pytest.mark.slow
@pytest.mark.parametrize("outside", [False, True])
def test_the_reranked_folder_is_held_owned_and_looked_after_like_the_first(
    place: Path, tmp_path: Path, outside: bool
) -> None:
    run = tmp_path / "run"
    reranked = tmp_path / "elsewhere" if outside else run / "reranked"
    keys = keys_for(place, run, search__rerank=True)
    if outside:
        keys["rerank__output"] = str(reranked)
    with Lease(STORAGE, str(reranked), renew_s=1), pytest.raises(OutputBusyError, match="is writing") as busy:
        search(settings_for(**keys))
    assert busy.value.exit_code == 75
    assert everything(tmp_path) == {}

    theirs = [reranked / "notes.txt", reranked / "work/parts/theirs.parquet", run / "work/theirs"]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FOREIGN)
    report = search(settings_for(**keys))
    assert {path.read_bytes() for path in theirs} == {FOREIGN}
    first = ranked(reranked)
    assert len(first) == QUERIES * K
    assert report.scoring.pairs_out == QUERIES * K
    for folder, owner in ((run, "run"), (reranked, "reranked search")):
        assert json.loads((folder / "_bge_ray.json").read_text())["owner"] == owner
        assert not (folder / "lease.json").exists()
    assert search(settings_for(**keys)).outcome == "nothing to do"

    # What it named is gone: the report does not vouch for it.
    (reranked / "run.parquet").unlink()
    assert search(settings_for(**keys)).outcome == "complete"
    assert ranked(reranked) == first

    # Somebody's own version of it is no file of ours any more.
    (reranked / "run.trec").write_bytes(FOREIGN)
    before = everything(tmp_path)
    assert str(reranked / "run.trec") in str(refused(lambda: search(settings_for(**keys))))
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("output", "reranked"),
    [
        ("data", None),  # the data set's own folder
        ("data/index", None),
        ("data/embeddings", None),
        ("corpus", None),
        ("corpus/run", None),  # the next embed would read it
        ("queries.jsonl", None),
        ("run", "run"),
        ("run", "run/work"),
        ("run", "data"),
        ("run", "data/index"),
        ("run", "corpus"),
    ],
)
def test_a_search_into_what_it_reads_or_what_another_job_writes_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, output: str, reranked: str | None
) -> None:
    before = everything(place)
    monkeypatch.chdir(place)  # one of the two names is relative
    keys = keys_for(place, place / output)
    if reranked is not None:
        keys |= {"search__rerank": True, "rerank__output": reranked}
    # The data set knows its corpus, which no setting need name.
    for more in ({"corpus__uri": str(place / "corpus")}, {}):
        for job in (search, plan_search):
            refused(lambda job=job, more=more: job(settings_for(**keys, **more)))
    assert everything(place) == before


@pytest.mark.parametrize("output", ["corpus", "corpus/reranked"])
def test_a_rerank_into_the_corpus_of_its_data_set_is_refused(place: Path, output: str) -> None:
    before = everything(place)
    keys = keys_for(place, place / "run", rerank__candidates=str(place / "queries.jsonl"))
    del keys["search__output"]
    for job in (rerank, plan_rerank):
        settings = settings_for(**keys, rerank__output=str(place / output))
        said = str(refused(lambda job=job, settings=settings: job(settings)))
        assert f"the corpus of output.uri {place / 'data'}" in said
        assert "choose another rerank.output" in said
    assert everything(place) == before


@pytest.mark.slow
def test_a_folder_that_another_job_has_claimed_is_refused(place: Path, tmp_path: Path) -> None:
    """Whatever the settings of this run say: the journals tell."""
    search(settings_for(**keys_for(place, tmp_path / "one")))
    elsewhere = tmp_path / "embedded"
    STORAGE.write(str(elsewhere / "_bge_ray.json"), (place / "data/_bge_ray.json").read_bytes())
    before = everything(tmp_path)
    found = refused(lambda: search(settings_for(**keys_for(place, elsewhere))))
    assert "another job's output (dataset)" in str(found)
    two = keys_for(place, tmp_path / "two", search__rerank=True, rerank__output=str(tmp_path / "one"))
    found = refused(lambda: search(settings_for(**two)))
    assert "another job's output (run)" in str(found)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    ["run.parquet", "run.trec", "rejected.parquet", "report.json", "reranked/run.parquet", "_bge_ray.json"],
)
def test_a_foreign_file_at_a_name_of_ours_is_refused_before_anything_is_written(
    place: Path, tmp_path: Path, name: str
) -> None:
    theirs = tmp_path / "run" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(FOREIGN)
    keys = keys_for(place, tmp_path / "run", search__rerank=True)
    assert str(theirs) in str(refused(lambda: search(settings_for(**keys))))
    assert everything(tmp_path) == {theirs: FOREIGN}


@pytest.mark.slow
def test_no_report_vouches_for_the_files_of_another_run(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    a = settings_for(**keys_for(place, run, search__tag="a"))
    b = settings_for(**keys_for(place, run, search__tag="b"))
    search(a)
    first, vouching = ranked(run), (run / "report.json").read_bytes()

    # B is stopped as it begins: A's files are whole, but B's report says that the folder is not A's.
    stop = StopRequest()
    with stop.deferred():
        stop(signal.SIGTERM)
    with pytest.raises(Stopped):
        search(b, stop)
    told = json.loads((run / "report.json").read_text()) if (run / "report.json").exists() else {}
    assert not told.get("complete", False)
    assert search(a).outcome == "complete"
    assert ranked(run) == first

    # B ends between its files and its report, as a killed process does.
    search(b)
    (run / "report.json").unlink()
    assert {tag for *_, tag in ranked(run)} == {"b"}
    assert search(a).outcome == "complete"
    assert ranked(run) == first

    # And were A's report still there, it would not be believed.
    search(b)
    (run / "report.json").write_bytes(vouching)
    assert search(a).outcome == "complete"
    assert ranked(run) == first
    assert search(a).outcome == "nothing to do"


@pytest.mark.slow
def test_a_search_and_a_rerank_job_do_not_share_a_folder(place: Path, tmp_path: Path) -> None:
    """The report of one would vouch for files of the other."""
    run = tmp_path / "run"
    keys = keys_for(place, run, search__rerank=True)
    search(settings_for(**keys))
    other = keys_for(place, run, rerank__candidates=str(run), rerank__output=str(run / "reranked"))
    del other["search__output"]
    before = everything(tmp_path)
    assert "reranked search" in str(refused(lambda: rerank(settings_for(**other))))
    assert everything(tmp_path) == before

    other["rerank__output"] = str(tmp_path / "apart")
    rerank(settings_for(**other))
    before = everything(tmp_path)
    keys["rerank__output"] = str(tmp_path / "apart")
    refused(lambda: search(settings_for(**keys)))
    assert everything(tmp_path) == before


@pytest.mark.slow
def test_a_search_without_reranking_leaves_no_reranked_run_of_an_earlier_one(
    place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    search(settings_for(**keys_for(place, run, search__rerank=True)))
    theirs = run / "reranked/notes.txt"
    theirs.write_bytes(FOREIGN)
    search(settings_for(**keys_for(place, run)))
    assert len(ranked(run)) == QUERIES * K
    assert not (run / "reranked/run.parquet").exists()
    assert not (run / "reranked/run.trec").exists()
    assert theirs.read_bytes() == FOREIGN


@pytest.mark.slow
def test_pairs_that_got_no_score_are_counted_and_too_many_fail_the_search(
    place: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """An object is gone, and a run has planned without it and not ended: its vectors are there, no texts."""
    passages = docstrings(PASSAGES)[:PASSAGES]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(2):
        (corpus / f"{number}.jsonl").write_bytes(jsonl_bytes(passages[number::2]))
    keys = {"corpus__uri": str(corpus), "output__uri": str(tmp_path / "data"), "model__name": str(tiny_model)}
    embedding = settings_for(**keys)
    embed(embedding)
    manifest = (tmp_path / "data/manifest.json").read_bytes()
    (corpus / "1.jsonl").unlink()
    embed(embedding)
    (tmp_path / "data/manifest.json").write_bytes(manifest)

    asked = keys_for(place, tmp_path / "run", output__uri=str(tmp_path / "data"), search__rerank=True)
    with pytest.raises(RejectedRowsError, match=r"rerank\.max_rejected_fraction") as caught:
        search(settings_for(**asked))
    assert caught.value.exit_code == 2
    assert "unknown_passage" in str(caught.value)
    gone = {p["id"] for p in passages[1::2]}
    candidates = {(r["query_id"], r["passage_id"]) for r in read_run(str(tmp_path / "run"))}
    lost = {pair for pair in candidates if pair[1] in gone}
    scored = {(r["query_id"], r["passage_id"]) for r in read_run(str(tmp_path / "run/reranked"))}
    assert lost
    assert scored == candidates - lost
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["scoring"]["pairs_rejected"] == len(lost)
    assert report["scoring"]["pairs_out"] == len(scored)
    allowed = search(settings_for(**asked, rerank__max_rejected_fraction=1.0))
    assert allowed.scoring.pairs_rejected == len(lost)


@pytest.mark.slow
def test_a_search_leaves_no_empty_folder_on_a_local_disk(place: Path, tmp_path: Path) -> None:
    search(settings_for(**keys_for(place, tmp_path / "run", search__rerank=True)))
    empty = [path for path in tmp_path.rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert empty == []
    assert not (tmp_path / "run/work").exists()
    assert not (tmp_path / "run/reranked/work").exists()
