"""The report adds up what the receipts say, the advice follows its figures, the page shows both."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from bge_ray.report import advice
from bge_ray.report.advice import advise
from bge_ray.report.embed_page import embed_page
from bge_ray.report.facts import EXAMPLES_PER_REASON, RunFacts, Workers, make_report, report_json
from bge_ray.report.index_page import advise as advise_index
from bge_ray.report.index_page import index_page
from bge_ray.report.run_page import advise as advise_run
from bge_ray.report.run_page import run_page
from bge_ray.settings.sections import Settings

EDGES = (8, 16)
HOSTILE = "<script>alert('x')</script>"


def receipt(n: int, start: float, end: float) -> tuple[dict[str, Any], dict[str, Any]]:
    marker = {
        "unit": {"n_rows": n + 1},
        "rows_out": n,
        "rows_rejected": 1,
        "tokens": 10 * n,
        "truncated": 2,
        "reasons": {"empty_text": 1},
        "embeddings": {"bytes": 100},
        "rejected": None,
    }
    example = {"passage_id": HOSTILE, "reason": "empty_text", "detail": HOSTILE, "uri": HOSTILE, "row": 3}
    facts = {"read_s": 1.0, "tokenise_s": 2.0, "write_s": 0.5, "encode_started": start, "encode_ended": end}
    facts |= {"device_s": end - start, "padded_tokens": 12 * n, "lengths": [n, 0, 0], "text_bytes": 50 * n}
    facts |= {"waited_s": 1.0, "memory_splits": 0, "rejected_examples": [example]}
    return marker, facts


def run_of_two() -> RunFacts:
    workers = Workers("cpu", devices=2.0, encoders=2, readers=1, writers=1)
    facts = RunFacts(100.0, "run-7", workers, pipeline_started=104.0, units_planned=2, length_edges=EDGES)
    facts.rows_planned = 42
    facts.add_receipt(*receipt(10, 110.0, 120.0))
    facts.add_receipt(*receipt(30, 115.0, 130.0))
    return facts


def report_of(facts: RunFacts, outcome: str = "complete", **extra: object) -> dict[str, Any]:
    model = {"name": HOSTILE, "dtype": "float32", "pooling": "cls", "max_length": 16}
    given = {"model": model, "output": "s3://b/out", "corpus": "s3://b/in", "price_per_hour": 3.6, "plan": 1}
    given |= {"vector_fingerprint": "f", "settings": Settings().model_dump(mode="json"), **extra}
    return make_report(facts, ended=140.0, outcome=outcome, extra=given)


def index_of(**changes: object) -> dict[str, Any]:
    recall = {"k": 10, "value": 0.96, "low": 0.95, "high": 0.97}
    return {
        "factory": HOSTILE,
        "metric": "l2",
        "dim": 8,
        "ntotal": 100,
        "nlist": 8,
        "files": [{"bytes": 1000}],
        "training": {"sha256": "f"},
        "vector_fingerprint": "f",
        "effort": "nprobe",
        "nprobe": 2,
        "recall_target": 0.95,
        "reached": True,
        "queries": HOSTILE,
        "num_queries": 10,
        "recall": {"@10": recall},
        "ceiling": {"@10": recall},
        "recall_after_exact_reranking": recall,
        "gain_of_exact_reranking": 0.0,
        "curve": [{"nprobe": 1, "@10": 0.9}, {"nprobe": 2, "@10": 0.96}],
        "imbalance": 1.2,
        "drift": 0.0,
        **changes,
    }


def test_sums_rates_and_cost() -> None:
    report = report_of(run_of_two())
    assert (report["rows_in"], report["rows_out"], report["rows_rejected"]) == (42, 40, 2)
    assert report["steady_s"] == 20.0
    assert report["startup_s"] == 10.0
    assert report["tokens_per_s"] == 400 / 20
    assert report["padding_waste"] == 1 - 400 / 480
    assert report["utilisation"] == 25 / 40
    assert report["waiting"] == 2 / 40
    assert report["readers_busy"] == 6 / 20
    assert report["device_hours"] == 2 * 40 / 3600
    assert report["cost"] == 3.6 * 80 / 3600
    assert report["cost_per_million_tokens"] == report["cost"] / 400 * 1e6
    assert (report["bytes_in"], report["bytes_out"]) == (2000, 200)
    assert report["rejected_reasons"] == {"empty_text": 2}
    assert report["stage_s"] == {"encode": 25.0, "read": 2.0, "tokenise": 4.0, "write": 1.0}
    assert report["lengths"]["counts"] == [40, 0, 0]
    assert report["run_id"] == "run-7"


def test_the_phases_are_the_whole_time_and_the_throughput_all_tokens() -> None:
    report = report_of(run_of_two())
    assert report["phase_s"] == {"plan": 4.0, "start": 6.0, "encode": 20.0, "finish": 10.0}
    throughput = report["throughput"]
    assert sum(throughput["tokens_per_s"]) * throughput["bin_s"] == pytest.approx(400)
    idle = report_of(RunFacts(100.0))
    assert sum(idle["phase_s"].values()) == idle["wall_s"] == 40.0


def test_few_examples_of_each_reason_are_kept() -> None:
    facts = run_of_two()
    for _ in range(10):
        facts.add_receipt(*receipt(10, 110.0, 120.0))
    assert len(facts.rejected_examples) == EXAMPLES_PER_REASON
    assert facts.reasons == Counter({"empty_text": 12})


def test_the_page_says_what_happened_and_escapes_what_it_shows() -> None:
    facts = run_of_two()
    facts.failures.append(f"s3://b/x rows 1 to 2: {HOSTILE}")
    page = embed_page(report_of(facts, f"incomplete: {HOSTILE}")).decode()
    assert "42 in = 40 embedded + 2 rejected" in page
    assert "<script" not in page.lower()
    assert (
        page.count("&lt;script&gt;") == 9
    )  # outcome, failure, model; id, detail and place of two rejected rows
    assert page.count("<svg") == 2
    page = index_page(index_of(), np.array([10, 20, 70])).decode()
    assert "<script" not in page.lower()
    assert page.count("&lt;script&gt;") == 2
    assert page.count("<svg") == 2


def test_a_run_with_nothing_done_has_a_report_too() -> None:
    report = report_of(RunFacts(100.0))
    assert report["tokens_per_s"] == 0
    assert b"Complete" in embed_page(report)
    assert b'"rows_in": 0' in report_json(report)


def test_an_index_without_lists_has_a_page_too() -> None:
    flat = index_of(effort=None, nprobe=None, curve=[], ceiling=None, nlist=0)
    assert index_page(flat, None).count(b"<svg") == 0


def test_good_figures_need_no_advice() -> None:
    assert advise(quiet()) == []
    assert advise_index(index_of()) == []
    assert advise_index(index_of(nprobe=6)) == []  # of 8 lists
    assert b"Nothing: no figure" in embed_page(quiet() | {"advice": []})


def quiet() -> dict[str, Any]:
    return report_of(run_of_two()) | {"padding_waste": 0.01, "truncated": 0, "rows_rejected": 0}


LONG = {"steady_s": 600.0, "wall_s": 610.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {**LONG, "utilisation": 0.4, "waiting": 0.5},
            ["40%", "waited for input 50%", "num_readers above 1"],
        ),
        ({**LONG, "utilisation": 0.4, "waiting": 0.01}, ["too few units", "batching.unit_rows"]),
        ({"units_done": 100, "rows_in": 4_000_000}, ["0.25 s", "raise batching.unit_rows above 50,000"]),
        ({"units_done": 100, "rows_in": 100}, ["merge the corpus objects"]),
        ({"memory_splits": 3}, ["halved: 3", "batching.token_budget"]),
        ({"padding_waste": 0.3}, ["30%", "batching.unit_rows"]),
        ({"truncated": 30}, ["75%", "cut at 16 tokens", "model.max_length"]),
        ({"rows_rejected": 2, "rows_in": 300}, ["3 are allowed", "corpus.max_rejected_fraction"]),
        ({"wall_s": 600.0, "startup_s": 400.0}, ["67%", "start-up"]),
    ],
)
def test_advice_follows_the_figures(change: dict[str, Any], words: list[str]) -> None:
    lines = advise(quiet() | change)
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]


def test_advice_begins_at_its_threshold() -> None:
    just = advice.HIGH_PADDING
    assert advise(quiet() | {"padding_waste": just}) == []
    assert len(advise(quiet() | {"padding_waste": just + 1e-6})) == 1
    waiting = quiet() | LONG | {"waiting": 0.5}
    assert advise(waiting | {"utilisation": advice.LOW_UTILISATION}) == []
    assert len(advise(waiting | {"utilisation": advice.LOW_UTILISATION - 1e-6})) == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"reached": False}, "search.rescore"),
        ({"imbalance": 3.0}, "uneven"),
        ({"nprobe": 96, "nlist": 128}, "75% of the lists"),
    ],
)
def test_advice_on_an_index(change: dict[str, Any], word: str) -> None:
    (line,) = advise_index(index_of(**change))
    assert word in line


def search_of(**changes: object) -> dict[str, Any]:
    reranked = {"truncated_pairs": 0, "pairs_out": 40, "utilisation": 0.9, "padding_waste": 0.0}
    reranked |= {"pair_tokens": 4000, "pair_tokens_per_s": 400.0, "num_rerankers": 2}
    return {
        "complete": True,
        "outcome": "complete",
        "queries": HOSTILE,
        "queries_in": 10,
        "queries_out": 9,
        "results": 90,
        "k": 10,
        "rejected_reasons": {"empty_query": 1},
        "missing_results": 0,
        "truncated_queries": 0,
        "failures": [HOSTILE],
        "wall_s": 100.0,
        "steady_s": 70.0,
        "stage_s": {"score_s": 9.0, "device_s": 8.0, "write_s": 1.0},
        "rerank": reranked,
        **changes,
    }


def test_the_page_of_a_search_and_of_a_rerank_run() -> None:
    page = run_page(search_of()).decode()
    assert "Complete: 9 of 10 queries" in page
    assert "<script" not in page.lower()
    assert "1 row<" in page
    assert "90%" in page  # 9 of 10 s of the stages, and the rerankers' share
    pairs = {key: value for key, value in search_of().items() if "quer" not in key and key != "results"}
    page = run_page(pairs | pairs.pop("rerank") | {"pairs_in": 40}).decode()
    assert "Rerank run" in page
    assert "40 of 40 pairs" in page


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"missing_results": 5}, "search.nprobe"),
        ({"truncated_queries": 5}, "model.max_length"),
        ({"rerank": search_of()["rerank"] | {"truncated_pairs": 30}}, "rerank.max_length"),
        ({"rerank": search_of()["rerank"] | {"utilisation": 0.3}}, "rerank.num_rerankers"),
    ],
)
def test_advice_on_a_search(change: dict[str, Any], word: str) -> None:
    assert advise_run(search_of()) == []
    (line,) = advise_run(search_of(**change))
    assert word in line
