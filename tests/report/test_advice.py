"""The advice follows the figures, begins at its threshold, and is silent where nothing is wrong."""

from typing import Any

import pytest

from bge_ray.records.index import Recall, Shortfall
from bge_ray.records.reports import EmbedReport, HeldOut, HeldOutFigures
from bge_ray.report import advice
from bge_ray.report.advice import (
    advise_embed,
    advise_index,
    advise_mine,
    advise_rerank,
    advise_search,
    advise_train,
)
from bge_ray.settings.sections import parse_settings
from tests.report.samples import (
    SCORING,
    embed_report,
    index_report,
    mine_report,
    rerank_report,
    search_report,
    searched_index,
    sparse_choice,
    train_report,
)

MISSED = Recall(10, 0.8, 0.75, 0.85)
LONG = {"steady_s": 600.0, "wall_s": 610.0}
UNITS_OF_50 = {"settings": parse_settings(None, ["batching.unit_rows=50"]).model_dump(mode="json")}


def quiet(**changes: Any) -> EmbedReport:
    return embed_report(**{"padding_waste": 0.01, "truncated": 0, "rows_rejected": 0} | changes)


def scoring(**changes: Any) -> dict[str, Any]:
    return {"scoring": type(SCORING)(**(vars(SCORING) | changes))}


def test_good_figures_need_no_advice() -> None:
    assert advise_embed(quiet()) == []
    assert advise_index(index_report()) == []
    assert advise_index(index_report(effort=6)) == []  # of 8 lists
    assert advise_search(search_report()) == []
    assert advise_rerank(rerank_report()) == []
    assert advise_mine(mine_report()) == []
    assert advise_train(train_report()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {**LONG, "utilisation": 0.4, "waiting": 0.5, "readers_busy": 0.9},
            ["40%", "waited for input 50%", "num_readers above 1"],
        ),
        (
            {**LONG, "utilisation": 0.4, "waiting": 0.5, "readers_busy": 0.14},
            ["waited for input 50%", "busy 14% only", "more readers would not help"],
        ),
        ({**LONG, "utilisation": 0.4, "waiting": 0.01}, ["too few units", "batching.unit_rows"]),
        ({"units_done": 100, "rows_in": 4000} | UNITS_OF_50, ["0.25 s", "raise batching.unit_rows above 50"]),
        ({"units_done": 100, "rows_in": 100}, ["merge the corpus objects"]),
        ({"memory_splits": 3}, ["halved: 3", "batching.token_budget"]),
        ({"padding_waste": 0.3}, ["30%", "batching.unit_rows"]),
        ({"truncated": 30}, ["75%", "cut at 16 tokens", "model.max_length"]),
        ({"rows_rejected": 2, "rows_in": 300}, ["3 are allowed", "corpus.max_rejected_fraction"]),
        ({"wall_s": 600.0, "startup_s": 400.0}, ["67%", "start-up"]),
    ],
)
def test_advice_on_an_embed_run(change: dict[str, Any], words: list[str]) -> None:
    (line,) = advise_embed(quiet(**change))
    for word in words:
        assert word in line


def test_titles_that_were_cut_are_no_texts_that_chunks_would_help() -> None:
    settings = parse_settings(None, ["chunking.max_tokens=10"]).model_dump(mode="json")
    assert advise_embed(quiet(truncated=80, settings=settings)) == []


def test_advice_begins_at_its_threshold() -> None:
    just = advice.HIGH_PADDING
    assert advise_embed(quiet(padding_waste=just)) == []
    assert len(advise_embed(quiet(padding_waste=just + 1e-6))) == 1
    waiting = {**LONG, "waiting": 0.5}
    assert advise_embed(quiet(**waiting, utilisation=advice.LOW_UTILISATION)) == []
    assert len(advise_embed(quiet(**waiting, utilisation=advice.LOW_UTILISATION - 1e-6))) == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"reached": False}, "set index.rescore to 100"),
        ({"imbalance": 3.0}, "uneven"),
        ({"effort": 96, "nlist": 128}, "75% of the lists"),
        ({"drift": 0.25}, "index.max_drift"),
    ],
)
def test_advice_on_an_index(change: dict[str, Any], word: str) -> None:
    (line,) = advise_index(index_report(**change))
    assert word in line


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"unknown_ids": 5}, "Run index.py"),
        ({"missing_results": 5}, "fewer passages with different ids"),
        ({"index": searched_index(lacking_shards=2)}, "2 shards are not in it"),
        ({"index": searched_index(shortfall=Shortfall(MISSED, 0.95))}, "larger code (index.factory), or set"),
        (
            {"index": searched_index(shortfall=Shortfall(MISSED, 0.95, 100, 0.97))},
            "recall@10 of its index is 0.8000, and index.recall_target asked for 0.95: set search.rescore to "
            "100, which gives 0.9700, or set search.exact",
        ),
        ({"k": 100}, "measured for 10 results"),
        ({"index": searched_index(tuned_rescore=100)}, "100 candidates rescored for 10"),
        ({"filtered_queries": 9, "compared_all": 2}, "For 7 queries with a filter the index was searched"),
        ({"filtered_queries": 9, "compared_all": 9, "few_passing": 3}, "3 queries have filters that fewer"),
        ({"sparse": sparse_choice(taken=False)}, "no approximation reached search.sparse_recall 0.95"),
        ({"sparse": sparse_choice(exact_ms=1.5)}, "saved nothing: recall@10 0.9600"),
        ({"doubled_passages": 5}, "an id of its own"),
        ({"truncated_queries": 5}, "model.max_length"),
        ({"without_trec": ("passage_id 'a b' cannot stand in one",)}, "There is no run.trec"),
        (scoring(truncated_pairs=30), "rerank.max_length"),
        (scoring(utilisation=0.3), "rerank.num_rerankers"),
        (scoring(padding_waste=0.3), "rerank.unit_pairs"),
        ({"wall_s": 600.0, "startup_s": 400.0}, "start-up"),
    ],
)
def test_advice_on_a_search(change: dict[str, Any], word: str) -> None:
    (line,) = advise_search(search_report(**change))
    assert word in line


def test_advice_on_a_rerank_run_is_that_on_its_rerankers() -> None:
    (line,) = advise_rerank(rerank_report(**scoring(utilisation=0.3)))
    assert "rerank.num_rerankers" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"queries_short": 3}, ["3 queries have fewer", "mine.depth"]),
        ({"verdicts": "copy_by_vector"}, ["8 of 105 results are copies"]),
        ({"positives_beyond": 4}, ["4 of 10 positives are not among the results"]),
        ({"wall_s": 600.0, "startup_s": 400.0}, ["start-up"]),
    ],
)
def test_advice_on_a_mining_run(change: dict[str, Any], words: list[str]) -> None:
    verdicts = mine_report().verdicts
    if "verdicts" in change:
        change = {"verdicts": verdicts | {change["verdicts"]: 5}}
    (line,) = advise_mine(mine_report(**change))
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (HeldOut(-0.05, -0.08, -0.02), ["200 held-out queries worse", "0.050 of MRR@10", "keep the old one"]),
        (HeldOut(0.01, -0.02, 0.04), ["no difference", "+0.010 of MRR@10, -0.020 to +0.040"]),
        (HeldOut(0.0, 0.0, 0.0), ["no difference", "hold out more queries"]),
    ],
)
def test_advice_on_a_training_that_did_not_help(gain: HeldOut, words: list[str]) -> None:
    before = HeldOut(0.4, 0.35, 0.45)
    figures = HeldOutFigures(200, before, HeldOut(0.4 + gain.mean, 0.3, 0.5), gain, 0.2)
    (line,) = advise_train(train_report(figures=figures))
    assert all(word in line for word in words)


def test_advice_on_a_training_of_which_nothing_was_measured() -> None:
    assert "train.held_out" in advise_train(train_report(figures=None))[0]
    new_head = HeldOutFigures(200, None, HeldOut(0.4, 0.3, 0.5), None, None)
    assert advise_train(train_report(figures=new_head)) == []
