"""The page of an index: what it is, what it finds, how its lists are filled, what to change next."""

from typing import Any

import numpy as np

from bge_ray.records.ids import IdArray
from bge_ray.records.index import IndexDescription, Recall
from bge_ray.records.reports import IndexReport
from bge_ray.report.page import (
    ACCENT,
    ALERT,
    FAINT,
    Html,
    page,
    paragraph,
    picture,
    pictures,
    section,
    table,
    tiles,
)
from bge_ray.report.sections import (
    Figure,
    advice_section,
    cost_rows,
    failures_section,
    phase_bars,
    price_figure,
    run_section,
    stage_bars,
    wall_figure,
)
from bge_ray.report.words import size

# Points of the curve of list sizes.
MAX_POINTS = 500


def index_page(report: IndexReport, sizes: IdArray | None) -> bytes:
    """Return the page of an index build.

    Args:
        report: of the build.
        sizes: (nlist,) vectors in each list; None if there are no lists.
    """
    index = report.index
    steps = [(name, seconds, "") for name, seconds in report.stage_s.items()]
    time_spent = section(
        "Where the time went", phase_bars(report), *stage_bars(steps, "The steps, one after the other:")
    )
    if index is None:
        parts = [tiles([wall_figure(report), price_figure(report)]), failures_section(report), time_spent]
        return page(
            "Index", "bad", report.outcome, [*parts, run_section(report, [("Data set", report.output)])]
        )
    parts = [
        tiles(_figures(report, index)),
        advice_section(report),
        section("Recall", paragraph(_measurement(index)), table(_recalls(index), RECALL_HEADER)),
        section("Pictures", pictures(*_pictures(index, sizes))),
        section("Cost", table(cost_rows(report))),
        time_spent,
        run_section(report, _identity(report, index, sizes)),
    ]
    return page("Index", "good" if index.reached else "bad", _verdict(index), parts)


RECALL_HEADER = ("", "recall", "between", "at most, with this code")


def _measurement(index: IndexDescription) -> str:
    rescored = f" of {index.rescore:,} candidates scored again exactly" if index.rescore else ""
    return (
        "The share of the true nearest passages, by exact search over all embedding shards, that a search "
        f"for {index.k:,} results{rescored} finds; with a 95 % interval. Measured with "
        f"{index.num_queries:,} queries: {index.queries}."
    )


def _verdict(index: IndexDescription) -> str:
    way = f" at {index.parameter} {index.effort:,}" if index.parameter else ""
    reached = "reached" if index.reached else "not reached"
    return f"recall@{index.tuned_recall.k} of {index.recall_target:g} {reached}{way}"


def _figures(report: IndexReport, index: IndexDescription) -> list[Figure]:
    found, reranked = index.tuned_recall, index.recall_after_exact_reranking
    return [
        ("Vectors", f"{index.ntotal:,}", f"of {index.dim:,} dimensions, none left out"),
        ("Size", size(index.bytes), f"{index.bytes / max(1, index.ntotal):,.0f} bytes a vector"),
        wall_figure(report),
        (f"Recall@{found.k}", f"{found.value:.3f}", "as searched"),
        (
            f"Recall@{reranked.k} rescored",
            f"{reranked.value:.3f}",
            f"{index.gain_of_exact_reranking:+.4f} by exact scores",
        ),
        price_figure(report),
    ]


def _recalls(index: IndexDescription) -> list[tuple[str, str, str, str]]:
    ceilings = index.ceiling or {}
    rows = [
        (f"recall{depth}", *_measured(found), f"{ceilings[depth].value:.4f}" if depth in ceilings else "")
        for depth, found in index.recall.items()
    ]
    reranked = index.recall_after_exact_reranking
    if index.rescore:
        codes = index.recall_of_codes.items()
        rows += [(f"recall{depth}, not rescored", *_measured(found), "") for depth, found in codes]
    words = f"recall@{reranked.k}, {index.reranked_candidates:,} candidates rescored exactly"
    return [*rows, (words, *_measured(reranked), "")]


def _measured(recall: Recall) -> tuple[str, str]:
    return f"{recall.value:.4f}", f"{recall.low:.4f} and {recall.high:.4f}"


def _identity(report: IndexReport, index: IndexDescription, sizes: IdArray | None) -> list[tuple[str, str]]:
    rows = [("Data set", report.output), ("Factory", f"{index.factory}, {index.metric}")]
    if sizes is not None:
        longest, empty = int(sizes.max()), int((sizes == 0).sum())
        words = (
            f"{index.nlist:,}; longest {longest:,}, empty {empty:,}; a search scans "
            f"{index.imbalance:.2f} times what it would over equal lists; {index.drift:.0%} "
            "out of place since the training"
        )
        rows.append(("Lists", words))
    rows += [("Training", index.training.sha256), ("Data set fingerprint", index.vector_fingerprint)]
    return rows


def _pictures(index: IndexDescription, sizes: IdArray | None) -> list[Html]:
    drawn = []
    if index.parameter and index.curve:
        title = f"Recall against {index.parameter}"
        drawn.append(picture(title, index.parameter, "recall", lambda axes: _draw_recall(axes, index)))
    if sizes is not None and len(sizes) > 1:
        drawn.append(
            picture("List sizes", "lists, longest first", "vectors", lambda axes: _draw_sizes(axes, sizes))
        )
    return drawn


def _draw_recall(axes: Any, index: IndexDescription) -> None:
    efforts = [point.effort for point in index.curve]
    for depth, marker in zip(index.curve[0].recall, "^osD", strict=False):
        if all(depth in point.recall for point in index.curve):
            values = [point.recall[depth] for point in index.curve]
            color, line = (ACCENT, "-") if depth == f"@{index.k}" else (FAINT, ":")
            axes.plot(
                efforts,
                values,
                marker=marker,
                markersize=4,
                color=color,
                linestyle=line,
                label=f"recall{depth}",
            )
    axes.axhline(index.recall_target, color=ALERT, linewidth=1)
    place = (0.01, index.recall_target)
    axes.annotate(
        f"target {index.recall_target:g}",
        place,
        xycoords=("axes fraction", "data"),
        va="bottom",
        color=ALERT,
    )
    axes.axvline(index.effort, color=ALERT, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(frameon=False, loc="lower right")


def _draw_sizes(axes: Any, sizes: IdArray) -> None:
    order = np.sort(sizes)[::-1]
    shown = np.unique(np.linspace(0, len(order) - 1, MAX_POINTS).astype(int))
    axes.fill_between(shown + 1, order[shown], step="mid", color=ACCENT)
    mean = sizes.mean()
    axes.axhline(mean, color=ALERT, linewidth=1)
    axes.annotate(
        f"mean {mean:,.0f}",
        (1, mean),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color=ALERT,
    )
    axes.set_ylim(bottom=0)
