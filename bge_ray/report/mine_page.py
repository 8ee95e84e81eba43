"""The page of a mining run: which rule dropped what, with examples, and how far the negatives are away."""

from typing import Any

from bge_ray.records.reports import MinedExample, MineReport
from bge_ray.report.page import ACCENT, Html, bars, page, paragraph, picture, pictures, section, table, tiles
from bge_ray.report.sections import (
    advice_section,
    cost_rows,
    failures_section,
    left_out,
    left_out_figure,
    phase_bars,
    price_figure,
    run_section,
    stage_bars,
    throughput_picture,
    wall_figure,
)
from bge_ray.report.words import count, short

MEANINGS = {
    "positive": "listed as positives of the query",
    "same_text": "the text of a positive, or of the query itself, under another id",
    "copy_by_vector": "as like a positive as mine.copy_cosine says, by the vectors",
    "copy_by_words": "as like a positive as mine.copy_overlap says, by the words",
    "max_score": "above mine.max_score",
    "margin": "not far enough below the lowest positive by the vectors",
    "skipped": "among the first of the list, as mine.skip says",
    "teacher_margin": "not far enough below the lowest positive by the teacher",
    "not_drawn": "left over: there were enough negatives",
    "negative": "taken as negatives",
}
REJECTED = "rejected.parquet"


def mine_page(report: MineReport) -> bytes:
    """Return the page of a mining run."""
    lost = report.queries_in - report.queries_out if report.complete else report.rows_rejected
    figures = [
        ("Queries mined for", f"{report.queries_out:,}", f"of {report.queries_in:,}"),
        ("Negatives", short(report.negatives), f"{_mean(report):.1f} a query"),
        wall_figure(report),
        left_out_figure(report, lost),
        price_figure(report),
    ]
    parts = [
        tiles(figures),
        advice_section(report),
        failures_section(report),
        section("Queries", *_queries(report, lost), *left_out(report, "", REJECTED)),
        section("What became of the results", *_verdicts(report)),
        section("Examples", _examples(report)),
        section("Cost", table(cost_rows(report))),
        section("Where the time went", *_time(report)),
        run_section(report, _identity(report)),
    ]
    lead = f"{report.outcome}: {count(report.negatives, 'negative')} for {report.queries_out:,} queries"
    if not report.complete:
        lead = report.outcome
    return page("Mining run", "good" if report.complete else "bad", lead, parts)


def _mean(report: MineReport) -> float:
    return report.negatives / report.queries_out if report.queries_out else 0.0


def _queries(report: MineReport, lost: int) -> list[Html]:
    if not report.complete:
        words = (
            f"Nothing of this run is published. {report.rows_in:,} of {report.rows_planned:,} queries that "
            "were to do are done and kept for the next run."
        )
        return [paragraph(words)]
    verdicts = report.verdicts
    return [
        paragraph(
            f"{report.queries_in:,} queries = {report.queries_out:,} mined for + {lost:,} left out; "
            f"{report.queries_unjudged:,} more had no judgement and were passed by. "
            f"{count(report.queries_short, 'query', 'queries')} have fewer negatives than asked for; "
            f"{count(report.tuples, 'tuple')} could be made of the others."
        ),
        paragraph(
            f"{verdicts['positive']:,} positives, {report.positives_beyond:,} of them not among the results "
            f"of their queries; {report.positives_unknown:,} more are not in the data set."
        ),
    ]


def _verdicts(report: MineReport) -> list[Html]:
    results = {name: rows for name, rows in report.verdicts.items() if name != "positive"}
    shown = bars((name, rows, f"{rows:,}: {MEANINGS[name]}") for name, rows in results.items() if rows)
    gaps = report.gaps

    def draw(axes: Any) -> None:
        edges = (0.0, *gaps.upper_edges)
        width = gaps.upper_edges[0]
        axes.bar([edge + width / 2 for edge in edges], gaps.counts, width * 0.9, color=ACCENT)
        axes.yaxis.set_major_formatter("{x:,.0f}")

    if not any(gaps.counts):
        return [shown]
    title, across = (
        "How far negatives are away",
        "lowest positive's score minus the negative's, by the vectors",
    )
    return [shown, pictures(picture(title, across, "negatives", draw))]


def _examples(report: MineReport) -> Html:
    rows = [
        (found.verdict, found.query, found.positive, found.passage, _numbers(found))
        for verdict in report.verdicts
        for found in report.examples
        if found.verdict == verdict
    ]
    return table(rows, ("verdict", "query", "its best positive", "result", "numbers"))


def _numbers(found: MinedExample) -> str:
    numbers = [f"score {found.score:.3f}, positive's {found.positive_score:.3f}"]
    numbers += [f"cosine {found.cosine:.3f}"] if found.cosine is not None else []
    numbers += [f"words in common {found.overlap:.0%}"] if found.overlap is not None else []
    return "; ".join(numbers)


def _time(report: MineReport) -> list[Html]:
    stages = [(name, seconds, "") for name, seconds in report.stage_s.items()]
    drawn = throughput_picture(report.throughput.rows_per_s, report.throughput.bin_s, "queries/s")
    return [phase_bars(report), *stage_bars(stages, "All stages, summed over their tasks:"), pictures(drawn)]


def _identity(report: MineReport) -> list[tuple[str, str]]:
    searched = "all embedding shards, exactly" if report.exact else "the index of the data set"
    rows = [
        ("Queries", report.queries),
        ("Data set", report.dataset),
        ("Model", report.model.name),
        ("Searched", searched),
    ]
    return rows if report.teacher is None else [*rows, ("Teacher", report.teacher)]
