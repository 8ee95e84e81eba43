"""What an index is worth, as a page that needs no other file: figures, and pictures of recall and lists."""

import html
import io
from typing import Any

import numpy as np

from bge_ray.schema import IdArray

_BLUE, _RED, _GREY = "#3568a8", "#b3362c", "#999999"
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:46em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}"
    "th{text-align:left;padding:.2em 1.5em .2em 0;font-weight:600;vertical-align:top;white-space:nowrap}"
    "td{padding:.2em 0}figure{margin:1.5em 0}svg{max-width:100%;height:auto}h2{margin-top:1.5em}"
)


def index_report(index: dict[str, Any], sizes: IdArray | None) -> bytes:
    """Return the page of an index.

    Args:
        index: the content of index.json.
        sizes: (nlist,) vectors in each list; None if there are no lists.
    """
    recalls = "".join(
        _row(f"Recall{depth}", _recall(found), _of_ceiling(index, depth))
        for depth, found in index["recall"].items()
    )
    reranked = index["recall_after_exact_reranking"]
    rows = [
        ("Index", f"{index['factory']}, {index['metric']}, dim {index['dim']}"),
        ("Vectors", f"{index['ntotal']:,} in {len(index['files'])} file(s)"),
        ("Size", f"{sum(file['bytes'] for file in index['files']) / 1e6:,.1f} MB"),
        ("Target", _target(index)),
        (
            "Re-ranked",
            f"recall@{reranked['k']} {_recall(reranked)} after exact scores for its candidates, "
            f"{index['gain_of_exact_reranking']:+.4f}",
        ),
        ("Queries", f"{index['num_queries']:,}: {index['queries']}"),
        ("Lists", _lists(index, sizes)),
        ("Training", index["training"]["sha256"]),
    ]
    table = "".join(_row(name, text) for name, text in rows)
    page = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>bge-ray index report</title>",
        f"<style>{_STYLE}</style><h1>Index</h1><table>{table}</table>",
        f"<h2>Recall</h2><table>{recalls}</table>",
        "<p>The share of the true nearest passages, by exact search over all embedding shards, that the "
        "index returns; with a 95 % interval.</p>",
        *(f"<figure>{picture}</figure>" for picture in _pictures(index, sizes)),
    ]
    return "".join(page).encode()


def _row(*cells: str) -> str:
    first, *rest = (html.escape(cell) for cell in cells)
    return f"<tr><th>{first}</th>" + "".join(f"<td>{cell} </td>" for cell in rest) + "</tr>"


def _recall(recall: dict[str, Any]) -> str:
    return f"{recall['value']:.4f} ({recall['low']:.4f} to {recall['high']:.4f})"


def _of_ceiling(index: dict[str, Any], depth: str) -> str:
    ceiling = (index["ceiling"] or {}).get(depth)
    return f"; at most {ceiling['value']:.4f} with this code" if ceiling else ""


def _target(index: dict[str, Any]) -> str:
    way = f" at {index['effort']} {index['nprobe']:,}" if index["effort"] else ""
    verdict = "reached" if index["reached"] else "NOT reached: use a larger code, or exact re-ranking"
    return f"recall@10 of {index['recall_target']:g} {verdict}{way}"


def _lists(index: dict[str, Any], sizes: IdArray | None) -> str:
    if sizes is None:
        return "none"
    return (
        f"{index['nlist']:,}; longest {int(sizes.max()):,}, empty {int((sizes == 0).sum()):,}; a search "
        f"scans {index['imbalance']:.2f} times what it would over equal lists; {index['drift']:.0%} out of "
        "place since the training"
    )


def _pictures(index: dict[str, Any], sizes: IdArray | None) -> list[str]:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    pictures = []

    def draw(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
        figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        return figure, axes

    def finish(figure: Any) -> None:
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
        plt.close(figure)
        pictures.append(sink.getvalue()[sink.getvalue().index("<svg") :])

    if index["effort"]:
        figure, axes = draw(f"Recall against {index['effort']}", index["effort"], "recall")
        efforts = [point["nprobe"] for point in index["curve"]]
        for depth, marker in (("@1", "^"), ("@10", "o"), ("@100", "s")):
            if depth in index["curve"][0]:
                values = [point[depth] for point in index["curve"]]
                main = depth == "@10"
                axes.plot(
                    efforts,
                    values,
                    marker=marker,
                    markersize=4,
                    color=_BLUE if main else _GREY,
                    linestyle="-" if main else ":",
                    label=f"recall{depth}",
                )
        axes.axhline(index["recall_target"], color=_RED, linewidth=1)
        axes.annotate(
            f"target {index['recall_target']:g}",
            (0.01, index["recall_target"]),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="bottom",
            color=_RED,
        )
        axes.axvline(index["nprobe"], color=_RED, linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend(frameon=False, loc="lower right")
        finish(figure)

    if sizes is not None and len(sizes) > 1:
        figure, axes = draw("List sizes, longest first", "lists", "vectors in the list")
        order = np.sort(sizes)[::-1]
        shown = np.unique(np.linspace(0, len(order) - 1, 500).astype(int))
        axes.fill_between(shown + 1, order[shown], step="mid", color=_BLUE)
        axes.axhline(sizes.mean(), color=_RED, linewidth=1)
        axes.annotate(
            f"mean {sizes.mean():,.0f}",
            (1, sizes.mean()),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color=_RED,
        )
        axes.set_ylim(bottom=0)
        finish(figure)
    return pictures
