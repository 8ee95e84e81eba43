"""Questions whose answers are known: what is drawn, what is measured, and that nothing is trained on it."""

import json
from collections import defaultdict
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bge_ray.demo import reranker
from bge_ray.demo.chinese import write_chinese
from bge_ray.demo.known import draw, measured, write_beir
from bge_ray.demo.reranker import _pairs, is_trained, reranker_folder
from bge_ray.formats.docstrings import PACKAGES, STANDARD_LIBRARY, known_items, known_items_of
from bge_ray.pipeline.engine.stopping import StopRequest
from tests.support.models import SENTENCES, make_cross_encoder, make_encoder
from tests.support.training import as_settings


def test_a_passage_counts_once_and_every_one_of_a_query_is_asked_for() -> None:
    long = [f"{word} " * 40 for word in ("a", "b", "c", "d")]
    pairs = [
        ("x", long[0]),
        ("other", long[0]),
        ("x", long[1]),
        ("y", long[2]),
        ("z", "short"),
        ("", long[3]),
    ]
    passages, queries, judged = draw(pairs, 10, 10)
    assert sorted(passages.values()) == sorted(long[:3])
    assert sorted(queries.values()) == ["x", "y"]
    wanted = {(queries[query], passages[passage]) for query, passage in judged}
    assert wanted == {("x", long[0]), ("x", long[1]), ("y", long[2])}
    assert draw(pairs, 10, 10) == (passages, queries, judged)
    assert len(draw(pairs, 2, 1)[0]) == 2
    assert len(draw(pairs, 2, 1)[1]) == 1


def test_a_file_with_its_content_is_left_as_it_is(tmp_path: Path) -> None:
    write_beir(tmp_path, {"p": "one"}, {"q": "two"}, [("q", "p")])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    write_beir(tmp_path, {"p": "one"}, {"q": "three"}, [("q", "p")])
    written = {path.name for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert written == {"queries.jsonl"}
    assert json.loads((tmp_path / "queries.jsonl").read_text()) == {"_id": "q", "text": "three"}


@pytest.mark.slow
def test_nothing_that_is_measured_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first packages: to read all takes minutes."""
    some = [item for item in islice(known_items_of(PACKAGES), 20_000) if item[0] != "ray"]
    monkeypatch.setattr(reranker, "known_items_of", lambda _: iter(some))
    trained, held_out = _pairs()
    assert len(trained) > 500
    assert len(held_out) > 50
    measured_texts = {text for pair in known_items(STANDARD_LIBRARY) for text in pair}
    learned = {text for pair in trained for text in pair}
    asked = {text for pair in held_out for text in pair}
    assert not measured_texts & (learned | asked)
    assert not learned & asked
    packages = defaultdict(set)
    for package, query, passage in some:
        packages[query, passage].add(package)
    of_one = [
        {next(iter(packages[pair])) for pair in pairs if len(packages[pair]) == 1}
        for pairs in (trained, held_out)
    ]
    assert not of_one[0] & of_one[1]


def test_a_chinese_question_has_one_answer_and_is_no_part_of_it(tmp_path: Path) -> None:
    passages, questions = write_chinese(tmp_path)
    assert len(set(passages.values())) == len(set(questions.values())) == len(passages) == 40
    judged = (tmp_path / "qrels" / "test.tsv").read_text().splitlines()[1:]
    assert [line.split("\t") for line in judged] == [[f"q{n}", f"p{n}", "1"] for n in range(40)]
    for number in range(40):
        assert questions[f"q{number}"] not in passages[f"p{number}"]


def test_only_a_whole_reranker_counts(tmp_path: Path) -> None:
    assert not is_trained(tmp_path)
    reranker_folder(tmp_path).mkdir()
    (reranker_folder(tmp_path) / "training.json").write_text("{}")
    assert not is_trained(tmp_path)
    (reranker_folder(tmp_path) / "config.json").write_text("{}")
    assert is_trained(tmp_path)


def reciprocal_ranks(run: Path, judged: list[tuple[str, str]], queries: dict[str, str]) -> dict[str, float]:
    """By the order of scores in the file, ties by id as trec_eval has them: later ids first."""
    found = dict.fromkeys(queries, 0.0)
    rows = pq.read_table(run).to_pylist()
    for query in queries:
        own = [(row["score"], row["passage_id"]) for row in rows if row["query_id"] == query]
        for rank, (_, passage) in enumerate(sorted(own, reverse=True)[:10], 1):
            if (query, passage) in judged:
                found[query] = 1 / rank
                break
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_both_runs_are_measured(tmp_path: Path) -> None:
    pairs = [
        (first, f"{first} {second} {number} " * 3)
        for number, first in enumerate(SENTENCES)
        for second in SENTENCES[:1]
    ]
    passages, queries, judged = draw(pairs, 40, 8)
    folder = tmp_path / "known"
    write_beir(folder, passages, queries, judged)
    keys = {
        "search.k": 5,
        "search.rerank": True,
        "rerank.model": str(make_cross_encoder(tmp_path / "reranker")),
        "rerank.max_length": 64,
    }
    model = make_encoder(tmp_path / "model", pooling="mean")
    settings = as_settings({"model.name": str(model), "corpus.keep_columns": ["title"]})
    first, reranked = measured(settings, folder, keys, StopRequest())
    assert first == pytest.approx(reciprocal_ranks(folder / "run" / "run.parquet", judged, queries))
    assert reranked == pytest.approx(
        reciprocal_ranks(folder / "run" / "reranked" / "run.parquet", judged, queries)
    )
    assert first != reranked
