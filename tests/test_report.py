"""The report adds up what the receipts say, and the page shows it."""

from collections import Counter

from bge_ray.report import RunFacts, advise, make_report, report_html, report_json

EDGES = (8, 16)


def receipt(n: int, start: float, end: float) -> tuple[dict[str, object], dict[str, object]]:
    marker = {
        "unit": {"n_rows": n + 1},
        "rows_out": n,
        "rows_rejected": 1,
        "tokens": 10 * n,
        "truncated": 2,
        "reasons": {"<b>": 1},
        "embeddings": {"bytes": 100},
        "rejected": None,
    }
    facts = {"read_s": 1.0, "tokenise_s": 2.0, "write_s": 0.5, "encode_started": start, "encode_ended": end}
    facts |= {"device_s": end - start, "padded_tokens": 12 * n, "lengths": [n, 0, 0]}
    return marker, facts


def run_of_two() -> RunFacts:
    facts = RunFacts(100.0, num_encoders=2, units_planned=2, length_edges=EDGES)
    facts.add_receipt(*receipt(10, 110.0, 120.0))
    facts.add_receipt(*receipt(30, 115.0, 130.0))
    return facts


def report_of(facts: RunFacts, **extra: object) -> dict[str, object]:
    model = {"name": "m", "dtype": "float32", "pooling": "cls", "max_length": 16}
    given = {"model": model, "output": "s3://b/out", "price_per_hour": 3.6, **extra}
    return make_report(facts, ended=140.0, outcome="complete", extra=given)


def test_sums_rates_and_cost() -> None:
    report = report_of(run_of_two())
    assert (report["rows_in"], report["rows_out"], report["rows_rejected"]) == (42, 40, 2)
    assert report["steady_s"] == 20.0
    assert report["startup_s"] == 10.0
    assert report["tokens_per_s"] == 400 / 20
    assert report["padding_waste"] == 1 - 400 / 480
    assert report["utilisation"] == 25 / 40
    assert report["device_hours"] == 2 * 40 / 3600
    assert report["cost"] == 3.6 * 80 / 3600
    assert report["rejected_reasons"] == {"<b>": 2}
    assert report["stage_s"] == {"encode": 25.0, "read": 2.0, "tokenise": 4.0, "write": 1.0}
    assert report["lengths"]["counts"] == [40, 0, 0]


def test_the_page_is_self_contained_and_escapes_what_it_shows() -> None:
    facts = run_of_two()
    facts.failures.append("s3://b/x rows 1 to 2: <script>")
    page = report_html(report_of(facts), facts).decode()
    assert page.count("<svg") == 3
    assert "&lt;b&gt;" in page
    assert "<script>" not in page
    assert "42 in = 40 out + 2 rejected" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_a_run_with_nothing_done_has_a_report_too() -> None:
    facts = RunFacts(100.0)
    report = report_of(facts)
    assert report["tokens_per_s"] == 0
    assert b"complete" in report_html(report, facts)
    assert b'"rows_in": 0' in report_json(report)


def test_advice_follows_the_figures() -> None:
    quiet = report_of(run_of_two()) | {"padding_waste": 0.01, "truncated": 0}
    assert advise(quiet) == []
    assert "padding" in advise(quiet | {"padding_waste": 0.3})[0]
    assert "cut at 16 tokens" in advise(quiet | {"truncated": 30})[0]
    assert "num_readers" in advise(quiet | {"steady_s": 600, "utilisation": 0.4})[0]


def test_reasons_are_counted_over_units() -> None:
    assert run_of_two().reasons == Counter({"<b>": 2})
