"""The pages of a search and of a rerank run: what was answered, where the time went, what was left out."""

from bge_ray.records.model import EMBEDDING
from bge_ray.records.reports import Report, RerankReport, Scoring, SearchReport
from bge_ray.report.page import Html, page, paragraph, pictures, section, table, tiles
from bge_ray.report.sections import (
    Figure,
    advice_section,
    cost_rows,
    device_name,
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


def search_page(report: SearchReport) -> bytes:
    """Return the page of a search, reranked or not."""
    lost = report.queries_in - report.queries_out if report.complete else report.rows_rejected
    figures = [
        ("Queries answered", f"{report.queries_out:,}", f"of {report.queries_in:,}"),
        ("Results", short(report.results), f"up to {report.k:,} a query"),
        wall_figure(report),
        left_out_figure(report, lost),
        *(_scoring_figures(report.scoring) if report.scoring is not None else []),
        price_figure(report),
    ]
    accounts = (
        f"{report.queries_in:,} queries = {report.queries_out:,} answered + {lost:,} left out, with "
        f"{count(report.results, 'result')}. Of what was found, {report.unknown_ids:,} were of vectors "
        f"that the data set no longer has, {report.doubled_passages:,} of ids that stand twice; "
        f"{count(report.refilled_queries, 'query', 'queries')} asked again for more, "
        f"{count(report.missing_results, 'place')} stayed empty."
    )
    if report.filtered_queries:
        accounts += f" {_filtered(report)}"
    done = f"{report.queries_out:,} of {report.queries_in:,} queries"
    return _page("Search run", report, "queries", done, figures, accounts, _searched(report))


def _filtered(report: SearchReport) -> str:
    """Say what filters did, and what is known of the recall among what passes."""
    told = f"{count(report.filtered_queries, 'query', 'queries')} had a filter"
    if report.few_passing:
        told += (
            f", {report.few_passing:,} one that fewer than {report.k:,} passages pass, which all are results"
        )
    if EMBEDDING not in report.found_by:
        return f"{told}."
    searched = report.filtered_queries - report.compared_all
    told += f". For {report.compared_all:,} of them all vectors that pass were compared"
    if searched and report.index is not None:
        told += (
            f", for {searched:,} an index was searched, whose recall was measured without filters: what it "
            "is among what passes is not known"
        )
    return f"{told}."


def rerank_page(report: RerankReport) -> bytes:
    """Return the page of a rerank run."""
    lost = report.pairs_in - report.pairs_out if report.complete else report.rows_rejected
    figures = [
        ("Pairs scored", f"{report.pairs_out:,}", f"of {report.pairs_in:,}, {report.queries:,} queries"),
        wall_figure(report),
        left_out_figure(report, lost + report.lists_rejected),
        *_scoring_figures(report.scoring),
        price_figure(report),
    ]
    accounts = (
        f"{report.pairs_in:,} pairs = {report.pairs_out:,} scored + {lost:,} left out, of "
        f"{count(report.queries, 'query', 'queries')}; {count(report.lists_rejected, 'candidate list')} left "
        "out whole."
    )
    identity = [("Candidates", report.candidates), *_reranker(report.scoring)]
    done = f"{report.pairs_out:,} of {report.pairs_in:,} pairs"
    return _page("Rerank run", report, "pairs", done, figures, accounts, identity)


def _page(
    title: str,
    report: SearchReport | RerankReport,
    rows: str,
    done: str,
    figures: list[Figure],
    accounts: str,
    identity: list[tuple[str, str]],
) -> bytes:
    if not report.complete:
        accounts = (
            f"Nothing of this run is published. {report.rows_in:,} of {report.rows_planned:,} {rows} that "
            "were to do are done and kept for the next run."
        )
    parts = [
        tiles(figures),
        advice_section(report),
        failures_section(report),
        section(rows.capitalize(), paragraph(accounts), *_trec(report), *left_out(report, "", REJECTED)),
        section("Cost", table([*cost_rows(report), ("Speed", _speed(report, rows))])),
        section("Where the time went", *_time(report, rows)),
        run_section(report, identity),
    ]
    lead = f"{report.outcome}: {done}" if report.complete else report.outcome
    return page(title, "good" if report.complete else "bad", lead, parts)


REJECTED = "rejected.parquet"


def _scoring_figures(scoring: Scoring) -> list[Figure]:
    busy = f"{count(scoring.num_rerankers, 'reranker')}, padding {scoring.padding_waste:.0%}"
    return [
        ("Tokens of pairs", short(scoring.pair_tokens), f"{short(scoring.pair_tokens_per_s)} a second"),
        ("Rerankers busy", f"{scoring.utilisation:.0%}", busy),
    ]


def _speed(report: Report, rows: str) -> str:
    return (
        f"{report.rows_per_s:,.1f} {rows}/s and {report.tokens_per_s:,.0f} tokens/s at work, on "
        f"{report.devices:g} {device_name(report)}{'' if report.devices == 1 else 's'}"
    )


def _trec(report: SearchReport | RerankReport) -> list[Html]:
    return [paragraph(f"There is no run.trec: {why}") for why in report.without_trec]


def _time(report: Report, rows: str) -> list[Html]:
    stages = [(name, seconds, "") for name, seconds in report.stage_s.items()]
    picture = throughput_picture(report.throughput.rows_per_s, report.throughput.bin_s, f"{rows}/s")
    told = stage_bars(stages, "All stages, summed over their tasks:")
    return [phase_bars(report), *told, pictures(picture)]


def _searched(report: SearchReport) -> list[tuple[str, str]]:
    rows = [("Queries", report.queries), ("Data set", report.dataset), ("Model", report.model.name)]
    rows.append(("Searched", report.way or "all embedding shards, exactly"))
    if report.passing is not None:
        rows.append(("Filter", f"{report.filter}, which {count(report.passing, 'vector')} pass"))
    if report.index is not None:
        index = report.index
        way = f" at {index.parameter} {index.effort:,}" if index.parameter else ""
        rows.append(("Index", f"{index.factory}, of {index.ntotal:,} vectors{way}"))
    if report.sparse is not None:
        sparse = report.sparse
        way = f"query_cut {sparse.pruning.query_cut}, heap_factor {sparse.pruning.heap_factor:g}"
        found = way if sparse.taken else f"exactly; {way} missed {sparse.target:g}"
        rows.append(("Weights", f"{found}: {sparse}; indexes made in {sparse.build_s:.1f} s"))
    if report.scoring is not None:
        rows += _reranker(report.scoring)
    return rows


def _reranker(scoring: Scoring) -> list[tuple[str, str]]:
    """Name the reranker, and where its layers score the columns of run.parquet in which they do."""
    rows = [("Reranker", str(scoring.model["name"]))]
    layers = scoring.model.get("layers")
    if layers:
        names = [output["name"] for output in scoring.model["outputs"]]
        rows.append(("Columns of scores", f"{', '.join(names)}; score is of layer {layers[-1]}"))
    return rows
