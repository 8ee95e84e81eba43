"""The facts of a run add up to what its receipts say, whatever job they are of; reports are whole records."""

import json
import time
from collections import Counter
from typing import Any

import psutil
import pytest

from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.dataset import FileFact
from bge_ray.records.index import IndexDescription
from bge_ray.records.reports import (
    PHASES,
    REPORT_FORMAT_VERSION,
    EmbedReport,
    IndexReport,
    RejectedRow,
    Report,
    RerankReport,
    SearchReport,
)
from bge_ray.report.facts import (
    EXAMPLES_PER_REASON,
    RunFacts,
    Workers,
    cost_saved,
    read_receipt,
    summarise,
)
from bge_ray.report.start import count_from_process, take_start
from tests.report.samples import (
    ENDED,
    embed_report,
    facts_of_two,
    index_description,
    index_report,
    receipt,
    rerank_report,
    search_report,
)


def test_sums_rates_and_cost() -> None:
    report = embed_report()
    assert (report.rows_in, report.rows_out, report.rows_rejected) == (42, 40, 2)
    assert report.steady_s == 20.0
    assert report.startup_s == 10.0
    assert report.tokens_per_s == 400 / 20
    assert report.padding_waste == 1 - 400 / 480
    assert report.utilisation == 25 / 40
    assert report.waiting == 2 / 40
    assert report.device_hours == 2 * 40 / 3600
    assert report.cost == 3.6 * 80 / 3600
    assert report.cost_per_million_tokens == report.cost / 400 * 1e6
    assert (report.bytes_in, report.bytes_out) == (2000, 200)
    assert report.rejected_reasons == {"empty_text": 2}
    assert report.stage_s == {"encode": 25.0, "read": 2.0, "tokenise": 4.0, "write": 1.0}
    assert report.lengths.counts == (40, 0, 0)
    assert report.run_id == "run-7"


def test_the_phases_are_the_whole_time_and_the_throughput_all_tokens_and_rows() -> None:
    report = embed_report()
    assert report.phase_s == {"launch": 1.0, "plan": 3.0, "start": 6.0, "work": 20.0, "finish": 10.0}
    assert tuple(report.phase_s) == PHASES
    throughput = report.throughput
    assert sum(throughput.tokens_per_s) * throughput.bin_s == pytest.approx(400)
    assert sum(throughput.rows_per_s) * throughput.bin_s == pytest.approx(42)
    idle = summarise(RunFacts("embed", started=100.0, entered=102.0), ended=ENDED, price_per_hour=None)
    assert sum(idle["phase_s"].values()) == idle["wall_s"] == 40.0
    assert (idle["cost"], idle["tokens_per_s"], idle["throughput"].bin_s) == (None, 0.0, 0.0)


def test_a_unit_of_no_length_is_in_the_throughput_too() -> None:
    facts = RunFacts("search", started=100.0, entered=100.0)
    facts.book(read_receipt(5, {"written": 130.0}))
    facts.book(read_receipt(5, {"written": 200.0}))
    throughput = summarise(facts, ended=201.0, price_per_hour=None)["throughput"]
    assert sum(throughput.rows_per_s) * throughput.bin_s == pytest.approx(10, rel=1e-3)


# What the stages of a search with a reranker note: of a group once, and then of its second unit.
SEARCHED: dict[str, Any] = {
    "encode_started": 10.0,
    "encode_s": 1.0,
    "query_tokens": 30,
    "truncated_queries": 1,
    "search_s": 2.0,
    "unknown_ids": 4,
    "texts_s": 0.5,
    "pair_s": 0.25,
    "pair_tokens": 900,
    "truncated_pairs": 2,
    "score_started": 14.0,
    "score_ended": 16.0,
    "device_s": 1.5,
    "padded_tokens": 1000,
    "written": 17.0,
    "queries": 5,
}
SECOND = {
    "score_started": 16.0,
    "score_ended": 18.0,
    "device_s": 2.0,
    "padded_tokens": 500,
    "pair_tokens": 450,
}


def test_receipts_of_a_search_say_the_same_in_their_own_words() -> None:
    first, second = read_receipt(5, SEARCHED), read_receipt(3, SECOND | {"written": 19.0})
    assert (first.tokens, first.padded_tokens, first.truncated) == (930, 1030, 3)
    assert (first.rows, first.rows_out, first.reasons) == (5, 5, {})
    assert (first.began, first.ended) == (10.0, 16.0)
    assert first.stage_s == {"encode": 1.0, "search": 2.0, "texts": 0.5, "pair": 0.25, "score": 2.0}
    facts = RunFacts("search", started=0.0, entered=1.0)
    facts.book(first)
    facts.book(second)
    assert (facts.first_work, facts.last_work, facts.device_s) == (10.0, 18.0, 3.5)
    assert (facts.counts["unknown_ids"], facts.counts["pair_tokens"]) == (4, 1350)
    assert facts.rows_in == 8
    alone = read_receipt(5, {"encode_started": 10.0, "encode_s": 1.0, "written": 17.0})
    assert (alone.began, alone.ended) == (10.0, 17.0)


def test_steps_of_an_index_build_are_units_and_stages() -> None:
    facts = RunFacts("index", started=0.0, entered=1.0)
    facts.start(facts.workers, 5.0)
    facts.book_step("adding", planned=4, done=4, span=(6.0, 16.0))
    facts.book_step("merging", planned=2, done=1, span=(16.0, 21.0))
    facts.book_step("adding", planned=1, done=1, span=(21.0, 22.0))
    assert (facts.units_planned, facts.units_done) == (7, 6)
    said = summarise(facts, ended=30.0, price_per_hour=None)
    assert said["stage_s"] == {"adding": 11.0, "merging": 5.0}
    assert said["phase_s"] == {"launch": 1.0, "plan": 4.0, "start": 1.0, "work": 16.0, "finish": 8.0}


def test_few_examples_of_each_reason_are_kept_and_all_are_counted() -> None:
    facts = facts_of_two()
    for _ in range(10):
        facts.book(receipt(10, 110.0, 120.0))
    facts.book_rejected({"null_id": 9}, [RejectedRow("null_id", "none")] * 9)
    assert Counter(example.reason for example in facts.examples) == {
        "empty_text": EXAMPLES_PER_REASON,
        "null_id": EXAMPLES_PER_REASON,
    }
    assert facts.reasons == Counter({"empty_text": 12, "null_id": 9})
    assert facts.rows_rejected == 21


def test_one_cause_may_stand_for_many_units() -> None:
    facts = RunFacts("rerank")
    facts.book_failure("group 3: gone", units=4)
    assert facts.failures == ["group 3: gone"] * 4


def test_only_the_first_run_of_a_command_counts_from_the_process() -> None:
    began = psutil.Process().create_time()
    assert take_start() == pytest.approx(time.time(), abs=1)
    count_from_process()
    assert RunFacts("embed").started == pytest.approx(began, abs=0.1)
    assert RunFacts("index").started == pytest.approx(time.time(), abs=1)


@pytest.mark.parametrize(
    "report", [embed_report(), index_report(), search_report(), search_report(scoring=None), rerank_report()]
)
def test_a_report_comes_back_from_its_json_whole_and_any_job_can_read_its_head(report: Report) -> None:
    data = to_json(report)
    assert from_json(type(report), data) == report
    assert to_json(from_json(type(report), data)) == data
    head = from_json(Report, data)
    assert (head.job, head.key, head.complete) == (report.job, report.key, report.complete)
    assert head.files == report.files
    assert json.loads(data)["format_version"] == REPORT_FORMAT_VERSION


def test_a_report_of_another_job_is_no_report_of_this_one() -> None:
    data = to_json(embed_report())
    for kind in (IndexReport, SearchReport, RerankReport):
        with pytest.raises(ValueError, match="Field required"):
            from_json(kind, data)
    with pytest.raises(ValueError, match="Field required"):
        from_json(EmbedReport, b"{}")


def test_a_description_of_an_index_comes_back_whole() -> None:
    index = index_description(files=(FileFact("a", 10, "f", 3), FileFact("b", 5, "f", 2)))
    assert from_json(IndexDescription, to_json(index)) == index
    assert index.bytes == 15
    assert index.tuned_recall == index.recall["@10"]
    tiny = index_description(k=1, recall={"@1": index.recall["@10"]})
    assert tiny.tuned_recall is tiny.recall["@1"]


def test_what_was_saved_is_what_the_devices_would_have_computed_longer() -> None:
    facts = RunFacts("embed")
    facts.start(Workers("cuda", 4.0, {"encoders": 2}), 0.0)
    assert cost_saved(facts, 1_000, 3.6) is None, "nobody knows what a token takes"
    noted = {"tokens": 100, "tokens_encoded": 50, "padded_tokens": 60, "device_s": 10.0, "rows_out": 4}
    facts.book(read_receipt(4, noted))
    assert (facts.tokens, facts.tokens_encoded) == (100, 50)
    # 10 s of an encoder for 50 tokens, 200 s for 1,000, with two GPUs each.
    assert cost_saved(facts, 1_000, 3.6) == pytest.approx(400 * 3.6 / 3600)
    assert cost_saved(facts, 1_000, None) is None
    assert summarise(facts, ended=1.0, price_per_hour=None)["padding_waste"] == pytest.approx(1 - 50 / 60)
