"""The pages show what the reports say, and whatever text stands in them stays text."""

import re

import numpy as np
import pytest

from bge_ray.records.reports import Gaps, HeldOut, HeldOutFigures, RejectedRow
from bge_ray.report.embed_page import embed_page
from bge_ray.report.facts import RunFacts
from bge_ray.report.index_page import index_page
from bge_ray.report.merge_page import merge_page
from bge_ray.report.mine_page import mine_page
from bge_ray.report.mteb_page import mteb_page
from bge_ray.report.run_page import rerank_page, search_page
from bge_ray.report.sections import MAX_FAILURES, PHASES
from bge_ray.report.train_page import train_page
from tests.report.samples import (
    HOSTILE,
    embed_report,
    facts_of_two,
    index_report,
    merge_report,
    mine_report,
    mteb_report,
    rerank_report,
    search_report,
    sparse_choice,
    train_report,
)

PAGES = {
    "embed": embed_page(embed_report(outcome=f"incomplete: {HOSTILE}", complete=False, failures=(HOSTILE,))),
    "index": index_page(index_report(), np.array([10, 20, 70])),
    "search": search_page(search_report()),
    "rerank": rerank_page(rerank_report(without_trec=(HOSTILE,))),
    "mine": mine_page(mine_report()),
}


@pytest.mark.parametrize("job", PAGES)
def test_what_a_page_shows_is_escaped(job: str) -> None:
    page = PAGES[job].decode()
    assert "<script" not in page.lower()
    assert page.count("&lt;script&gt;") >= 2
    assert "default-src 'none'" in page


@pytest.mark.parametrize("job", PAGES)
def test_every_page_says_how_long_what_it_cost_and_what_to_change(job: str) -> None:
    page = PAGES[job].decode()
    for words in (
        "Wall time",
        "40.0 s",
        "10.0 s of it start-up",
        "What to change next",
        "Price",
        "0.08",
    ):
        assert words in page
    for name, _ in PHASES.values():
        assert f">{name}<" in page
    assert "0.022: 2 for 40.0 s" in page
    assert "batching.unit_rows" in page  # among all settings


@pytest.mark.parametrize("job", ["embed", "search", "rerank", "mine"])
def test_what_was_left_out_is_shown_by_reason_with_examples(job: str) -> None:
    page = PAGES[job].decode()
    assert "empty_text" in page
    assert "2 rows: nothing but white space" in page
    assert "row 3" in page


def test_the_accounts_of_each_job() -> None:
    assert "42 in = 40 embedded + 2 rejected, in 2 of 2 planned units" in PAGES["embed"].decode()
    assert "10 queries = 9 answered + 1 left out, with 90 results" in PAGES["search"].decode()
    assert "42 pairs = 40 scored + 2 left out, of 9 queries" in PAGES["rerank"].decode()
    assert "9 of 10 queries" in PAGES["search"].decode()
    many = rerank_page(rerank_report(pairs_in=1_234_567, pairs_out=1_234_000)).decode()
    assert "Complete: 1,234,000 of 1,234,567 pairs" in many


def test_what_a_row_of_each_output_takes() -> None:
    assert "one vector, float32, 32 bytes a row" in PAGES["embed"].decode()
    assert "one vector, float32, no row in this run" in embed_page(embed_report(output_bytes={})).decode()


def test_what_left_the_data_set_is_named() -> None:
    gone = embed_report(objects_removed=12, rows_removed=3456, removed_uris=("s3://b/in/gone.jsonl",))
    page = embed_page(gone).decode()
    assert "12 objects with 3,456 rows left the corpus" in page
    assert "s3://b/in/gone.jsonl" in page
    assert "and 11 more" in page
    assert "left the corpus" not in PAGES["embed"].decode()


def test_what_was_not_encoded_is_told_with_where_it_came_from_and_what_it_saved() -> None:
    reused = {"rows_reused": 980, "tokens_reused": 98_000, "tokens_encoded": 2_000}
    page = embed_page(embed_report(**reused, vectors_reused={"object": 970, "repeated": 12})).decode()
    assert "Of 980 rows nothing was encoded" in page
    assert (
        "970 from earlier versions or copies of their files, 12 from the same text elsewhere in this run"
        in page
    )
    assert "with 98,000 tokens, beside 2,000 that were encoded." in page
    assert "They would have cost" not in page
    page = embed_page(embed_report(vectors_reused={"object": 1}, cost_saved=12.3)).decode()
    assert "They would have cost about 12.30." in page
    assert "nothing was encoded" not in embed_page(embed_report()).decode()


def test_how_texts_were_read_is_shown_where_there_is_something_to_say() -> None:
    said = embed_page(embed_report(tokenizer=f"other tokens {HOSTILE}")).decode()
    assert "Tokenizer" in said and "other tokens" in said and HOSTILE not in said
    assert "Tokenizer" not in embed_page(embed_report()).decode()


def test_pictures_are_there_where_there_is_something_to_draw() -> None:
    assert {job: page.count(b"<svg") for job, page in PAGES.items()} == {
        "embed": 2,
        "index": 2,
        "search": 1,
        "rerank": 1,
        "mine": 2,
    }
    flat = index_report(parameter=None, effort=1, curve=(), ceiling=None, nlist=0)
    assert index_page(flat, None).count(b"<svg") == 0


def test_a_run_with_nothing_done_has_a_page_too() -> None:
    page = embed_page(embed_report(RunFacts("embed", started=100.0, entered=100.0)))
    assert b"Complete" in page
    assert b"Nothing to say: no unit was done" in page
    assert b"No text was tokenised" in page


def test_what_is_not_done_is_shown_up_to_a_number() -> None:
    facts = facts_of_two()
    facts.plan(units=100, rows=1000)
    for number in range(MAX_FAILURES + 7):
        facts.book_failure(f"unit-{number} fell")
    page = embed_page(embed_report(facts, complete=False)).decode()
    assert "98 of 100 units, 958 of 1,000 rows" in page
    assert len(re.findall(r"unit-\d+ fell", page)) == MAX_FAILURES
    assert "and 7 more causes" in page


def test_one_cause_of_many_units_is_shown_once_and_an_incomplete_run_claims_no_answers() -> None:
    failed = {
        "complete": False,
        "outcome": "incomplete: gone",
        "units_planned": 5,
        "failures": (HOSTILE,) * 3,
    }
    page = search_page(search_report(**failed, queries_out=0, rows_planned=100)).decode()
    assert page.count("alert(&#x27;x&#x27;)&lt;/script&gt; (3 units)") == 1
    assert "<script" not in page.lower()
    assert "Nothing of this run is published. 42 of 100 queries" in page
    assert "answered +" not in page
    page = rerank_page(rerank_report(**failed, pairs_out=0, rows_planned=100)).decode()
    assert "Nothing of this run is published. 42 of 100 pairs" in page


def test_examples_name_what_they_have() -> None:
    rows = (
        RejectedRow("null_id", "missing", uri="file:///corpus/a.jsonl", row=1234),
        RejectedRow("unknown_passage", "gone", query_id="q1", passage_id="p1"),
    )
    page = embed_page(embed_report(corpus="/corpus", rejected_examples=rows)).decode()
    assert ">a.jsonl, row 1,234<" in page
    assert ">q1, p1<" in page


def test_no_price_is_said() -> None:
    report = search_report(price_per_hour=None, cost=None, cost_per_million_tokens=None)
    page = search_page(report).decode()
    assert "CPU core hours" in page
    assert "report.price_per_hour takes that of a CPU core hour" in page


def test_a_mining_run_shows_which_rule_dropped_what() -> None:
    page = PAGES["mine"].decode()
    assert "12 queries = 10 mined for + 2 left out; 5 more had no judgement" in page
    assert "10 positives, 1 of them not among the results of their queries; 2 more are not in" in page
    assert "7: not far enough below the lowest positive by the vectors" in page
    assert "30: taken as negatives" in page
    assert ">max_score<" not in page  # dropped nothing
    assert "score 0.890, positive&#x27;s 0.900; cosine 0.500; words in common 25%" in page
    assert "How far negatives are away" in page
    assert "How far" not in mine_page(mine_report(gaps=Gaps())).decode()
    lost = mine_page(mine_report(complete=False, outcome="incomplete: x")).decode()
    assert "Nothing of this run is published" in lost


def test_a_merge_names_its_models() -> None:
    page = merge_page(merge_report()).decode()
    assert "<script" not in page.lower()
    assert "22,713,216 parameters" in page
    assert "by the losses on 4 examples" in page
    for words in ("0.250000", "1.5000", "0.750000", "rev", "abc", "def"):
        assert words in page


def test_a_training_shows_its_loss_and_what_it_gained() -> None:
    page = train_page(train_report()).decode()
    assert "<script" not in page.lower()
    for words in (
        "aria-label='Loss'",
        "0.2500",
        "0.5000",
        "0.4500 to 0.5500",
        "p = 0.0001",
        "200 held-out queries",
    ):
        assert words in page
    assert "640 examples, in 640 queries of all steps; 3 more have the text of a held-out query" in page
    assert "Nothing was measured" in train_page(train_report(figures=None)).decode()
    fresh = HeldOutFigures(7, None, HeldOut(0.5, 0.4, 0.6), None, None)
    assert "Before, the head was random" in train_page(train_report(figures=fresh, fresh_head=True)).decode()
    lost = train_page(train_report(complete=False, outcome="incomplete: x", figures=None, curve=())).decode()
    assert "Before and after" not in lost
    assert "aria-label='Loss'" not in lost


def test_an_mteb_run_shows_published_means_beside_its_own() -> None:
    page = mteb_page(mteb_report()).decode()
    assert "<script" not in page.lower()
    rows = re.findall(r"<tr><th scope='row'>(.*?)</th>(.*?)</tr>", page)
    cells = [(name, re.findall(r"<td>(.*?)</td>", rest)) for name, rest in rows]
    stated = [found[1:] for name, found in cells if name in ("STS", "MTEB(eng, v1), 56 tasks")]
    assert stated == [
        ["2 of 56", "", "62.17", ""],
        ["10 of 10", "81.50", "81.59", "-0.09"],
        ["10 of 10", "81.50", "", ""],
    ]
    assert ("SciFact", ["Retrieval", "71.23", "75.00"]) in cells
    assert ("STS12", ["STS", "50.00", ""]) in cells
    assert ("SciFact", ["1,234"]) in cells
    assert "3 results on 2 tasks" in page


def test_the_page_of_a_filtered_search_says_what_is_known_of_its_recall() -> None:
    told = {"filter": "year > 3 AND '<x9>'", "passing": 70, "filtered_queries": 9, "few_passing": 2}
    page = search_page(search_report(**told, compared_all=4)).decode()
    assert "which 70 vectors pass" in page and "&lt;x9&gt;" in page and "<x9>" not in page
    assert "9 queries had a filter, 2 one that fewer than 10 passages pass" in page
    assert "For 4 of them all vectors that pass were compared, for 5 an index was searched" in page
    assert "what it is among what passes is not known" in page
    assert "had a filter" not in search_page(search_report()).decode()


def test_the_page_of_an_approximate_search_says_what_it_found_and_saved() -> None:
    page = search_page(search_report(sparse=sparse_choice())).decode()
    assert (
        "query_cut 8, heap_factor 0.9: recall@10 0.9600 (0.9200 to 0.9800) on 200 queries of the run" in page
    )
    assert "2.00 ms a query and 9.00 ms exactly; indexes made in 4.0 s" in page
    page = search_page(search_report(sparse=sparse_choice(taken=False))).decode()
    assert "exactly; query_cut 8, heap_factor 0.9 missed 0.95" in page
