"""A search over a data set of chunks, and a rerank of it, as jobs on a real Ray."""

import functools
from dataclasses import dataclass
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


TEXTS = make_texts()


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


@dataclass(frozen=True)
class Made:
    """A data set of chunks, with its questions, a reranker, and two exact runs: by passages and by chunks."""

    folder: Path
    model: Path
    cross_encoder: str
    passages: str
    chunks: str

    @property
    def root(self) -> str:
        return f"{self.folder}/data"

    @property
    def asked(self) -> dict[str, object]:
        keys = {"output__uri": self.root, "model__name": str(self.model)}
        keys |= {"corpus__uri": f"{self.folder}/corpus", "search__queries": f"{self.folder}/q.jsonl"}
        return keys | {"search__k": K}

    @property
    def reranker(self) -> dict[str, object]:
        return {"rerank__model": self.cross_encoder, "rerank__max_length": 96}

    def run(self, name: str, **more: object) -> str:
        search(settings_for(**self.asked, search__output=f"{self.folder}/{name}", **more))
        return f"{self.folder}/{name}"

    def reranked(self, name: str, candidates: str, **more: object) -> list[dict[str, object]]:
        keys = {"rerank__candidates": candidates, "rerank__output": f"{self.folder}/{name}", **self.reranker}
        rerank(settings_for(**self.asked, **keys, **more))
        return pq.read_table(f"{self.folder}/{name}/run.parquet").to_pylist()

    def expected(self, row: dict[str, object], *, whole: bool) -> float:
        text = TEXTS[str(row["passage_id"])]
        read = text if whole else text[row["start"] : row["end"]]
        return score_here(self.cross_encoder, QUESTIONS[str(row["query_id"])], read)


@pytest.fixture(scope="module")
def made(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("chunks")
    upload(str(folder), {"corpus/x.jsonl": jsonl([{"id": k, "text": v} for k, v in TEXTS.items()])})
    upload(str(folder), {"q.jsonl": jsonl([{"_id": k, "text": v} for k, v in QUESTIONS.items()])})
    cross_encoder = str(make_cross_encoder(folder / "reranker", positions=128))
    made = Made(folder, tiny_model, cross_encoder, f"{folder}/exact", f"{folder}/chunks")
    embed(settings_for(**made.asked, chunking__max_tokens=24, corpus__max_rejected_fraction=0.1))
    made.run("exact", search__exact=True)
    made.run("chunks", search__exact=True, search__group="chunk")
    return made


@pytest.mark.slow
def test_runs_name_passages_and_the_chunks_that_found_them(made: Made, tiny_model: Path) -> None:
    passages, chunks = made.passages, made.chunks
    questions = query_vectors(tiny_model, list(QUESTIONS.values()))
    truth = brute(made.root, questions, "passage", K)
    check_best(passages, truth)
    check_best(chunks, brute(made.root, questions, "chunk", K))
    assert any(len({name for name, _ in rows}) < K for rows in pairs(chunks))
    # By an index that was tuned for passages, to miss none.
    index = build_index(settings_for(**made.asked, index__factory="IVF4,SQ8", index__recall_target=1.0))
    assert index.results == "passages"
    assert read_index(STORAGE, made.root) == index
    by_index = made.run("index", search__rescore=60)
    check_best(by_index, truth)
    # The text of a result is the characters of the corpus that its columns name.
    table = pq.read_table(f"{chunks}/run.parquet")
    assert table.column_names == ["query_id", "passage_id", "rank", "score", "tag", "vector_id", *SPAN]
    columns = stored(made.root)
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
    STORAGE.write(f"{made.folder}/qrels.tsv", qrels.encode())
    runs = [passages, chunks, f"{chunks}/run.trec"]
    metrics = evaluate(
        settings_for(evaluate__run=runs, evaluate__qrels=f"{made.folder}/qrels.tsv", evaluate__k=[K])
    )
    assert metrics["runs"][0]["mean"][f"recall@{K}"] == 1
    assert metrics["runs"][1]["left_out"] == {}
    assert metrics["runs"][1]["mean"] == metrics["runs"][2]["mean"]


@pytest.mark.slow
def test_a_rerank_scores_the_chunk_that_was_found_in_one_job_or_two(made: Made) -> None:
    rows = made.reranked("a", made.passages)
    assert len(rows) == K * len(QUESTIONS)
    for row in rows:
        assert row["score"] == pytest.approx(made.expected(row, whole=False), abs=1e-4)
        assert row["start"] is not None
    # In one job with the search the same, but for scores whose last bits change places.
    together = made.run("both", search__exact=True, search__rerank=True, **made.reranker)
    alone = [sorted(found) for found in pairs(f"{made.folder}/a")]
    assert [sorted(found) for found in pairs(f"{together}/reranked")] == alone
    with pytest.raises(SettingsError, match=r"search.group chunk: a rerank of whole passages"):
        made.run("none", search__rerank=True, search__group="chunk", rerank__reads="passage", **made.reranker)


@pytest.mark.slow
def test_a_rerank_reads_whole_passages_where_it_is_told_to_or_knows_no_chunk(made: Made) -> None:
    """Candidates may be of an older run, or a TREC run, which name no chunk, or the chunks themselves."""
    table = pq.read_table(f"{made.passages}/run.parquet")
    pq.write_table(table.drop_columns(SPAN), made.folder / "old.parquet")
    for name, candidates, more, whole, named in (
        ("b", made.passages, {"rerank__reads": "passage"}, True, True),
        ("c", str(made.folder / "old.parquet"), {}, True, False),
        ("d", f"{made.passages}/run.trec", {}, True, False),
        ("e", made.chunks, {}, False, True),
    ):
        rows = made.reranked(name, candidates, **more)
        assert len(rows) == K * len(QUESTIONS)
        for row in rows:
            assert row["score"] == pytest.approx(made.expected(row, whole=whole), abs=1e-4)
            assert (row["start"] is not None) == named
    found = sorted(map(str, pairs(f"{made.folder}/e")))
    assert found != sorted(map(str, pairs(made.passages)))


@functools.cache
def reranker_here(folder: str) -> tuple[Model, PairFeeder]:
    spec = resolve_reranker(RerankSettings(model=folder, max_length=96), on_gpu=False)
    return Model(spec, model_folder(spec), Place()), pair_feeder(spec)


def score_here(folder: str, query: str, text: str) -> float:
    model, feeder = reranker_here(folder)
    rows = feeder.pairs([query], [text])
    result = model.empty_result(1)
    model.run(rows, model.cut(rows, 1024), result)
    return float(result.array(SCORE)[0])
