"""What the pages of all jobs show in the same way: figures, time, what was left out, cost, the run."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bge_ray.records.reports import RejectedRow, Report
from bge_ray.report.page import ACCENT, Html, bars, bullets, folded, paragraph, picture, section, table
from bge_ray.report.words import count, duration

MAX_FAILURES = 50
PHASES = {
    "launch": ("launching", "Python, imports, settings"),
    "plan": ("planning", "reading what there is to do, joining or starting Ray"),
    "start": ("starting", "workers, loading models, the first unit"),
    "work": ("working", "from the first unit at work to the last"),
    "finish": ("finishing", "putting files together and publishing them"),
}
REASONS = {
    "malformed_line": "the line cannot be parsed",
    "null_id": "the id is missing or empty",
    "non_string_id": "the id is neither text nor a whole number",
    "duplicate_id": "the id stands earlier in the same work unit",
    "null_text": "the text is missing",
    "non_string_text": "text or title is not text",
    "empty_text": "nothing but white space and what nobody sees",
    "invalid_unicode": "not valid Unicode",
    "no_tokens": "the tokenizer makes no token of it",
    "unknown_token": "the tokenizer makes a token of it that the model does not know",
    "non_finite": "the vector holds NaN or infinity",
    "out_of_memory": "the row alone does not fit in memory",
    "killed_worker": "the row ended its process twice",
    "unknown_query": "no query of this id is given",
    "empty_query": "the query is nothing but white space",
    "empty_list": "the query has no candidate",
    "unknown_passage": "the data set has no passage of this id",
    "duplicate_query": "the query's candidates stand in two places",
    "duplicate_passage": "the passage stands twice in the list",
    "malformed": "the line cannot be parsed",
    "no_result": "nothing was found for the query",
    "no_positive": "the query has no positive",
    "unknown_positive": "a positive, or all of a query, is not in the data set",
    "unscored_positive": "no positive of the query has a score of the teacher",
    "no_negative": "the rules left the query no negative",
    "held_out": "a query that measures the model has the same text",
}

Figure = tuple[str, str, str]


def wall_figure(report: Report) -> Figure:
    """Return how long the run took, and how much of that was no work."""
    return "Wall time", duration(report.wall_s), f"{duration(report.startup_s)} of it start-up"


def left_out_figure(report: Report, left_out: int) -> Figure:
    """Return how much was left out, and the reason that most of it had."""
    reasons = sorted(report.rejected_reasons.items(), key=lambda entry: -entry[1])
    remark = "nothing" if not left_out else "see below"
    if reasons:
        more = f" and {count(len(reasons) - 1, 'other reason')}" if len(reasons) > 1 else ""
        remark = f"{reasons[0][0]}{more}"
    return "Left out", f"{left_out:,}", remark


def price_figure(report: Report) -> Figure:
    """Return what the run cost, or the hours of devices that it is to be paid for."""
    hours = f"{report.device_hours:,.3f} {device_name(report)} hours"
    if report.cost is None:
        return (
            f"{device_name(report)} hours",
            f"{report.device_hours:,.3f}",
            "report.price_per_hour is not set",
        )
    return "Price", f"{report.cost:,.2f}", hours


def advice_section(report: Report) -> Html:
    """Return what to change next."""
    nothing = "Nothing: no figure is beyond what it should be."
    if not report.units_done:
        nothing = "Nothing to say: no unit was done."
    return section("What to change next", bullets(report.advice) or paragraph(nothing))


def failures_section(report: Report) -> Html:
    """Return what is not done, and why; nothing if all is."""
    left = report.units_planned - report.units_done
    if report.complete or (not left and not report.failures):
        return Html("")
    rows = report.rows_planned - report.rows_in
    words = (
        f"{left:,} of {report.units_planned:,} units, {rows:,} of {report.rows_planned:,} rows. Run the job "
        "again: it does these and nothing else."
    )
    # One cause may stand for all units of a group.
    causes = Counter(report.failures)
    shown = [f"{cause} ({n:,} units)" if n > 1 else cause for cause, n in list(causes.items())[:MAX_FAILURES]]
    if len(causes) > MAX_FAILURES:
        shown.append(f"and {len(causes) - MAX_FAILURES:,} more causes; report.json has all")
    return section("Not done", paragraph(words), bullets(shown))


def left_out(report: Report, folder: str, everything: str) -> list[Html]:
    """Return what was left out, by reason and with examples.

    Args:
        report: of any job.
        folder: which most examples lie in; naming it in every line would hide what differs.
        everything: where every one of them is named.
    """
    reasons = sorted(report.rejected_reasons.items(), key=lambda entry: -entry[1])
    counts = bars((reason, rows, _meaning(reason, rows)) for reason, rows in reasons)
    examples = [_example(row, folder) for row in report.rejected_examples]
    # Rows of a search or rerank run have no place, or tell it among what was wrong.
    columns = 4 if any(example[-1] for example in examples) else 3
    header = ("reason", "id", "what was wrong", "where")[:columns]
    shown = table((example[:columns] for example in examples), header)
    if not shown:
        return [counts]
    return [counts, paragraph(f"Some of them; {everything} names every one. Rows are counted from 0."), shown]


def _meaning(reason: str, rows: int) -> str:
    words = count(rows, "row")
    return f"{words}: {REASONS[reason]}" if reason in REASONS else words


def _example(row: RejectedRow, folder: str) -> tuple[str, str, str, str]:
    ids = [str(name) for name in (row.query_id, row.passage_id) if name is not None]
    place = "" if row.uri is None else row.uri.removeprefix("file://").removeprefix(f"{folder.rstrip('/')}/")
    where = place if row.row is None else f"{place}, row {row.row:,}"
    return row.reason, ", ".join(ids) or "none", row.detail, where


def phase_bars(report: Report) -> Html:
    """Return where the wall time went."""
    return bars(
        (PHASES[phase][0], seconds, f"{duration(seconds)}: {PHASES[phase][1]}")
        for phase, seconds in report.phase_s.items()
    )


def stage_bars(stages: Iterable[tuple[str, float, str]], words: str) -> list[Html]:
    """Return the seconds of stages, each as (name, seconds, remark), under a line of words."""
    shown = bars((name, seconds, f"{duration(seconds)}{remark}") for name, seconds, remark in stages)
    return [paragraph(words), shown] if shown else []


def throughput_picture(rates: Sequence[float], bin_s: float, unit: str) -> Html:
    """Return how fast the run went over its time; nothing if it did not go."""
    if not any(rates):
        return Html("")

    def draw(axes: Any) -> None:
        axes.stairs(rates, [k * bin_s for k in range(len(rates) + 1)], fill=True, color=ACCENT)
        axes.yaxis.set_major_formatter("{x:,.0f}")

    return picture("Throughput", "seconds since the start", unit, draw)


def cost_rows(report: Report) -> list[tuple[str, str]]:
    """Return what the run cost, for a table."""
    device = device_name(report)
    rows = [
        (
            f"{device} hours",
            f"{report.device_hours:,.3f}: {report.devices:g} for {duration(report.wall_s)}",
        )
    ]
    if report.cost is None:
        return [*rows, ("Price", f"unknown; report.price_per_hour takes that of a {device} hour")]
    rows.append(("Price", f"{report.cost:,.4f} at {report.price_per_hour:g} a {device} hour"))
    if report.cost_per_million_tokens is not None:
        rows.append(("Per million tokens", f"{report.cost_per_million_tokens:,.5f}"))
    return rows


def run_section(report: Report, facts: Iterable[tuple[str, str]]) -> Html:
    """Return which run it was, what else identifies it, its files and its settings."""
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(report.started))
    rows = [*facts, ("Began", began), ("Run", report.run_id)]
    files = table(
        ((f.path, f"{f.rows:,}", f"{f.bytes:,}", f.sha256) for f in report.files),
        ("file", "rows", "bytes", "sha256"),
    )
    settings = table(
        (f"{name}.{key}", json.dumps(value, ensure_ascii=False))
        for name, keys in report.settings.items()
        for key, value in keys.items()
    )
    shown = [folded("Files", files)] if files else []
    return section("The run", table(rows), *shown, folded("All settings", settings))


def device_name(report: Report) -> str:
    """Return what is paid for by the hour."""
    return "GPU" if report.device == "cuda" else "CPU core"
