"""Real kills: of an index actor, a rerank actor and the driver, in turn; no query is lost or doubled."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bge_ray.storage.objects import join
from tests.support.corpora import docstrings, mixed_objects
from tests.support.models import make_cross_encoder, make_m3
from tests.support.runs import JobProcess, wait_until
from tests.support.searches import STORAGE, by_query, jsonl, read_rejected, read_run, upload

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

QUERIES = 1200


def passages() -> list[dict[str, str]]:
    """Real texts, every second of which is odd."""
    return [p | {"half": ("even", "odd")[n % 2]} for n, p in enumerate(docstrings(2000))]


def prepare(
    bucket: str,
    model: Path,
    log: Path,
    factory: str = "IVF16,SQ8",
    outputs: str = "embedding",
    kept: str = "[]",
) -> list[str]:
    """Embed and index real passages, and store queries; returns the query ids."""
    upload(f"{bucket}/corpus", mixed_objects(passages()))
    keys: dict[str, object] = {"corpus.uri": f"{bucket}/corpus", "output.uri": f"{bucket}/data"}
    keys |= {"model.name": model, "model.outputs": outputs, "corpus.keep_columns": kept}
    assert JobProcess(log, keys).wait() == 0, log.read_text()
    index: dict[str, object] = {"output.uri": f"{bucket}/data", "index.factory": factory}
    assert JobProcess(log, index, job="index").wait() == 0, log.read_text()
    records = [{"_id": f"q{i}", "text": p["title"] + f" {i}"} for i, p in enumerate(passages()[:QUERIES])]
    upload(bucket, {"queries.jsonl": jsonl(records)})
    return [record["_id"] for record in records]


def parts(folder: str) -> int:
    return len(STORAGE.list_files(join(folder, "work", "parts")))


def after_more_parts(folder: str, count: int) -> None:
    before = parts(folder)
    wait_until(lambda: parts(folder) >= before + count)


def check(folder: str, queries: list[str], depth: int) -> list[dict[str, object]]:
    rows = read_run(folder)
    found = by_query(rows)
    assert list(found) == queries
    assert {len(pairs) for pairs in found.values()} == {depth}
    assert read_rejected(folder) == []
    return rows


def search_keys(bucket: str, name: str) -> dict[str, object]:
    return {
        "output.uri": f"{bucket}/data",
        "search.queries": f"{bucket}/queries.jsonl",
        "search.output": f"{bucket}/{name}",
        "search.k": 10,
        "search.unit_queries": 20,
    }


def test_search_survives_the_kill_of_an_index_actor_and_of_the_driver(
    bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    queries = prepare(bucket, tiny_model, tmp_path / "log")
    keys, folder, log = search_keys(bucket, "run"), f"{bucket}/run", tmp_path / "search"
    run = JobProcess(log, keys, job="search")
    after_more_parts(folder, 3)
    kill_actor(run, "Searcher")
    after_more_parts(folder, 3)
    kill_actor(run, "ModelStage")
    after_more_parts(folder, 3)
    run.kill()
    there = parts(folder)
    assert there >= 9
    assert STORAGE.info(join(folder, "run.parquet")) is None
    run = JobProcess(log, keys, job="search")
    assert run.wait() == 0, run.log()
    assert f"{QUERIES - 20 * there:,} queries to answer" in run.log()  # what was done is not done again
    rows = check(folder, queries, 10)
    calm = search_keys(bucket, "calm")
    assert JobProcess(log, calm, job="search").wait() == 0, log.read_text()
    assert read_run(f"{bucket}/calm") == rows


def test_a_hybrid_filtered_reranked_search_survives_the_kill_of_each_of_its_actors_and_of_the_driver(
    bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    queries = prepare(bucket, tiny_model, tmp_path / "log", outputs="[embedding, bm25]", kept="[half]")
    model = make_cross_encoder(tmp_path / "ce", positions=128)
    several = {"search.first_stage": "hybrid", "search.rescore_with": "embedding", "search.candidates": 20}
    several |= {"search.filter": "half = 'odd'", "search.rescore": 40}
    several |= {"search.num_searchers": 2, "search.replicas": 2, "resources.num_encoders": 1}
    several |= {"search.rerank": "true", "rerank.model": model, "rerank.unit_pairs": 200}
    keys, folder, log = search_keys(bucket, "run") | several, f"{bucket}/run", tmp_path / "search"
    run = JobProcess(log, keys, job="search")
    for name in ("ListSearcher", "::Searcher", "RowHolder"):
        after_more_parts(folder, 3)
        kill_actor(run, name)
    after_more_parts(folder, 3)
    models = run.actors("ModelStage")
    assert len(models) >= 2  # of queries and of pairs
    for model_stage in models:
        model_stage.kill()
        after_more_parts(folder, 2)
    run.kill()
    there = parts(folder)
    assert STORAGE.info(join(folder, "run.parquet")) is None
    run = JobProcess(log, keys, job="search")
    assert run.wait() == 0, run.log()
    assert f"{QUERIES - 20 * there:,} queries to answer" in run.log()
    rows, reranked = check(folder, queries, 10), read_run(join(folder, "reranked"))
    assert {(row["query_id"], row["passage_id"]) for row in reranked} == {
        (row["query_id"], row["passage_id"]) for row in rows
    }
    assert len(reranked) == len(rows)
    odd = {p["id"] for p in passages() if p["half"] == "odd"}
    assert {row["passage_id"] for row in rows} <= odd
    assert JobProcess(log, search_keys(bucket, "calm") | several, job="search").wait() == 0, log.read_text()
    assert read_run(f"{bucket}/calm") == rows
    assert same_scores(read_run(f"{bucket}/calm/reranked"), reranked)


def test_an_approximate_search_of_weights_survives_the_kill_of_a_searcher_and_of_the_driver(
    bucket: str, tmp_path: Path
) -> None:
    model = make_m3(tmp_path / "m3", dim=64, pickled=True)
    queries = prepare(bucket, model, tmp_path / "log", outputs="[embedding, sparse]")
    exact = search_keys(bucket, "exact") | {"search.first_stage": "sparse", "search.num_searchers": 2}
    asked = exact | {"search.sparse": "approximate", "search.output": f"{bucket}/run"}
    folder, log = f"{bucket}/run", tmp_path / "search"
    run = JobProcess(log, asked, job="search")
    after_more_parts(folder, 3)
    for searcher in run.actors("ListSearcher"):  # one after the other: a new one makes its index anew
        searcher.kill()
        after_more_parts(folder, 3)
    run.kill()
    there = parts(folder)
    run = JobProcess(log, asked, job="search")
    assert run.wait() == 0, run.log()
    assert f"{QUERIES - 20 * there:,} queries to answer" in run.log()
    rows = read_run(folder)
    rejected = {query_id: reason for query_id, _, reason in read_rejected(folder)}
    assert set(rejected.values()) <= {"no_result"}  # of a query without a token that weighs anything
    assert [name for name in queries if name not in rejected] == list(by_query(rows))
    report = json.loads(STORAGE.read(join(folder, "report.json")))
    assert report["sparse"]["taken"] is True
    assert JobProcess(log, exact, job="search").wait() == 0, log.read_text()
    truth = {(row["query_id"], row["passage_id"]): row["score"] for row in read_run(f"{bucket}/exact")}
    found = {(row["query_id"], row["passage_id"]): row["score"] for row in rows}
    both = truth.keys() & found.keys()
    assert len(both) >= report["sparse"]["target"] * len(truth)
    assert all(truth[pair] == found[pair] for pair in both)  # bit for bit


def test_an_exact_search_that_hands_over_what_it_read_survives_kills_of_those_it_hands_to(
    bucket: str, tmp_path: Path
) -> None:
    """Who scores again, and looks texts up, holds what the searchers read, or reads it after a kill."""
    outputs = make_m3(tmp_path / "m3", dim=64, pickled=True)
    queries = prepare(bucket, outputs, tmp_path / "log", outputs="[embedding, sparse]", kept="[title, text]")
    several = {"search.exact": "true", "search.rescore_with": "[embedding, sparse]", "search.candidates": 20}
    several |= {"search.num_searchers": 2, "resources.num_encoders": 1, "search.unit_queries": 100}
    several |= {"search.rerank": "true", "rerank.unit_pairs": 200}
    several |= {"rerank.model": make_cross_encoder(tmp_path / "ce", positions=128)}
    keys, folder, log = search_keys(bucket, "run") | several, f"{bucket}/run", tmp_path / "search"
    run = JobProcess(log, keys, job="search")
    kill_actor(run, "RowHolder")  # while searchers hand over, or before they do
    kill_actor(run, "ShardSearcher")
    for name in ("RowHolder", "ShardSearcher", "RowHolder"):
        after_more_parts(folder, 1)
        kill_actor(run, name)
    run.kill()
    there = parts(folder)
    assert STORAGE.info(join(folder, "run.parquet")) is None
    run = JobProcess(log, keys, job="search")
    assert run.wait() == 0, run.log()
    rows, reranked = read_run(folder), read_run(join(folder, "reranked"))
    rejected = {query_id for query_id, _, reason in read_rejected(folder)}
    assert list(by_query(rows)) == [name for name in queries if name not in rejected]
    assert there > 0
    calm = search_keys(bucket, "calm") | several
    assert JobProcess(log, calm, job="search").wait() == 0, log.read_text()
    assert read_run(f"{bucket}/calm") == rows
    assert same_scores(read_run(f"{bucket}/calm/reranked"), reranked)


def test_rerank_survives_the_kill_of_a_reranker_and_of_the_driver(
    bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    queries = prepare(bucket, tiny_model, tmp_path / "log", "Flat")
    log = tmp_path / "rerank"
    assert JobProcess(log, search_keys(bucket, "first"), job="search").wait() == 0, log.read_text()
    model = make_cross_encoder(tmp_path / "ce", positions=128)
    folder = f"{bucket}/reranked"
    keys: dict[str, object] = {
        "output.uri": f"{bucket}/data",
        "search.queries": f"{bucket}/queries.jsonl",
        "rerank.candidates": f"{bucket}/first",
        "rerank.output": folder,
        "rerank.model": model,
        "rerank.unit_pairs": 100,
        "rerank.join_pairs": 1000,
    }
    run = JobProcess(log, keys, job="rerank")
    after_more_parts(folder, 3)
    kill_actor(run, "ModelStage")
    after_more_parts(folder, 3)
    run.kill()
    there = parts(folder)
    assert there >= 6
    run = JobProcess(log, keys, job="rerank")
    assert run.wait() == 0, run.log()
    assert f"{QUERIES * 10 - 100 * there:,} pairs to score" in run.log()
    rows = check(folder, queries, 10)
    assert JobProcess(log, keys | {"rerank.output": f"{bucket}/calm"}, job="rerank").wait() == 0
    calm = read_run(f"{bucket}/calm")
    assert same_scores(rows, calm)


def same_scores(rows: list[dict[str, object]], others: list[dict[str, object]]) -> bool:
    """Whether two runs have the same passages; the scores of a reranker go by what was in its batch."""
    pairs = [[(r["query_id"], r["passage_id"]) for r in run] for run in (rows, others)]
    apart = [abs(a["score"] - b["score"]) for a, b in zip(rows, others, strict=True)]
    return pairs[0] == pairs[1] and max(apart) < 1e-5


def kill_actor(run: JobProcess, name: str) -> None:
    """Kill one actor of a class; the job must still be at work."""
    found: Callable[[], list[object]] = lambda: run.actors(name)  # noqa: E731
    wait_until(lambda: bool(found()))
    run.actors(name)[0].kill()
    assert run.process.poll() is None, "the job had ended before the kill"
