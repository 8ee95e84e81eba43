"""The evaluate job: runs and judgements to metrics, side by side; runs on one machine, without Ray."""

import io
import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from bge_ray.errors import CorpusError, SettingsError
from bge_ray.formats.candidates import read_candidate_lists
from bge_ray.formats.qrels import find_qrels, read_qrels
from bge_ray.metrics import Comparison, PerQuery, Qrels, compare, mean, measure, metric_names
from bge_ray.settings.sections import EvaluateSettings, Settings
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import OwnedFolder

logger = logging.getLogger(__name__)

SIGNIFICANT = 0.05
FILES = ("metrics.json", "metrics.md", "metrics.svg")
# Metrics may well lie beside the run that they are of, whose folder has a journal of that job.
JOURNAL = "_bge_ray_metrics.json"


@dataclass(frozen=True)
class EvaluatedRun:
    """One run: its metrics by query, how it compares with the first, and what of it was of no use."""

    name: str
    uri: str
    per_query: PerQuery
    comparisons: dict[str, Comparison]
    queries: int
    unanswered: int
    unjudged: int
    identical: int
    left_out: dict[str, int]


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure runs against judgements, and write metrics.json, metrics.md and metrics.svg.

    Args:
        settings: needs evaluate.run and evaluate.qrels; without evaluate.output nothing is written.

    Returns:
        The content of metrics.json.

    Raises:
        SettingsError: a run is named twice, or what is named is not there.
        CorpusError: a run or the judgements cannot be read, or have no query in common.
        OutputCollisionError: a foreign file has one of the names; none was written.
    """
    storage, uris = _inputs(settings)
    asked = settings.evaluate
    qrels = read_qrels(storage, str(asked.qrels))
    runs: list[EvaluatedRun] = []
    for uri, name in zip(uris, short_names(uris), strict=True):
        runs.append(_evaluate_run(storage, uri, name, qrels, asked, runs[0] if runs else None))
    metrics = _as_json(runs, qrels, settings)
    if asked.output is not None:
        text = json.dumps(metrics, indent=1, ensure_ascii=False) + "\n"
        folder = _folder(storage, asked.output)
        contents = (text.encode(), to_markdown(metrics).encode(), to_svg(metrics))
        folder.refuse_foreign(FILES)
        for name, data in zip(FILES, contents, strict=True):
            folder.put(name, data)
    return metrics


def plan_evaluate(settings: Settings) -> str:
    """Say what `evaluate` would do, without writing anything (``--dry-run``).

    Raises:
        SettingsError: a run is named twice, or what is named is not there.
        CorpusError: the folder of the judgements holds several files.
        OutputCollisionError: a foreign file has the name of a file that would be written.
    """
    storage, uris = _inputs(settings)
    asked = settings.evaluate
    if asked.output is not None:
        _folder(storage, asked.output).refuse_foreign(FILES)
    return f"{', '.join(uris)} against {asked.qrels}, to {asked.output or 'the terminal'}"


def _folder(storage: Storage, uri: str) -> OwnedFolder:
    return OwnedFolder(storage, uri, "metrics", "evaluate.output", FILES, JOURNAL)


def _inputs(settings: Settings) -> tuple[Storage, tuple[str, ...]]:
    """Return the storage and the URIs of the runs, once runs and judgements are known to be there."""
    settings.require("evaluate.run", "evaluate.qrels")
    storage, asked = Storage(settings.output.storage_timeout_s), settings.evaluate
    uris = (asked.run,) if isinstance(asked.run, str) else asked.run or ()
    if not uris or len(set(uris)) != len(uris):
        raise SettingsError("evaluate.run: expected one run or more, each named once")
    qrels = str(asked.qrels)
    if not storage.list_files(qrels):
        raise SettingsError(f"evaluate.qrels {qrels}: is not there, or is an empty folder")
    find_qrels(storage, qrels)
    for uri in uris:
        if not storage.list_files(uri):
            raise SettingsError(f"evaluate.run {uri}: is not there")
    return storage, uris


def _evaluate_run(
    storage: Storage,
    uri: str,
    name: str,
    qrels: Qrels,
    asked: EvaluateSettings,
    first: EvaluatedRun | None,
) -> EvaluatedRun:
    left_out: Counter[str] = Counter()

    def reject(query_id: str | None, passage_id: str | None, reason: str, detail: str) -> None:
        left_out[reason] += 1
        if left_out[reason] <= 3:
            logger.warning("%s: query %s passage %s left out: %s", uri, query_id, passage_id, detail)

    scores: dict[str, dict[str, float]] = {}
    queries: set[str] = set()
    identical = 0
    for found in read_candidate_lists(storage, uri, reject, scattered=True):
        queries.add(found.query_id)
        if found.query_id not in qrels:
            continue
        if found.scores is None and found.passage_ids:
            raise CorpusError(f"{uri}: query {found.query_id!r} has candidates without scores: it is no run")
        there = scores.setdefault(found.query_id, {})
        for passage_id, score in zip(found.passage_ids, found.scores or [], strict=True):
            if asked.ignore_identical_ids and passage_id == found.query_id:
                identical += 1
            elif passage_id in there:
                detail = "stands twice in the run, the better score counts"
                reject(found.query_id, passage_id, "duplicate_passage", detail)
                there[passage_id] = max(score, there[passage_id])
            else:
                there[passage_id] = score
    if not scores:
        raise CorpusError(f"{uri}: none of its {len(queries)} queries is judged in the qrels")
    per_query = measure(scores, qrels, asked.k)
    against = {} if first is None else {m: compare(per_query[m], first.per_query[m]) for m in per_query}
    unanswered = sum(not scores.get(query_id) for query_id in qrels)
    unjudged = len(queries - qrels.keys())
    return EvaluatedRun(
        name, uri, per_query, against, len(queries), unanswered, unjudged, identical, dict(left_out)
    )


def short_names(uris: tuple[str, ...]) -> list[str]:
    """Return what tells the runs apart in a table: the parts of their paths that differ."""
    parts = [[p for p in uri.split("/") if p and p not in ("run.parquet", "run.trec")] for uri in uris]
    parts = [found or [uri] for found, uri in zip(parts, uris, strict=True)]
    depth = 1
    while depth < max(map(len, parts)) and len({tuple(found[-depth:]) for found in parts}) < len(parts):
        depth += 1
    names = ["/".join(found[-depth:]) for found in parts]
    return names if len(set(names)) == len(names) else list(uris)


def _as_json(runs: list[EvaluatedRun], qrels: Qrels, settings: Settings) -> dict[str, Any]:
    relevant = [sum(value > 0 for value in judged.values()) for judged in qrels.values()]
    return {
        "qrels": settings.evaluate.qrels,
        "queries": len(qrels),
        "queries_without_relevant": sum(count == 0 for count in relevant),
        "relevant": sum(relevant),
        "metrics": metric_names(settings.evaluate.k),
        "baseline": runs[0].name,
        "test": "paired randomisation test, two-sided, 10,000 permutations",
        "runs": [
            {
                "name": run.name,
                "uri": run.uri,
                "queries": run.queries,
                "unanswered": run.unanswered,
                "unjudged": run.unjudged,
                "identical_ids": run.identical,
                "left_out": run.left_out,
                "mean": {metric: mean(values) for metric, values in run.per_query.items()},
                "against_baseline": {m: asdict(comparison) for m, comparison in run.comparisons.items()},
                "per_query": run.per_query,
            }
            for run in runs
        ],
    }


def to_markdown(metrics: dict[str, Any]) -> str:
    """Return the means as a table, a column a run; a star marks a significant difference from the first."""
    runs = metrics["runs"]
    lines = [
        f"# Retrieval metrics over {metrics['queries']:,} judged queries",
        "",
        "| metric | " + " | ".join(run["name"].replace("|", "\\|") for run in runs) + " |",
        "|---|" + "---:|" * len(runs),
    ]
    for metric in metrics["metrics"]:
        cells = [_cell(run, metric) for run in runs]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    lines.append("")
    if len(runs) > 1:
        lines += [
            f"`*` differs from {metrics['baseline']} with p < {SIGNIFICANT} ({metrics['test']}; each metric "
            "on its own, so of twenty such stars one is expected by chance).",
            "",
        ]
    for run in runs:
        notes = [f"{run['queries']:,} queries"]
        notes += [f"{run['unanswered']:,} judged queries without an answer (counted as 0)"] * bool(
            run["unanswered"]
        )
        notes += [f"{run['identical_ids']:,} results with the id of their query, ignored"] * bool(
            run["identical_ids"]
        )
        notes += [f"{run['unjudged']:,} queries that nobody judged"] * bool(run["unjudged"])
        notes += [f"{count:,} lines left out: {reason}" for reason, count in run["left_out"].items()]
        lines.append(f"- {run['name']}: " + "; ".join(notes))
    return "\n".join(lines) + "\n"


def _cell(run: dict[str, Any], metric: str) -> str:
    text = f"{run['mean'][metric]:.4f}"
    against = run["against_baseline"].get(metric)
    if against is None:
        return text
    star = "\\*" if against["p_value"] < SIGNIFICANT else ""
    return f"{text} ({against['difference']:+.4f}, p {against['p_value']:.4f}){star}"


def to_svg(metrics: dict[str, Any]) -> bytes:
    """Return the means as a picture: a group of bars a metric, a colour a run."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt
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
    sink = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "bge-ray"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    plt.close(figure)
    return sink.getvalue().encode()


def _is_significant(run: dict[str, Any], metric: str) -> bool:
    against = run["against_baseline"].get(metric)
    return against is not None and against["p_value"] < SIGNIFICANT
