"""Searches by every output of a tiny m3 on a real Ray: truth is brute force, and FlagEmbedding."""

import itertools
import math
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bge_ray
from bge_ray.errors import RejectedRowsError, SettingsError
from bge_ray.index.scores import colbert_scores, dense_scores, sparse_scores, weighted_scores
from bge_ray.model.feed.texts import load_tokenizer
from bge_ray.model.spec import text_feeder
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.index.job import build_index
from bge_ray.pipeline.mine.job import mine
from bge_ray.pipeline.search.job import search
from bge_ray.records.arrays import dense_rows, multi_rows, sparse_rows
from tests.model.conftest import load, resolve, run
from tests.support.corpora import docstrings, mixed_objects
from tests.support.datasets import read_shards
from tests.support.models import make_cross_encoder, make_encoder, make_m3
from tests.support.s3 import S3Server
from tests.support.searches import (
    STORAGE,
    assert_same_ranking,
    by_query,
    jsonl,
    read_rejected,
    read_run,
    settings_for,
    upload,
)
from tests.support.slow import slow_but

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(900)]

OUTPUTS = ["embedding", "sparse", "colbert", "bm25"]
PASSAGES = 160
K = 12
Scored = dict[str, dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of so many dimensions that what half precision rounds off evens out, as it does in bge-m3."""
    return make_m3(tmp_path_factory.mktemp("models") / "tiny-m3", dim=256, pickled=True)


@pytest.fixture(scope="module")
def passages() -> dict[str, str]:
    """Texts as a model reads them, by passage id."""
    return {p["id"]: f"{p['title']} {p['text']}" for p in docstrings(PASSAGES)}


@pytest.fixture(scope="module")
def queries() -> dict[str, str]:
    made = docstrings(PASSAGES)
    asked = {f"q{i}": f"how to {p['title']} with {i}" for i, p in enumerate(made[::16])}
    return asked | {"twice": "the name the name of the module", "letters": "x y"}


@pytest.fixture(scope="module")
def corpus(s3_server: S3Server, queries: dict[str, str]) -> str:
    """Corpus and queries."""
    root = f"s3://out/hybrid-{secrets.token_hex(4)}"
    upload(f"{root}/corpus", mixed_objects(docstrings(PASSAGES)))
    upload(root, {"queries.jsonl": jsonl([{"_id": name, "text": text} for name, text in queries.items()])})
    return root


@pytest.fixture(scope="module")
def root(corpus: str, ray_cluster: None, m3: Path) -> str:
    """Beside them a data set with all outputs."""
    keys = {"corpus__uri": f"{corpus}/corpus", "output__uri": f"{corpus}/data", "model__name": str(m3)}
    embed(settings_for(**keys, model__outputs=OUTPUTS, batching__unit_rows=24))
    return corpus


@pytest.fixture(scope="module")
def scored(root: str, m3: Path, queries: dict[str, str]) -> Scored:
    """Scores of every query with every passage, by output: of what is stored, one by one."""
    table = read_shards(f"{root}/data").sort_by("vector_id")
    names = table["passage_id"].to_pylist()
    spec = resolve(m3, outputs=("embedding", "sparse", "colbert")).stored_as("float32")
    asked = pa.table(run(load(spec), text_feeder(spec).queries(list(queries.values()))).columns())
    dense, sparse = dense_rows(table["embedding"]), sparse_rows(table["sparse"])
    colbert = multi_rows(table["colbert"], "float16")
    found: Scored = {}
    for number, name in enumerate(queries):
        row = asked.slice(number, 1)
        scores = {
            "embedding": dense_scores(dense_rows(row["embedding"])[0], dense),
            "sparse": sparse_scores(sparse_rows(row["sparse"]), sparse),
            "colbert": colbert_scores(multi_rows(row["colbert"], "float32").vectors, colbert),
            "bm25": bm25(m3, table["bm25"].to_pylist(), queries[name]),
        }
        found[name] = {output: dict(zip(names, map(float, of), strict=True)) for output, of in scores.items()}
    return found


def bm25(
    model: Path, stored: list[dict[str, list[Any]]], query: str, k1: float = 1.2, b: float = 0.75
) -> list[float]:
    """The formula, over what is stored of passages and what transformers makes of the query."""
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    special = set(tokenizer.all_special_ids)
    counts = [dict(zip(row["indices"], row["values"], strict=True)) for row in stored]
    mean = sum(sum(row.values()) for row in counts) / len(counts)
    scores = [0.0] * len(counts)
    for token in tokenizer(query)["input_ids"]:
        having = sum(token in row for row in counts)
        idf = math.log(1 + (len(counts) - having + 0.5) / (having + 0.5))
        for place, row in enumerate(counts):
            if token in row and token not in special:
                norm = k1 * (1 - b + b * sum(row.values()) / mean)
                scores[place] += idf * row[token] / (row[token] + norm)
    return scores


def ranked(scores: dict[str, float], k: int) -> list[tuple[str, float]]:
    """The k best above nothing, ties by passage id."""
    rows = sorted(scores.items(), key=lambda pair: (-np.float32(pair[1]), pair[0]))
    return [(name, score) for name, score in rows if score > 0][:k]


def searched(root: str, bucket: str, name: str, **asked: object) -> list[dict[str, Any]]:
    keys = {"output__uri": f"{root}/data", "search__queries": f"{root}/queries.jsonl", "search__k": K}
    keys |= {"search__output": f"{bucket}/{name}", "search__unit_queries": 5}
    search(settings_for(**(keys | {f"search__{key}": value for key, value in asked.items()})))
    return read_run(f"{bucket}/{name}")


@pytest.mark.parametrize("stage", slow_but(["sparse"], ["sparse", "bm25"]))
def test_one_output_is_brute_force_over_what_is_stored(
    root: str, bucket: str, scored: Scored, stage: str
) -> None:
    found = by_query(rows := searched(root, bucket, stage, first_stage=stage))
    for name, outputs in scored.items():
        truth = ranked(outputs[stage], K)
        if not truth:
            assert (name, None, "no_result") in read_rejected(f"{bucket}/{stage}")
            continue
        assert_same_ranking(found[name], truth)
    assert "sparse_score" not in rows[0]  # where one output decides, its score is the run's


@pytest.mark.slow
def test_fused_by_ranks_and_by_scores(root: str, bucket: str, scored: Scored) -> None:
    depth = 30
    lists = {
        name: [ranked(outputs[o], depth) for o in ("embedding", "sparse", "bm25")]
        for name, outputs in scored.items()
    }
    for fusion, weights in (("rrf", None), ("minmax", [1, 0.5, 2])):
        more = {} if weights is None else {"hybrid_weights": weights, "hybrid": ["dense", "sparse", "bm25"]}
        rows = searched(root, bucket, fusion, first_stage="hybrid", fusion=fusion, candidates=depth, **more)
        found = by_query(rows)
        for name, of in lists.items():
            truth: dict[str, float] = {}
            for weight, pairs in zip(weights or [1, 1, 1], of, strict=True):
                for rank, (passage, score) in enumerate(pairs, 1):
                    low, high = pairs[-1][1], pairs[0][1]
                    gain = 1 / (60 + rank)
                    if fusion == "minmax":
                        gain = weight / 3.5 * ((score - low) / (high - low) if high > low else 1.0)
                    truth[passage] = truth.get(passage, 0.0) + gain
            best = sorted(truth.items(), key=lambda pair: (-pair[1], pair[0]))[:K]
            np.testing.assert_allclose([s for _, s in found[name]], [s for _, s in best], rtol=1e-4)
        # Each output's own score stands beside, where its list has the passage.
        for row in rows:
            for place, output in enumerate(("embedding", "sparse", "bm25")):
                pairs = dict(lists[row["query_id"]][place])
                value = row[f"{output}_score"]
                if value is not None:
                    truth_of = scored[row["query_id"]][output][row["passage_id"]]
                    assert value == pytest.approx(truth_of, rel=1e-4, abs=1e-5)
                elif row["passage_id"] in pairs:
                    assert pairs[row["passage_id"]] == pytest.approx(min(pairs.values()), abs=1e-5)
        assert any(row["sparse_score"] is None for row in rows)


@pytest.mark.parity
@pytest.mark.slow
def test_scored_again_as_flagembedding_scores_the_texts(
    root: str, bucket: str, m3: Path, passages: dict[str, str], queries: dict[str, str], scored: Scored
) -> None:
    from FlagEmbedding import BGEM3FlagModel

    weights = [0.4, 0.2, 0.4]
    outputs = ["embedding", "sparse", "colbert"]
    asked = {"first_stage": "hybrid", "hybrid": ["dense", "bm25"], "candidates": 40}
    rows = searched(root, bucket, "all", **asked, rescore_with=outputs, rescore_weights=weights)
    flag = BGEM3FlagModel(str(m3), use_fp16=False, devices="cpu")
    for name in list(queries)[:3]:
        mine = [row for row in rows if row["query_id"] == name]
        theirs = flag.compute_score(
            [(queries[name], passages[row["passage_id"]]) for row in mine],
            batch_size=1,
            max_query_length=128,
            max_passage_length=128,
            weights_for_different_modes=weights,
        )
        for column, key in (
            ("score", "colbert+sparse+dense"),
            ("embedding_score", "dense"),
            ("sparse_score", "sparse"),
            ("colbert_score", "colbert"),
        ):
            np.testing.assert_allclose([row[column] for row in mine], theirs[key], atol=1e-4, rtol=0)
    found = by_query(rows)
    for name, of in scored.items():
        # The best of all that either list holds.
        held = {p for o in ("embedding", "bm25") for p, _ in ranked(of[o], 40)}
        parts = [np.array([of[o][p] for p in sorted(held)], np.float32) for o in outputs]
        truth = dict(zip(sorted(held), weighted_scores(parts, weights).tolist(), strict=True))
        best = sorted(truth.items(), key=lambda pair: (-pair[1], pair[0]))[:K]
        np.testing.assert_allclose([s for _, s in found[name]], [s for _, s in best], atol=1e-5)
    assert {row["bm25_score"] is None for row in rows} == {True, False}
    assert all(row["fused_score"] > 0 for row in rows)


@pytest.mark.slow
def test_an_index_and_a_reranker_go_with_it_and_a_second_run_does_nothing(
    root: str, bucket: str, tmp_path: Path, scored: Scored
) -> None:
    build_index(settings_for(output__uri=f"{root}/data", index__factory="IVF4,Flat", index__num_queries=20))
    reranker = make_cross_encoder(tmp_path / "reranker")
    asked: dict[str, object] = {
        "output__uri": f"{root}/data",
        "corpus__uri": f"{root}/corpus",
        "search__queries": f"{root}/queries.jsonl",
        "search__output": f"{bucket}/run",
        "search__k": K,
        "search__first_stage": "hybrid",
        "search__hybrid": ["dense", "sparse"],
        "search__nprobe": 4,
        "search__rescore_with": ["colbert"],
        "search__rerank": True,
        "rerank__model": str(reranker),
    }
    report = search(settings_for(**asked))
    assert report.found_by == ("embedding", "sparse")
    assert report.way == "the IVF4,Flat index; the weights of tokens; fused by rrf; scored again by colbert"
    assert (report.queries_out, report.index.kind) == (len(scored), "ivf")
    first, again = read_run(f"{bucket}/run"), read_run(f"{bucket}/run/reranked")
    scores = {(row["query_id"], row["passage_id"]): row["colbert_score"] for row in first}
    assert {(row["query_id"], row["passage_id"]): row["colbert_score"] for row in again} == scores
    for row in first:
        assert row["score"] == pytest.approx(scored[row["query_id"]]["colbert"][row["passage_id"]], abs=1e-4)
    assert search(settings_for(**asked)).outcome == "nothing to do"
    assert search(settings_for(**(asked | {"search__rrf_k": 10}))).outcome != "nothing to do"
    with pytest.raises(SettingsError, match="mined by vectors alone"):
        mine(settings_for(**asked, mine__output=f"{bucket}/mined", mine__input=f"{root}/queries.jsonl"))


@pytest.mark.slow
def test_chunks_fall_together_to_distinct_passages(corpus: str, bucket: str, m3: Path) -> None:
    data = f"{bucket}/data"
    keys = {"corpus__uri": f"{corpus}/corpus", "output__uri": data, "model__name": str(m3)}
    embed(settings_for(**keys, model__outputs=OUTPUTS, chunking__max_tokens=40))
    table = read_shards(data).sort_by("vector_id")
    names = table["passage_id"].to_pylist()
    assert len(table) > PASSAGES
    chunks = set(zip(names, table["chunk_no"].to_pylist(), strict=True))
    asked = {"output__uri": data, "search__queries": f"{corpus}/queries.jsonl", "search__k": K}
    several = {"search__candidates": 20, "search__rescore_with": ["sparse", "colbert"]}
    for stage, more in (("bm25", {}), ("hybrid", several)):
        output = f"{bucket}/{stage}"
        search(settings_for(**asked, **more, search__output=output, search__first_stage=stage))
        rows = pq.read_table(pa.BufferReader(STORAGE.read(f"{output}/run.parquet"))).to_pylist()
        assert {(row["passage_id"], row["chunk_no"]) for row in rows} <= chunks
        for _, results in itertools.groupby(rows, key=lambda row: row["query_id"]):
            found = [row["passage_id"] for row in results]
            assert len(set(found)) == len(found) <= K
        if stage == "bm25":
            best: dict[str, float] = {}
            scores = bm25(m3, table["bm25"].to_pylist(), "the name the name of the module")
            for name, score in zip(names, scores, strict=True):
                best[name] = max(best.get(name, 0.0), score)
            twice = [(row["passage_id"], row["score"]) for row in rows if row["query_id"] == "twice"]
            assert_same_ranking(twice, ranked(best, K))


@pytest.mark.slow
def test_bm25_alone_takes_no_model(
    corpus: str, bucket: str, tmp_path: Path, queries: dict[str, str], passages: dict[str, str]
) -> None:
    """The tokenizer of a folder without weights, and a query of which nothing is known."""
    folder = make_encoder(tmp_path / "tokenizer")
    (folder / "model.safetensors").unlink()
    data = f"{bucket}/data"
    keys = {"corpus__uri": f"{corpus}/corpus", "output__uri": data, "model__name": str(folder)}
    report = embed(settings_for(**keys, model__outputs=["bm25"])).report
    assert (report.rows_out, report.truncated) == (PASSAGES, 0)
    asked = {
        "output__uri": data,
        "search__queries": f"{corpus}/queries.jsonl",
        "search__output": f"{bucket}/run",
    }
    searched = search(settings_for(**asked, search__k=K, search__first_stage="bm25", search__bm25_b=0.4))
    assert "encoders" not in searched.workers
    table = read_shards(data).sort_by("vector_id")
    # Who reads it from Python has the counts, and no vectors.
    reader = bge_ray.open_dataset(data)
    batches = list(reader.batches(["bm25"]))
    assert (reader.dim, batches[0].vectors.shape) == (0, (len(batches[0]), 0))
    read = [counts for batch in batches for counts in batch.metadata["bm25"].to_pylist()]
    assert read == table["bm25"].to_pylist()
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    for row in table.select(["passage_id", "bm25"]).to_pylist():
        ids = tokenizer(passages[row["passage_id"]], add_special_tokens=False)["input_ids"]
        counts = dict(zip(row["bm25"]["indices"], row["bm25"]["values"], strict=True))
        assert counts == Counter(i for i in ids if i not in tokenizer.all_special_ids)
    first = batches[0]
    assert reader.rows(first.vector_ids[:2]).passage_ids.to_pylist() == first.passage_ids.to_pylist()[:2]
    found = by_query(read_run(f"{bucket}/run"))
    for name, text in queries.items():
        scores = bm25(folder, table["bm25"].to_pylist(), text, b=0.4)
        truth = ranked(dict(zip(table["passage_id"].to_pylist(), scores, strict=True)), K)
        assert name in found or not truth
        if truth:
            assert_same_ranking(found[name], truth)
    with pytest.raises(SettingsError, match="BM25 counts the words of a query"):
        search(settings_for(**asked, search__first_stage="bm25", model__query_instruction="find: "))
    upload(bucket, {"odd.jsonl": jsonl([{"_id": "odd", "text": "🙂🙃"}])})
    asked |= {"search__queries": f"{bucket}/odd.jsonl", "search__output": f"{bucket}/odd"}
    with pytest.raises(RejectedRowsError, match="no_result 1"):
        search(settings_for(**asked, search__first_stage="bm25"))
