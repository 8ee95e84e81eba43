"""The page of a search or rerank run: what was answered, where the time went, what was left out."""

import json
from typing import Any

from bge_ray.report.page import Html, bars, bullets, folded, page, paragraph, section, table, tiles
from bge_ray.report.words import count, duration, short

MAX_FAILURES = 50
LOW_UTILISATION = 0.8
HIGH_TRUNCATED = 0.2
# Shorter runs are mostly start-up and say little about settings.
MIN_STEADY_S = 60.0


def run_page(report: dict[str, Any]) -> bytes:
    """Return the page of a run.

    Args:
        report: the content of report.json, of a search (with or without reranking) or of a rerank job.
    """
    rows = "queries" if "queries_in" in report else "pairs"
    rejected = sorted(report["rejected_reasons"].items(), key=lambda entry: -entry[1])
    parts = [
        tiles(_figures(report, rows)),
        section(
            "What to change next", bullets(advise(report)) or paragraph("Nothing that these figures show.")
        ),
        section("Not done", bullets(report["failures"][:MAX_FAILURES])),
        section("Where the time went", *_time(report)),
        section("Left out", bars((reason, rows, count(rows, "row")) for reason, rows in rejected)),
        section("The run", folded("All facts", _facts(report))),
    ]
    title = "Search run" if rows == "queries" else "Rerank run"
    lead = f"{report['outcome']}: {report[f'{rows}_out']:,} of {report[f'{rows}_in']:,} {rows}"
    return page(title, "good" if report["complete"] else "bad", lead, parts)


def advise(report: dict[str, Any]) -> list[str]:
    """Return what the figures suggest to change; each line names the setting."""
    lines = []
    scored = _scored(report)
    if scored and report["steady_s"] > MIN_STEADY_S and scored["utilisation"] < LOW_UTILISATION:
        lines.append(
            f"The rerankers computed {scored['utilisation']:.0%} of the time: add CPUs for the stages before "
            "them, or lower rerank.num_rerankers."
        )
    if scored and scored["truncated_pairs"] > HIGH_TRUNCATED * max(1, scored["pairs_out"]):
        lines.append(
            f"{scored['truncated_pairs']:,} pairs were cut: raise rerank.max_length if the model has "
            "positions for more."
        )
    if report.get("truncated_queries", 0) > HIGH_TRUNCATED * max(1, report.get("queries_in", 0)):
        lines.append(
            f"{report['truncated_queries']:,} queries were cut at model.max_length: shorten them, or search "
            "with parts of them."
        )
    if report.get("missing_results"):
        lines.append(
            f"{report['missing_results']:,} results are missing: raise search.nprobe, so that more lists are "
            "probed, unless the data set has fewer passages than search.k."
        )
    return lines


def _scored(report: dict[str, Any]) -> dict[str, Any] | None:
    """Return the facts about reranking, wherever the report has them."""
    scored: dict[str, Any] | None = report if "pairs_in" in report else report.get("rerank")
    return scored


def _figures(report: dict[str, Any], rows: str) -> list[tuple[str, str, str]]:
    scored = _scored(report)
    figures = [
        (rows.capitalize(), f"{report[f'{rows}_out']:,}", f"of {report[f'{rows}_in']:,}"),
        ("Wall time", duration(report["wall_s"]), f"{duration(report['steady_s'])} at work"),
    ]
    if "results" in report:
        figures.append(("Results", short(report["results"]), f"up to {report['k']:,} a query"))
    if scored:
        speed = f"{short(scored['pair_tokens_per_s'])} a second"
        busy = f"{scored['num_rerankers']} of them, padding {scored['padding_waste']:.0%}"
        figures.append(("Tokens of pairs", short(scored["pair_tokens"]), speed))
        figures.append(("Rerankers busy", f"{scored['utilisation']:.0%}", busy))
    return figures


def _time(report: dict[str, Any]) -> list[Html]:
    # `device_s` is a part of `score_s`, so the two are not shown side by side.
    stages = {name: seconds for name, seconds in report["stage_s"].items() if name != "device_s"}
    shown = bars((name.removesuffix("_s"), s, duration(s)) for name, s in stages.items())
    return [paragraph("All stages, summed over their tasks:"), shown] if shown else []


def _facts(report: dict[str, Any]) -> Html:
    return table((name, json.dumps(value, ensure_ascii=False)) for name, value in report.items())
