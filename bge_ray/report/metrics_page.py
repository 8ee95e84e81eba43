"""The tables and pictures of metrics: means side by side, and who won or lost which queries."""

import io
from typing import Any

from bge_ray.report.words import count, duration

SIGNIFICANT = 0.05
# Queries named of each run: those that it answers better than the first, and worse.
NAMED_QUERIES = 5


def to_markdown(metrics: dict[str, Any]) -> str:
    """Return all that is compared as tables, a column a run; a star marks a significant difference."""
    runs = metrics["runs"]
    judged = metrics["qrels"] is not None
    over = count(
        metrics["queries"], "judged query" if judged else "query", "judged queries" if judged else "queries"
    )
    lines = [
        f"# Retrieval metrics over {over}" if judged else f"# Runs compared over {over}",
        "",
        "| metric | " + " | ".join(_plain(run["name"]) for run in runs) + " |",
        "|---|" + "---:|" * len(runs),
    ]
    lines += [
        f"| {metric} | " + " | ".join(_cell(run, metric) for run in runs) + " |"
        for metric in metrics["metrics"]
    ]
    for name in runs[-1]["overlap"]:
        cells = [_share(run["overlap"].get(name)) for run in runs]
        lines.append(f"| {name} with {_plain(metrics['baseline'])} | " + " | ".join(cells) + " |")
    lines.append("")
    if judged and len(runs) > 1:
        lines += [
            f"`*` differs from {metrics['baseline']} with p < {SIGNIFICANT} ({metrics['test']}; p corrected "
            f"by {metrics['correction']}, so of twenty metrics one star is expected by chance).",
            "",
        ]
    lines += [f"- {run['name']}: " + "; ".join(_notes(run)) for run in runs]
    for run in runs[1:]:
        lines += _wins(metrics, run)
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    return name.replace("|", "\\|")


def _cell(run: dict[str, Any], metric: str) -> str:
    text = f"{run['mean'][metric]:.4f}"
    against = run["against_baseline"].get(metric)
    if against is None:
        return text
    star = "\\*" if _is_significant(run, metric) else ""
    return f"{text} ({against['difference']:+.4f}, p {against['p_corrected']:.4f}){star}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _notes(run: dict[str, Any]) -> list[str]:
    """Return what there is to know of a run beside its figures."""
    notes = [count(run["queries"], "query", "queries")]
    if run["unanswered"]:
        notes.append(f"{run['unanswered']:,} judged queries without an answer (counted as 0)")
    if run["identical_ids"]:
        notes.append(f"{run['identical_ids']:,} results with the id of their query, ignored")
    if run["unjudged"]:
        notes.append(f"{run['unjudged']:,} queries that nobody judged")
    notes += [f"{number:,} lines left out: {reason}" for reason, number in run["left_out"].items()]
    if (made := run["made"]) is not None:
        took = f"made by {made['job']} in {duration(made['wall_s'])} on {made['devices']:g} {made['device']}"
        cost = f", for {made['cost']:.2f}" if made["cost"] is not None else ""
        part = made["units_done"] < made["units_planned"]
        notes.append(took + cost + (", without what an earlier run had done" if part else ""))
    return notes


def _wins(metrics: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """Return the queries that a run answers better than the first by most, and those worse."""
    metric = metrics["shown_metric"]
    if metric is None:
        return []
    differences = _differences(metrics, run, metric)
    against = run["against_baseline"][metric]
    lines = [
        "",
        f"## {run['name']} against {metrics['baseline']}: {metric}",
        "",
        f"{against['wins']:,} queries better, {against['losses']:,} worse, {against['ties']:,} the same.",
    ]
    by_size = sorted(differences.items(), key=lambda item: (-abs(item[1]), item[0]))
    for word, sign in (("better", 1), ("worse", -1)):
        named = [(query, value) for query, value in by_size if value * sign > 0][:NAMED_QUERIES]
        if named:
            lines += ["", f"| query | {word} by |", "|---|---:|"]
            lines += [f"| {_plain(query)} | {value:+.4f} |" for query, value in named]
    return lines


def _differences(metrics: dict[str, Any], run: dict[str, Any], metric: str) -> dict[str, float]:
    first = metrics["runs"][0]["per_query"][metric]
    return {query: value - first[query] for query, value in run["per_query"][metric].items()}


def means_svg(metrics: dict[str, Any]) -> bytes | None:
    """Return the means as a picture: a group of bars a metric, a colour a run; None without judgements."""
    if not metrics["metrics"]:
        return None
    plt = _pyplot()
    import numpy as np

    names, runs = metrics["metrics"], metrics["runs"]
    figure, axes = plt.subplots(
        figsize=(max(7, 0.55 * len(names) * max(1, len(runs) / 2)), 3.8), layout="constrained"
    )
    width = 0.8 / len(runs)
    places = np.arange(len(names))
    for number, run in enumerate(runs):
        values = [run["mean"][name] for name in names]
        bars = axes.bar(places + (number - (len(runs) - 1) / 2) * width, values, width, label=run["name"])
        stars = ["*" if _is_significant(run, name) else "" for name in names]
        axes.bar_label(bars, stars, fontsize=9)
    axes.set_xticks(places, names, rotation=45, ha="right")
    axes.set(ylim=(0, 1.05), ylabel="mean over queries", title=f"{metrics['queries']:,} judged queries")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _svg(figure)


def wins_svg(metrics: dict[str, Any]) -> bytes | None:
    """Return, a field a run, every query's difference from the first run, from best to worst.

    None without judgements, or where one run stands alone.
    """
    metric, others = metrics["shown_metric"], metrics["runs"][1:]
    if metric is None or not others:
        return None
    plt = _pyplot()
    import numpy as np

    figure, fields = plt.subplots(
        1, len(others), figsize=(4.2 * len(others) + 1, 3.4), layout="constrained", sharey=True, squeeze=False
    )
    for field, run in zip(fields[0], others, strict=True):
        values = np.sort(np.array(list(_differences(metrics, run, metric).values())))[::-1]
        places = np.arange(len(values))
        for sign, colour, word in ((1, "tab:green", "better"), (-1, "tab:red", "worse")):
            there = values * sign > 0
            field.fill_between(
                places, np.where(there, values, 0), step="mid", color=colour, alpha=0.8, linewidth=0.4,
                edgecolor=colour, label=f"{int(there.sum()):,} {word}",
            )  # fmt: skip
        field.axhline(0, color="black", linewidth=0.6)
        field.set(title=f"{run['name']} against {metrics['baseline']}", xlabel="queries, best to worst")
        field.title.set_fontsize(9)
        field.spines[["top", "right"]].set_visible(False)
        field.legend(fontsize=8, frameon=False)
    fields[0][0].set(ylabel=f"difference in {metric}", ylim=(-1.05, 1.05))
    return _svg(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    return plt


def _svg(figure: Any) -> bytes:
    """Return a figure as SVG, and close it; the same figure gives the same bytes."""
    import matplotlib as mpl

    sink = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "bge-ray"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    _pyplot().close(figure)
    return sink.getvalue().encode()


def _is_significant(run: dict[str, Any], metric: str) -> bool:
    against = run["against_baseline"].get(metric)
    return against is not None and against["p_corrected"] < SIGNIFICANT
