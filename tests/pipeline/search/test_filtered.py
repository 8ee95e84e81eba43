"""Filtered searches by every first stage, as jobs on a real Ray: truth is a search of everything.

The corpus is Parquet in folders of days, so that one of the kept columns stands in paths alone.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.errors import RejectedRowsError, SettingsError
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.index.job import build_index
from bge_ray.pipeline.mine.job import mine
from bge_ray.pipeline.search.job import plan_search, search
from bge_ray.records.canonical import from_json
from bge_ray.records.reports import SearchReport
from tests.support.corpora import docstrings
from tests.support.models import make_cross_encoder, make_m3
from tests.support.searches import STORAGE, by_query, jsonl, read_rejected, read_run, settings_for, upload

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(600),
]

PASSAGES, K = 170, 8
DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")
Kept = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def passages() -> Kept:
    """What is kept of each passage, by its id."""
    rng = np.random.default_rng(3)
    made: Kept = {}
    for number, passage in enumerate(docstrings(PASSAGES)):
        year = None if rng.random() < 0.1 else int(rng.integers(2000, 2020))
        module = passage["title"].partition(".")[0]
        made[passage["id"]] = {"day": DAYS[number % 3], "year": year, "module": module}
    return made


@pytest.fixture(scope="module")
def root(ray_cluster: None, passages: Kept, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Corpus, data set with an index, and queries, of which some have filters of their own."""
    model = make_m3(tmp_path_factory.mktemp("models") / "tiny-m3", dim=64, pickled=True)
    root = str(tmp_path_factory.mktemp("filtered"))
    made = docstrings(PASSAGES)
    for day in DAYS:
        some = [p for p in made if passages[p["id"]]["day"] == day]
        table = pa.table(
            {
                "id": [p["id"] for p in some],
                "text": [f"{p['title']} {p['text']}" for p in some],
                "year": pa.array([passages[p["id"]]["year"] for p in some], pa.int32()),
                "module": [passages[p["id"]]["module"] for p in some],
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink)
        STORAGE.write(f"{root}/corpus/day={day}/part.parquet", sink.getvalue())
    asked = [{"_id": f"q{i}", "text": f"how to {p['title']} with {i}"} for i, p in enumerate(made[::15])]
    for number, query in enumerate(asked):
        query["only"] = [None, "year >= 2010", f"day = '{DAYS[1]}'"][number % 3]
    upload(root, {"queries.jsonl": jsonl(asked)})
    keys = {"corpus__uri": f"{root}/corpus", "output__uri": f"{root}/data", "model__name": str(model)}
    keys |= {"corpus__keep_columns": ["day", "year", "module"], "batching__unit_rows": 40}
    embed(settings_for(**keys, model__outputs=["embedding", "sparse", "colbert", "bm25"]))
    build_index(settings_for(output__uri=f"{root}/data", index__factory="IVF4,SQ8"))
    return root


def run(root: str, output: str, **keys: object) -> tuple[SearchReport, dict[str, list[tuple[str, float]]]]:
    asked = {"output__uri": f"{root}/data", "search__queries": f"{root}/queries.jsonl", "search__k": K}
    asked |= {
        "search__output": output,
        "search__unit_queries": 5,
        "search__max_rejected_fraction": 1.0,
    } | keys
    return search(settings_for(**asked)), by_query(read_run(asked["search__output"]))


def passing(
    found: list[tuple[str, float]], passages: Kept, passes: Any, k: int = K
) -> list[tuple[str, float]]:
    return [pair for pair in found if passes(passages[pair[0]])][:K]


def since_2010(row: dict[str, Any]) -> bool:
    return row["year"] is not None and row["year"] >= 2010


def second_day(row: dict[str, Any]) -> bool:
    return row["day"] == DAYS[1]


def check_against_all(
    root: str, tmp_path: Path, passages: Kept, *, exactly: bool = True, **keys: object
) -> SearchReport:
    """A filtered run has what passes of the run of everything: by one filter, and by those of queries."""
    _, everything = run(root, f"{tmp_path}/all", **keys, search__k=PASSAGES)
    common, found = run(root, f"{tmp_path}/since", **keys, search__filter="year >= 2010")
    for query_id, pairs in found.items():
        ours, truth = dict(pairs), dict(passing(everything[query_id], passages, since_2010))
        assert list(ours) == list(truth) or not exactly
        assert all(since_2010(passages[name]) for name in ours)
        assert len(set(ours) & set(truth)) >= (len(truth) if exactly else 0.8 * len(truth))
    report, own = run(root, f"{tmp_path}/own", **keys, search__filter_column="only")
    for number, (query_id, pairs) in enumerate(own.items()):
        passes = [lambda _: True, since_2010, second_day][number % 3]
        truth = passing(everything[query_id], passages, passes)
        assert all(passes(passages[name]) for name, _ in pairs)
        if exactly:
            assert [name for name, _ in pairs] == [name for name, _ in truth]
    assert (common.filtered_queries, report.filtered_queries) == (12, 8)
    assert common.passing == sum(map(since_2010, passages.values()))
    assert common.few_passing == 0
    assert common.missing_results == 0 or "search__first_stage" in keys  # words that no passage has
    return common


def test_an_exact_search_among_what_passes(root: str, tmp_path: Path, passages: Kept) -> None:
    report = check_against_all(root, tmp_path, passages, search__exact=True)
    assert report.compared_all == 12
    assert "year >= 2010" in report.way
    page = STORAGE.read(f"{tmp_path}/since/report.html").decode()
    assert "For 12 of them all vectors that pass were compared" in page
    # A filter and its queries again: nothing to do; another filter is another run.
    again, _ = run(root, f"{tmp_path}/since", search__exact=True, search__filter="year >= 2010")
    assert again.outcome == "nothing to do"
    nobody = "year IS NULL AND module = 'x'"
    other, found = run(root, f"{tmp_path}/since", search__exact=True, search__filter=nobody)
    assert other.outcome == "complete" and not found
    details = STORAGE.read(f"{tmp_path}/since/rejected.parquet")
    rows = pq.read_table(pa.BufferReader(details)).to_pylist()
    assert {row["reason"] for row in rows} == {"no_result"}
    assert all("nothing passes its filter" in row["detail"] for row in rows)


def test_an_index_among_what_passes(root: str, tmp_path: Path, passages: Kept) -> None:
    """Where few pass, all of the four lists are probed."""
    text = f"day = '{DAYS[2]}' AND year < 2003"
    few = [row for row in passages.values() if row["day"] == DAYS[2] and (row["year"] or 3000) < 2003]
    assert 0 < len(few) < 40
    report, found = run(root, f"{tmp_path}/few", search__filter=text, search__k=40)
    _, truth = run(root, f"{tmp_path}/exact", search__filter=text, search__k=40, search__exact=True)
    # All that pass are compared, and scored by the vectors: as an exact search finds them.
    assert found == truth
    assert {len(pairs) for pairs in found.values()} == {len(few)}
    assert (report.compared_all, report.few_passing, report.missing_results) == (12, 12, 0)
    assert any("fewer passages pass than search.k" in line for line in report.advice)


def test_an_index_among_half_of_the_passages(root: str, tmp_path: Path, passages: Kept) -> None:
    """Of four lists some are probed, and twice as many where half of the passages pass."""
    report = check_against_all(root, tmp_path, passages, exactly=False)
    assert report.index is not None


def test_words_and_weights_among_what_passes(root: str, tmp_path: Path, passages: Kept) -> None:
    """What a word is worth goes by all passages, so that scores are those of the search of everything."""
    check_against_all(root, f"{tmp_path}/bm25", passages, search__first_stage="bm25")
    check_against_all(root, f"{tmp_path}/sparse", passages, search__first_stage="sparse")


def test_several_outputs_scored_again_and_reranked_among_what_passes(
    root: str, tmp_path: Path, passages: Kept
) -> None:
    reranker = str(make_cross_encoder(tmp_path / "reranker"))
    keys = {"search__first_stage": "hybrid", "search__hybrid": ["dense", "bm25"], "search__exact": True}
    keys |= {"search__rescore_with": ["embedding", "colbert"], "search__candidates": PASSAGES}
    check_against_all(root, tmp_path, passages, **keys)
    keys |= {"search__rerank": True, "rerank__model": reranker, "corpus__uri": f"{root}/corpus"}
    _, found = run(root, f"{tmp_path}/reranked", **keys, search__filter="year >= 2010", rerank__depth=5)
    again = by_query(read_run(f"{tmp_path}/reranked/reranked"))
    assert list(again) == list(found)
    for query_id, pairs in again.items():
        assert {name for name, _ in pairs} == {name for name, _ in found[query_id][:5]}
        assert all(since_2010(passages[name]) for name, _ in pairs)


def test_a_bad_filter_is_one_rejected_query(root: str, tmp_path: Path, passages: Kept) -> None:
    lines = [
        {"_id": "good", "text": "a query", "only": "year >= 2010"},
        {"_id": "column", "text": "a query", "only": "yeer = 3"},
        {"_id": "late", "text": "a query", "only": "module::INTEGER = 3"},
        {"_id": "none", "text": "a query"},
    ]
    upload(str(tmp_path), {"q.jsonl": jsonl(lines)})
    output = str(tmp_path / "run")
    keys = {"output__uri": f"{root}/data", "search__queries": f"{tmp_path}/q.jsonl", "search__output": output}
    keys |= {"search__k": K, "search__exact": True}
    assert "3 queries (1 left out)" in plan_search(settings_for(**keys, search__filter_column="only"))
    with pytest.raises(RejectedRowsError, match="bad_filter 2"):
        search(settings_for(**keys, search__filter_column="only"))
    assert list(by_query(read_run(output))) == ["good", "none"]
    assert sorted(read_rejected(output)) == [("column", None, "bad_filter"), ("late", None, "bad_filter")]
    report = from_json(SearchReport, STORAGE.read(f"{output}/report.json"))
    assert (report.queries_in, report.queries_out) == (4, 2)
    keys["search__output"] = str(tmp_path / "other")
    with pytest.raises(SettingsError, match=r"search\.filter .*Could not convert string .*embeddings/"):
        search(settings_for(**keys, search__filter="module::INTEGER = 3"))
    judged = {"mine__queries": keys["search__queries"], "mine__qrels": f"{tmp_path}/qrels.tsv"}
    with pytest.raises(SettingsError, match=r"search\.filter, search\.filter_column: negatives are mined"):
        mine(settings_for(**keys, search__filter="true", mine__output=f"{tmp_path}/m", **judged))
