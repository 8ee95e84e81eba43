"""A search over a data set of chunks, and a rerank of it, as jobs on a real Ray."""

import functools
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from bge_ray.errors import SettingsError
from bge_ray.evaluate import evaluate
from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, pair_feeder, resolve_reranker
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.index.job import build_index
from bge_ray.pipeline.index.published import read_index
from bge_ray.pipeline.rerank.job import rerank
from bge_ray.pipeline.search.job import search
from bge_ray.records.model import SCORE
from bge_ray.settings.sections import RerankSettings
from tests.support.models import make_cross_encoder
from tests.support.searches import STORAGE, jsonl, query_vectors, settings_for, upload

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

WORDS = ("the quick brown fox", "jumps over", "lazy dog", "a corpus in", "object storage", "embeddings")
QUESTIONS = {"q1": "the quick fox", "q2": "object storage", "q3": "lazy dog embeddings"}
K = 8
SPAN = ["chunk_no", "start", "end"]


def make_texts() -> dict[str, str]:
    """12 long texts, 30 short ones, and one that is left out."""
    rng = np.random.default_rng(3)

    def text(sentences: int) -> str:
        return " ".join(" ".join(rng.choice(WORDS, 9)) + "." for _ in range(sentences))

    return {f"long{i}": text(40) for i in range(12)} | {f"short{i}": text(1) for i in range(30)} | {"bad": ""}


def stored(root: str) -> dict[str, np.ndarray]:
    """Columns of all shards."""
    sql = f"select * from '{root}/embeddings/*.parquet' order by vector_id"
    return duckdb.sql(sql).fetchnumpy()


# What two ways of adding up a score may differ by, twice.
ROUNDING = 4e-6


def brute(root: str, questions: np.ndarray, group: str, k: int) -> list[list[tuple[str, int, float]]]:
    """(passage id, vector id, score) of the k best by numpy over all chunks."""
    table = stored(root)
    matrix = np.stack([np.asarray(row, np.float64) for row in table["embedding"]])
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    found = []
    for question in questions:
        scores = (matrix * question.astype(np.float64)).sum(axis=1).astype(np.float32)
        best: dict[object, tuple[str, int, float]] = {}
        for i in np.lexsort((table["vector_id"], table["passage_id"], -scores)):
            name, vector_id = str(table["passage_id"][i]), int(table["vector_id"][i])
            key = name if group == "passage" else vector_id
            best.setdefault(key, (name, vector_id, float(scores[i])))
        found.append(list(best.values())[:k])
    return found


def pairs(folder: str) -> list[list[tuple[str, int]]]:
    """(passage id, vector id) by query of run.parquet, in the order of its ranks, read by DuckDB."""
    rows = duckdb.sql(f"select query_id, rank, passage_id, vector_id from '{folder}/run.parquet'").fetchall()
    return [[row[2:] for row in sorted(rows) if row[0] == name] for name in QUESTIONS]


def check_best(folder: str, truth: list[list[tuple[str, int, float]]]) -> None:
    """A run has the scores of the best, and their places but for those that tie with what lies beyond."""
    rows = duckdb.sql(f"select query_id, rank, passage_id, vector_id, score from '{folder}/run.parquet'")
    found = sorted(rows.fetchall())
    for name, best in zip(QUESTIONS, truth, strict=True):
        ours = [row[2:] for row in found if row[0] == name]
        np.testing.assert_allclose([r[2] for r in ours], [r[2] for r in best], atol=2e-6, rtol=0)
        clear = best[-1][2] + ROUNDING
        assert {r[:2] for r in ours if r[2] > clear} == {r[:2] for r in best if r[2] > clear}


def test_runs_name_passages_and_the_chunks_that_found_them(tmp_path: Path, tiny_model: Path) -> None:
    texts, root = make_texts(), str(tmp_path / "data")
    upload(str(tmp_path), {"corpus/x.jsonl": jsonl([{"id": k, "text": v} for k, v in texts.items()])})
    upload(str(tmp_path), {"q.jsonl": jsonl([{"_id": k, "text": v} for k, v in QUESTIONS.items()])})
    keys = {"output__uri": root, "model__name": str(tiny_model), "corpus__uri": f"{tmp_path}/corpus"}
    embed(settings_for(**keys, chunking__max_tokens=24, corpus__max_rejected_fraction=0.1))
    questions = query_vectors(tiny_model, list(QUESTIONS.values()))
    asked = keys | {"search__queries": f"{tmp_path}/q.jsonl", "search__k": K}
    cross_encoder = str(make_cross_encoder(tmp_path / "reranker", positions=128))
    reranker = {"rerank__model": cross_encoder, "rerank__max_length": 96}

    def run(name: str, **more: object) -> str:
        search(settings_for(**asked, search__output=f"{tmp_path}/{name}", **more))
        return f"{tmp_path}/{name}"

    # Exactly, by passages and by chunks.
    passages = run("exact", search__exact=True)
    truth = brute(root, questions, "passage", K)
    check_best(passages, truth)
    chunks = run("chunks", search__exact=True, search__group="chunk")
    check_best(chunks, brute(root, questions, "chunk", K))
    assert any(len({name for name, _ in rows}) < K for rows in pairs(chunks))
    # By an index that was tuned for passages, to miss none.
    index = build_index(settings_for(**asked, index__factory="IVF4,SQ8", index__recall_target=1.0))
    assert index.results == "passages"
    assert read_index(STORAGE, root) == index
    by_index = run("index", search__rescore=60)
    check_best(by_index, truth)
    # The text of a result is the characters of the corpus that its columns name.
    table = pq.read_table(f"{chunks}/run.parquet")
    assert table.column_names == ["query_id", "passage_id", "rank", "score", "tag", "vector_id", *SPAN]
    columns = stored(root)
    spans = zip(*(columns[name].tolist() for name in SPAN), strict=True)
    places = dict(zip(columns["vector_id"].tolist(), spans, strict=True))
    for row in table.to_pylist():
        assert tuple(row[name] for name in SPAN) == places[row["vector_id"]]
    # A TREC run has passages, each once and ranked without a gap; evaluation counts them.
    for folder in (passages, chunks):
        lines = [line.split() for line in STORAGE.read(f"{folder}/run.trec").decode().splitlines()]
        for name, found in zip(QUESTIONS, pairs(folder), strict=True):
            mine = [line for line in lines if line[0] == name]
            assert [line[2] for line in mine] == list(dict.fromkeys(passage_id for passage_id, _ in found))
            assert [int(line[3]) for line in mine] == list(range(1, len(mine) + 1))
    relevant = {name: found[0][0] for name, found in zip(QUESTIONS, truth, strict=True)}
    qrels = "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{p}\t1\n" for q, p in relevant.items())
    STORAGE.write(f"{tmp_path}/qrels.tsv", qrels.encode())
    runs = [passages, chunks, f"{chunks}/run.trec"]
    metrics = evaluate(
        settings_for(evaluate__run=runs, evaluate__qrels=f"{tmp_path}/qrels.tsv", evaluate__k=[K])
    )
    assert metrics["runs"][0]["mean"][f"recall@{K}"] == 1
    assert metrics["runs"][1]["left_out"] == {}
    assert metrics["runs"][1]["mean"] == metrics["runs"][2]["mean"]

    # A rerank scores the chunk that was found, or all of the passage; also of an older run, or a TREC run.
    def reranked(name: str, candidates: str, **more: object) -> list[dict[str, object]]:
        keys = {"rerank__candidates": candidates, "rerank__output": f"{tmp_path}/{name}", **reranker}
        rerank(settings_for(**asked, **keys, **more))
        return pq.read_table(f"{tmp_path}/{name}/run.parquet").to_pylist()

    def expected(row: dict[str, object], *, whole: bool) -> float:
        text = texts[str(row["passage_id"])]
        read = text if whole else text[row["start"] : row["end"]]
        return score_here(cross_encoder, QUESTIONS[str(row["query_id"])], read)

    table = pq.read_table(f"{passages}/run.parquet")
    pq.write_table(table.drop_columns(SPAN), tmp_path / "old.parquet")
    for name, candidates, more, whole, named in (
        ("a", passages, {}, False, True),
        ("b", passages, {"rerank__reads": "passage"}, True, True),
        ("c", str(tmp_path / "old.parquet"), {}, True, False),
        ("d", f"{passages}/run.trec", {}, True, False),
        ("e", chunks, {}, False, True),
    ):
        rows = reranked(name, candidates, **more)
        assert len(rows) == K * len(QUESTIONS)
        for row in rows:
            assert row["score"] == pytest.approx(expected(row, whole=whole), abs=1e-4)
            assert (row["start"] is not None) == named
    assert sorted(map(str, pairs(f"{tmp_path}/e"))) != sorted(map(str, pairs(f"{tmp_path}/a")))
    # In one job with the search the same, but for scores whose last bits change places.
    together = run("both", search__exact=True, search__rerank=True, **reranker)
    alone = [sorted(found) for found in pairs(f"{tmp_path}/a")]
    assert [sorted(found) for found in pairs(f"{together}/reranked")] == alone
    with pytest.raises(SettingsError, match=r"search.group chunk: a rerank of whole passages"):
        run("none", search__rerank=True, search__group="chunk", rerank__reads="passage", **reranker)


@functools.cache
def reranker_here(folder: str) -> tuple[Model, PairFeeder]:
    spec = resolve_reranker(RerankSettings(model=folder, max_length=96), on_gpu=False)
    return Model(spec, model_folder(spec), Place()), pair_feeder(spec)


def score_here(folder: str, query: str, text: str) -> float:
    model, feeder = reranker_here(folder)
    rows = feeder.pairs([query], [text])
    result = model.empty_result(1)
    model.run(rows, model.cut(rows.lengths, 1024), result)
    return float(result.array(SCORE)[0])
