"""The evaluate job: runs and judgements to metrics, side by side; runs on one machine, without Ray.

Without judgements runs are compared with each other: what share of their best passages they have in common.
"""

import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bge_ray.dataset.folder import Dataset
from bge_ray.errors import CorpusError, DatasetMismatchError, SettingsError, StorageError
from bge_ray.formats.candidates import read_candidate_lists
from bge_ray.formats.qrels import find_qrels, read_qrels
from bge_ray.metrics import (
    Comparison,
    PerQuery,
    Qrels,
    best,
    compare,
    corrected,
    mean,
    measure,
    metric_names,
    overlap,
)
from bge_ray.records.reports import Report, RerankReport, SearchReport, read_report
from bge_ray.report.metrics_page import means_svg, to_markdown, wins_svg
from bge_ray.settings.sections import EvaluateSettings, Settings
from bge_ray.storage.folders import refuse_collisions
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder

logger = logging.getLogger(__name__)

FILES = ("metrics.json", "metrics.md", "metrics.svg", "wins.svg", "per_query.parquet")
# Metrics may well lie beside the run that they are of, whose folder has a journal of that job.
JOURNAL = "_bge_ray_metrics.json"


@dataclass(frozen=True)
class EvaluatedRun:
    """One run: its metrics by query, how it compares with the first, and what of it was of no use.

    ``results`` are the best passages of each query that counts; ``made`` is the report of the job whose
    folder the run lies in, if it is one of ours.
    """

    name: str
    uri: str
    results: dict[str, tuple[str, ...]]
    per_query: PerQuery
    comparisons: dict[str, Comparison]
    made: Report | None
    queries: int
    unanswered: int
    unjudged: int
    identical: int
    left_out: dict[str, int]


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure runs against judgements, compare them with the first, and write what `FILES` names.

    Args:
        settings: needs evaluate.run, and evaluate.qrels unless there are several runs; without
            evaluate.output nothing is written.

    Returns:
        The content of metrics.json.

    Raises:
        SettingsError: a run is named twice or is not there, or one run is named and no judgements.
        CorpusError: a run or the judgements are not there, cannot be read, or have no query in common.
        OutputCollisionError: a foreign file has one of the names, or the output is a corpus; none was
            written.
    """
    storage, uris = _inputs(settings)
    asked = settings.evaluate
    qrels = None if asked.qrels is None else read_qrels(storage, asked.qrels)
    runs: list[EvaluatedRun] = []
    for uri, name in zip(uris, short_names(uris), strict=True):
        runs.append(_evaluate_run(storage, uri, name, qrels, asked, runs[0] if runs else None))
    metrics = _as_json(runs, qrels, settings)
    if asked.output is not None:
        text = json.dumps(metrics, indent=1, ensure_ascii=False) + "\n"
        folder = _folder(storage, asked.output)
        contents = (
            text.encode(),
            to_markdown(metrics).encode(),
            means_svg(metrics),
            wins_svg(metrics),
            _per_query_table(runs),
        )
        folder.refuse_foreign(FILES)
        for name, data in zip(FILES, contents, strict=True):
            if data is not None:
                folder.put(name, data)
            else:
                folder.remove([name])
    return metrics


def plan_evaluate(settings: Settings) -> str:
    """Say what `evaluate` would do, without writing anything (``--dry-run``).

    Raises:
        SettingsError: a run is named twice, what is named is not there, or one run has no judgements.
        CorpusError: the folder of the judgements holds several files.
        OutputCollisionError: a foreign file has the name of a file that would be written, or the output is a
            corpus.
    """
    storage, uris = _inputs(settings)
    asked = settings.evaluate
    if asked.output is not None:
        _folder(storage, asked.output).refuse_foreign(FILES)
    against = f"against {asked.qrels}" if asked.qrels is not None else "with each other"
    return f"{', '.join(uris)} {against}, to {asked.output or 'the terminal'}"


def check_qrels(storage: Storage, uri: str) -> None:
    """Refuse judgements that are not there; reads only listings.

    Raises:
        SettingsError: nothing is there.
        CorpusError: a folder holds several files.
    """
    if not storage.list_files(uri):
        raise SettingsError(f"evaluate.qrels {uri}: is not there, or is an empty folder")
    find_qrels(storage, uri)


def _folder(storage: Storage, uri: str) -> OwnedFolder:
    return OwnedFolder(storage, uri, "metrics", "evaluate.output", FILES, JOURNAL)


def _inputs(settings: Settings) -> tuple[Storage, tuple[str, ...]]:
    """Return the storage and the URIs of the runs, once these and the judgements are known to be there."""
    settings.require("evaluate.run")
    storage, asked = Storage(settings.output.storage_timeout_s), settings.evaluate
    uris = (asked.run,) if isinstance(asked.run, str) else asked.run or ()
    if not uris or len(set(uris)) != len(uris):
        raise SettingsError("evaluate.run: expected one run or more, each named once")
    if asked.qrels is not None:
        check_qrels(storage, asked.qrels)
    elif len(uris) < 2:
        raise SettingsError(
            "evaluate.qrels: is not set; one run is measured against judgements, or name more runs in "
            "evaluate.run to compare them with each other"
        )
    for uri in uris:
        if not storage.list_files(uri):
            raise SettingsError(f"evaluate.run {uri}: is not there")
    if asked.output is not None:
        corpora = {f"the corpus of evaluate.run {uri}": _corpus_of(storage, uri) for uri in uris}
        inputs = {"corpus.uri": settings.corpus.uri, **corpora}
        refuse_collisions({"evaluate.output": asked.output}, inputs, {})
    return storage, uris


def _corpus_of(storage: Storage, uri: str) -> str | None:
    """Return the corpus that a run is of, where the report beside it and its data set say so."""
    made = _report_beside(storage, uri)
    if not isinstance(made, SearchReport):
        return None
    try:
        return Dataset(storage, made.dataset).corpus()
    except (StorageError, DatasetMismatchError):
        return None  # the run alone is evaluated, wherever its data set is by now


def _evaluate_run(
    storage: Storage,
    uri: str,
    name: str,
    qrels: Qrels | None,
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
        if qrels is not None and found.query_id not in qrels:
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
        if qrels is None:
            scores[found.query_id] = {p: there[p] for p in best(there, max(asked.k))}
    if not scores:
        raise CorpusError(f"{uri}: none of its {len(queries)} queries is judged in the qrels")
    per_query = measure(scores, qrels, asked.k) if qrels is not None else {}
    return EvaluatedRun(
        name=name,
        uri=uri,
        results={query_id: best(found, max(asked.k)) for query_id, found in scores.items()},
        per_query=per_query,
        comparisons={m: compare(per_query[m], first.per_query[m]) for m in per_query} if first else {},
        made=_report_beside(storage, uri),
        queries=len(queries),
        unanswered=sum(not scores.get(query_id) for query_id in qrels or ()),
        unjudged=len(queries - qrels.keys()) if qrels is not None else 0,
        identical=identical,
        left_out=dict(left_out),
    )


def _report_beside(storage: Storage, uri: str) -> Report | None:
    """Return the report of the search or rerank that made a run, where it lies in the folder of one."""
    folder = (uri.rpartition("/")[0] or ".") if uri.endswith((".parquet", ".trec")) else uri
    data = storage.read_optional(join(folder, "report.json"))
    report = read_report(SearchReport, data) or read_report(RerankReport, data)
    return report if report is not None and report.complete else None


def short_names(uris: tuple[str, ...]) -> list[str]:
    """Return what tells the runs apart in a table: the parts of their paths that differ."""
    parts = [[p for p in uri.split("/") if p and p not in ("run.parquet", "run.trec")] for uri in uris]
    parts = [found or [uri] for found, uri in zip(parts, uris, strict=True)]
    depth = 1
    while depth < max(map(len, parts)) and len({tuple(found[-depth:]) for found in parts}) < len(parts):
        depth += 1
    names = ["/".join(found[-depth:]) for found in parts]
    return names if len(set(names)) == len(names) else list(uris)


def _as_json(runs: list[EvaluatedRun], qrels: Qrels | None, settings: Settings) -> dict[str, Any]:
    asked = settings.evaluate
    relevant = [sum(value > 0 for value in judged.values()) for judged in (qrels or {}).values()]
    names = metric_names(asked.k) if qrels is not None else []
    together = {m: corrected([run.comparisons[m].p_value for run in runs[1:]]) for m in names}
    return {
        "qrels": asked.qrels,
        "queries": len(qrels) if qrels is not None else len({q for run in runs for q in run.results}),
        "queries_without_relevant": sum(count == 0 for count in relevant),
        "relevant": sum(relevant),
        "metrics": names,
        "shown_metric": f"nDCG@{_shown_cut(asked.k)}" if names else None,
        "baseline": runs[0].name,
        "test": "paired randomisation test, two-sided, 10,000 permutations",
        "correction": "Holm, over the runs that are compared with the first, each metric on its own",
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
                "against_baseline": {
                    m: {**asdict(comparison), "p_corrected": together[m][number - 1]}
                    for m, comparison in run.comparisons.items()
                },
                "overlap": {f"overlap@{k}": overlap(run.results, runs[0].results, k) for k in sorted(asked.k)}
                if number
                else {},
                "made": _made(run.made),
                "per_query": run.per_query,
            }
            for number, run in enumerate(runs)
        ],
    }


def _shown_cut(cuts: Sequence[int]) -> int:
    """Return the cut-off of the metric whose queries are shown: 10, or what is asked for nearest to it."""
    return min(cuts, key=lambda k: (abs(k - 10), k))


def _made(report: Report | None) -> dict[str, Any] | None:
    """Return what a run took to make, without what earlier runs had done of it."""
    if report is None:
        return None
    wanted = ("job", "wall_s", "device", "devices", "device_hours", "cost", "units_done", "units_planned")
    return {name: getattr(report, name) for name in wanted}


def _per_query_table(runs: list[EvaluatedRun]) -> bytes | None:
    """Return Parquet with a row a run and query, a column a metric; None without judgements."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not runs[0].per_query:
        return None
    tables = []
    for run in runs:
        queries = list(next(iter(run.per_query.values())))
        columns = {m: pa.array([values[q] for q in queries]) for m, values in run.per_query.items()}
        names = pa.array([run.name] * len(queries), pa.string())
        tables.append(pa.table({"run": names, "query_id": pa.array(queries, pa.string()), **columns}))
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), sink)
    return sink.getvalue()
