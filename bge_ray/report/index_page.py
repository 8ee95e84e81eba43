"""The page of an index: what it is, what it finds, how its lists are filled, what to change next."""

from typing import Any

import numpy as np

from bge_ray.records.ids import IdArray
from bge_ray.report.page import (
    ACCENT,
    ALERT,
    FAINT,
    Html,
    bullets,
    page,
    paragraph,
    picture,
    pictures,
    section,
    table,
    tiles,
)
from bge_ray.report.words import size

# A search scans this many times what it would over equal lists; k-means on embeddings gives 1.1 to 2.
HIGH_IMBALANCE = 2.5
# Of the lists, probed to reach the target: more is little better than reading everything.
HIGH_PROBED = 0.25
MIN_LISTS = 64
# Points of the curve of list sizes.
MAX_POINTS = 500


def index_page(index: dict[str, Any], sizes: IdArray | None) -> bytes:
    """Return the page of an index.

    Args:
        index: the content of index.json.
        sizes: (nlist,) vectors in each list; None if there are no lists.
    """
    parts = [
        tiles(_figures(index)),
        section(
            "What to change next",
            bullets(advise(index)) or paragraph("Nothing: no figure is beyond what it should be."),
        ),
        section(
            "Recall",
            paragraph(
                "The share of the true nearest passages, by exact search over all embedding shards, that the "
                f"index returns; with a 95 % interval. Measured with {index['num_queries']:,} queries: "
                f"{index['queries']}."
            ),
            table(_recalls(index), ("", "recall", "between", "at most, with this code")),
        ),
        section("Pictures", pictures(*_pictures(index, sizes))),
        section("The index", table(_identity(index, sizes))),
    ]
    return page("Index", "good" if index["reached"] else "bad", _verdict(index), parts)


def advise(index: dict[str, Any]) -> list[str]:
    """Return what the figures suggest to change; each line names the setting."""
    lines = []
    ceiling = (index["ceiling"] or {}).get("@10")
    if not index["reached"]:
        bound = f" (this code allows at most {ceiling['value']:.4f})" if ceiling else ""
        rescored = index["recall_after_exact_reranking"]["value"]
        lines.append(
            f"Recall misses index.recall_target {index['recall_target']:g}{bound}: set search.rescore to a "
            f"few times search.k, which gives {rescored:.4f}, or choose an index.factory with a larger "
            "code."
        )
    if index["imbalance"] > HIGH_IMBALANCE:
        lines.append(
            f"The lists are uneven: a search scans {index['imbalance']:.1f} times what it would over equal "
            "ones. Look for many equal texts in the corpus, or take more lists in index.factory."
        )
    probed = index["nprobe"] / index["nlist"] if index["effort"] == "nprobe" else 0.0
    if probed > HIGH_PROBED and index["nlist"] >= MIN_LISTS:
        lines.append(
            f"{probed:.0%} of the lists are probed: a lower index.recall_target, or search.rescore beside "
            "it, makes searches faster."
        )
    return lines


def _verdict(index: dict[str, Any]) -> str:
    way = f" at {index['effort']} {index['nprobe']:,}" if index["effort"] else ""
    return f"recall@10 of {index['recall_target']:g} {'reached' if index['reached'] else 'not reached'}{way}"


def _figures(index: dict[str, Any]) -> list[tuple[str, str, str]]:
    size_bytes = sum(file["bytes"] for file in index["files"])
    reranked, gain = index["recall_after_exact_reranking"], index["gain_of_exact_reranking"]
    figures = [
        ("Vectors", f"{index['ntotal']:,}", f"of {index['dim']:,} dimensions"),
        ("Size", size(size_bytes), f"{size_bytes / max(1, index['ntotal']):,.0f} bytes a vector"),
    ]
    figures += [
        (f"Recall{depth}", f"{found['value']:.3f}", "as searched")
        for depth, found in index["recall"].items()
        if depth == "@10"
    ]
    figures.append(
        (f"Recall@{reranked['k']} rescored", f"{reranked['value']:.3f}", f"{gain:+.4f} by exact scores")
    )
    return figures


def _recalls(index: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    ceilings = index["ceiling"] or {}
    rows = [
        (
            f"recall{depth}",
            *_measured(found),
            f"{ceilings[depth]['value']:.4f}" if depth in ceilings else "",
        )
        for depth, found in index["recall"].items()
    ]
    reranked = index["recall_after_exact_reranking"]
    return [*rows, (f"recall@{reranked['k']}, candidates rescored exactly", *_measured(reranked), "")]


def _measured(recall: dict[str, Any]) -> tuple[str, str]:
    return f"{recall['value']:.4f}", f"{recall['low']:.4f} and {recall['high']:.4f}"


def _identity(index: dict[str, Any], sizes: IdArray | None) -> list[tuple[str, str]]:
    rows = [
        ("Factory", f"{index['factory']}, {index['metric']}"),
        ("Files", f"{len(index['files']):,}"),
        ("Training", index["training"]["sha256"]),
        ("Data set fingerprint", index["vector_fingerprint"]),
    ]
    if sizes is not None:
        longest, empty = int(sizes.max()), int((sizes == 0).sum())
        words = (
            f"{index['nlist']:,}; longest {longest:,}, empty {empty:,}; a search scans "
            f"{index['imbalance']:.2f} times what it would over equal lists; {index['drift']:.0%} "
            "out of place since the training"
        )
        rows.insert(1, ("Lists", words))
    return rows


def _pictures(index: dict[str, Any], sizes: IdArray | None) -> list[Html]:
    drawn = []
    if index["effort"] and index["curve"]:
        title = f"Recall against {index['effort']}"
        drawn.append(picture(title, index["effort"], "recall", lambda axes: _draw_recall(axes, index)))
    if sizes is not None and len(sizes) > 1:
        drawn.append(
            picture("List sizes", "lists, longest first", "vectors", lambda axes: _draw_sizes(axes, sizes))
        )
    return drawn


def _draw_recall(axes: Any, index: dict[str, Any]) -> None:
    efforts = [point["nprobe"] for point in index["curve"]]
    for depth, marker in (("@1", "^"), ("@10", "o"), ("@100", "s")):
        if depth in index["curve"][0]:
            values = [point[depth] for point in index["curve"]]
            color, line = (ACCENT, "-") if depth == "@10" else (FAINT, ":")
            axes.plot(
                efforts,
                values,
                marker=marker,
                markersize=4,
                color=color,
                linestyle=line,
                label=f"recall{depth}",
            )
    axes.axhline(index["recall_target"], color=ALERT, linewidth=1)
    place = (0.01, index["recall_target"])
    axes.annotate(
        f"target {index['recall_target']:g}",
        place,
        xycoords=("axes fraction", "data"),
        va="bottom",
        color=ALERT,
    )
    axes.axvline(index["nprobe"], color=ALERT, linewidth=1, linestyle=":")
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
