"""The rerank job: candidate lists to a run ordered by a cross-encoder.

Like the embed job it knows one mode: take in, subtract what is done, do the rest, publish.
"""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bge_ray.dataset.folder import Dataset
from bge_ray.dataset.lookup import ShardMap
from bge_ray.errors import BgeRayError, IncompleteRunError, SettingsError
from bge_ray.formats.candidates import Candidates, find_candidates, read_candidate_lists
from bge_ray.formats.queries import read_queries
from bge_ray.model.reranker_head import settle_reranker
from bge_ray.model.reranker_spec import RerankerSpec
from bge_ray.model.run.batching import settle_budget
from bge_ray.pipeline.engine.flow import by_actors, by_tasks, parcels, receipts
from bge_ray.pipeline.engine.isolation import start_ledger
from bge_ray.pipeline.engine.pools import Pool, PoolSizes, cluster_pools, compute_dtype
from bge_ray.pipeline.engine.progress import Step
from bge_ray.pipeline.engine.stopping import Stopped, StopRequest, make_watch
from bge_ray.pipeline.engine.telemetry import Telemetry
from bge_ray.pipeline.rerank.stages import ScoreStage, pair_stage, texts_stage
from bge_ray.pipeline.rerank.texts import TextSource, has_kept_texts
from bge_ray.pipeline.runs.follow import (
    WORK,
    Source,
    check_rejected,
    clear_work,
    finish_clearing,
    follow,
    open_source,
    publish_report,
    published_files,
    read_current,
)
from bge_ray.pipeline.runs.intake import Block, Intake, Limits, Rejections, take_in
from bge_ray.pipeline.runs.parcels import (
    CANDIDATE_SCHEMA,
    Device,
    GroupTask,
    Parcel,
    ScoreJob,
    Workplace,
    digest,
)
from bge_ray.pipeline.runs.parts import RunOutput, Totals, publish, write_stage
from bge_ray.pipeline.search.stages import read_stage
from bge_ray.records.reports import RerankReport, Scoring
from bge_ray.report.advice import advise_rerank
from bge_ray.report.facts import RunFacts, summarise
from bge_ray.run_id import run_id
from bge_ray.settings.sections import RerankSettings, Settings
from bge_ray.storage.lease import Lease
from bge_ray.storage.objects import Storage, join

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


@dataclass(frozen=True)
class _Work:
    """All that is known before anything is written."""

    storage: Storage
    folder: str
    source: Source | None
    spec: RerankerSpec
    key: str


def rerank(settings: Settings, stop: StopRequest | None = None) -> RerankReport:
    """Rerank candidate lists, doing only what is not done yet.

    Args:
        settings: needs rerank.candidates and rerank.output; output.uri where candidates are bare ids,
            and search.queries where they come without their queries.
        stop: asked between receipts whether to stop.

    Returns:
        The content of report.json.

    Raises:
        SettingsError, CorpusError, ModelError, OutputBusyError: nothing was published.
        IncompleteRunError, TakenOverError, StorageError: run again to continue.
        RejectedRowsError: the run is published, but too many pairs were left out.
    """
    facts = RunFacts("rerank", run_id())
    work = _prepare(settings)
    current = read_current(work.storage, work.folder, work.key, RerankReport)
    if current is not None:
        finish_clearing(work.storage, work.folder)
        logger.info("nothing to do: %s is up to date", work.folder)
        _check_share(settings, current, work.folder)
        return dataclasses.replace(current, outcome="nothing to do")
    dtype = compute_dtype(settings, "rerankers", settings.rerank.dtype, "float16")
    work = dataclasses.replace(work, spec=dataclasses.replace(work.spec, dtype=dtype))
    stop = stop or StopRequest()
    with stop.deferred(), Lease(work.storage, work.folder) as lease:
        watch = make_watch(lease, stop)
        rejections = Rejections()
        place = join(work.folder, WORK)
        blocks = _blocks(settings, work, rejections, watch)
        limits = Limits(settings.rerank.unit_pairs, settings.rerank.join_pairs)
        key = _unit_key(settings, work)
        with Step("reading", "candidate lists", None, settings.report.log_interval_s) as step:
            intake = take_in(work.storage, place, step.each(blocks), CANDIDATE_SCHEMA, limits, key)
        facts.plan(units=intake.todo_units, rows=intake.todo_rows)
        facts.book_rejected(Counter(rejections.reasons), rejections.examples())
        outcome = "failed"
        totals = Totals()
        try:
            if intake.groups:
                _run(settings, work, intake, facts, watch)
            lease.check()
            output = RunOutput(work.folder, settings.search.tag, "logit")
            totals = publish(work.storage, place, intake.units, [output], rejections)
            if totals.rows != intake.rows:
                raise IncompleteRunError(f"{intake.rows} pairs were planned, {totals.rows} came out")
            facts.book_rejected(totals.reasons, totals.examples)
            outcome = "complete"
        except (BgeRayError, Stopped) as error:
            outcome = f"incomplete: {error}"
            raise
        finally:
            report = _report(settings, work, intake, rejections, facts, totals, outcome)
            if not lease.lost.is_set():
                publish_report(work.storage, work.folder, report)
        clear_work(work.storage, work.folder)
    _check_share(settings, report, work.folder)
    return report


def plan_rerank(settings: Settings) -> str:
    """Say what `rerank` would do, without writing anything (``--dry-run``)."""
    work = _prepare(settings)
    rejections = Rejections()
    lists = pairs = 0
    for block in _blocks(settings, work, rejections, lambda: None):
        lists += 1
        pairs += len(block["query_id"])
    done = read_current(work.storage, work.folder, work.key, RerankReport) is not None
    return (
        f"{pairs:,} pairs of {lists:,} queries by {work.spec.name} ({work.spec.max_length} tokens a pair), "
        f"{len(rejections):,} lines left out, to {work.folder}: {'up to date' if done else 'to be done'}"
    )


def rerank_receipts(
    place: Workplace,
    job: ScoreJob,
    source: TextSource | None,
    depth: int,
    sizes: PoolSizes,
    groups: tuple[GroupTask, ...],
) -> Iterator[Parcel]:
    """The data path: groups of candidates in, one receipt a unit out, in the order they finish."""
    rows = parcels(groups)
    rows = by_tasks(rows, read_stage, sizes, place=place)
    rows = by_tasks(rows, texts_stage, sizes, source=source, depth=depth)
    rows = by_tasks(rows, pair_stage, sizes, job=job)
    rows = by_actors(rows, ScoreStage, sizes["rerankers"], job)
    rows = by_tasks(rows, write_stage, sizes, place=place)
    return receipts(rows)


def make_score_job(settings: Settings, place: Workplace, spec: RerankerSpec, pool: Pool) -> ScoreJob:
    """Return what the reranker pool must know; the automatic budget goes by its device."""
    budget = settle_budget(settings.rerank.token_budget, on_gpu=pool.gpus > 0)
    return ScoreJob(place, spec, Device(pool.device, pool.threads, budget, settings.rerank.trust_remote_code))


def make_text_source(settings: RerankSettings, source: Source, sizes: PoolSizes) -> TextSource:
    """Return where the texts of a data set come from.

    Raises:
        SettingsError: rerank.texts asks for columns that were not kept.
    """
    columns = source.spec.columns
    kept = has_kept_texts(columns)
    if settings.texts == "kept" and not kept:
        needed = [columns.text] if columns.title is None else [columns.text, columns.title]
        raise SettingsError(
            f"rerank.texts kept: the data set keeps the columns {sorted(columns.kept)}, the texts are made "
            f"of {needed}; embed with corpus.keep_columns, or set rerank.texts to corpus"
        )
    use_kept = kept and settings.texts != "corpus"
    _, plan = Dataset(source.storage, source.root).latest_plan()
    return TextSource(
        storage=source.storage,
        root=source.root,
        columns=columns,
        shards=ShardMap.of(source.manifest),
        objects=() if use_kept or plan is None else plan.objects,
        kept=use_kept,
        at_once=max(1, round(sizes.tasks * 2)),
        task_cpus=sizes.task_cpus,
    )


def _check_share(settings: Settings, report: RerankReport, folder: str) -> None:
    left_out = report.pairs_in - report.pairs_out + report.lists_rejected
    share = left_out / max(1, report.pairs_in + report.lists_rejected)
    allowed = settings.rerank.max_rejected_fraction
    check_rejected(report, folder, share, allowed, "rerank.max_rejected_fraction")


def _prepare(settings: Settings) -> _Work:
    settings.require("rerank.candidates", "rerank.output")
    storage = Storage(settings.output.storage_timeout_s)
    source = open_source(settings) if settings.output.uri is not None else None
    spec = settle_reranker(settings.rerank)
    found = [find_candidates(storage, str(settings.rerank.candidates))]
    if settings.search.queries is not None:
        found += storage.list_files(settings.search.queries)
    inputs = [(info.uri, info.size, info.etag) for info in found]
    work = _Work(storage, str(settings.rerank.output), source, spec, "")
    # The dtype of a report's key is the one asked for: a run that is there is not made anew on other devices.
    asked = (settings.rerank.dtype, settings.search.tag, inputs)
    return dataclasses.replace(work, key=digest(_unit_key(settings, work), *asked))


def _unit_key(settings: Settings, work: _Work) -> str:
    """Return a name for all that decides the score of a pair beside the pair itself."""
    rerank = settings.rerank
    corpus = None
    if work.source is not None:
        shards = [m.embeddings.sha256 for m in work.source.manifest.shards if m.embeddings is not None]
        corpus = [work.source.spec.vector_fingerprint, shards]
    spec = dataclasses.asdict(dataclasses.replace(work.spec, name="", revision=None))
    return digest("rerank", FORMAT_VERSION, spec, rerank.depth, rerank.texts, corpus)


def _blocks(
    settings: Settings, work: _Work, rejections: Rejections, watch: Callable[[], None]
) -> Iterator[Block]:
    """Yield the candidates of each query, cut at rerank.depth, with the query's text.

    Raises:
        SettingsError: the candidates need query texts or passage texts, and no setting says where they are.
    """
    texts: dict[str, str] = {}
    if settings.search.queries is not None:
        columns = (settings.search.id_column, settings.search.text_column)
        for batch in read_queries(work.storage, settings.search.queries, *columns):
            texts.update(zip(batch.query_ids, batch.texts, strict=True))
    for found in read_candidate_lists(work.storage, str(settings.rerank.candidates), rejections.add):
        watch()
        query = found.query if found.query is not None else texts.get(found.query_id)
        if query is None and settings.search.queries is None:
            raise SettingsError(
                f"rerank.candidates: query {found.query_id!r} comes without its text; set search.queries"
            )
        if query is None:
            rejections.add(found.query_id, None, "unknown_query", "search.queries has no query of this id")
        elif not query.strip():
            rejections.add(found.query_id, None, "empty_query", "nothing but white space")
        elif not found.passage_ids:
            rejections.add(found.query_id, None, "empty_list", "no candidate")
        elif found.texts is None and work.source is None:
            raise SettingsError(
                f"rerank.candidates: the candidates of query {found.query_id!r} come without texts; set "
                "output.uri to the data set they are from"
            )
        else:
            yield _block(found, query, settings.rerank.depth)


def _block(found: Candidates, query: str, depth: int) -> Block:
    ids = found.passage_ids[:depth]
    nothing: list[Any] = [None] * len(ids)
    return {
        "query_id": [found.query_id] * len(ids),
        "query": [query] * len(ids),
        "passage_id": ids,
        "text": found.texts[:depth] if found.texts is not None else nothing,
        "vector_id": nothing,
        "score": found.scores[:depth] if found.scores is not None else nothing,
        "logit": nothing,
        "reason": nothing,
        "detail": nothing,
    }


def _run(settings: Settings, work: _Work, intake: Intake, facts: RunFacts, watch: Callable[[], None]) -> None:
    sizes = cluster_pools(settings, {"rerankers": intake.todo_units}, watch)
    facts.start(sizes.workers("rerankers"), time.time())
    place = Workplace(
        work.storage, join(work.folder, WORK), settings.resources.max_unit_attempts, start_ledger()
    )
    job = make_score_job(settings, place, work.spec, sizes["rerankers"])
    source = make_text_source(settings.rerank, work.source, sizes) if work.source is not None else None
    logger.info("%s pairs to score; %s", f"{facts.rows_planned:,}", sizes)
    telemetry = Telemetry("rerank")
    telemetry.start(facts)
    follow(
        lambda: rerank_receipts(place, job, source, settings.rerank.depth, sizes, intake.groups),
        facts,
        "pairs",
        telemetry,
        watch,
        settings.report.log_interval_s,
    )


def _report(
    settings: Settings,
    work: _Work,
    intake: Intake,
    rejections: Rejections,
    facts: RunFacts,
    totals: Totals,
    outcome: str,
) -> RerankReport:
    complete = outcome == "complete"
    lists = sum(passage_id is None for passage_id in rejections.passage_ids)
    scoring = summarise_scoring(work.spec, facts, totals, totals.facts if complete else facts.counts)
    report = RerankReport(
        **summarise(facts, ended=time.time(), price_per_hour=settings.report.price_per_hour),
        key=work.key,
        complete=complete,
        outcome=outcome,
        files=published_files(work.folder, totals),
        settings=settings.model_dump(mode="json"),
        candidates=str(settings.rerank.candidates),
        units=len(intake.units),
        queries=totals.queries,
        pairs_in=intake.rows + len(rejections) - lists,
        pairs_out=scoring.pairs_out,
        lists_rejected=lists,
        without_trec=tuple(totals.without_trec),
        scoring=scoring,
    )
    return dataclasses.replace(report, advice=tuple(advise_rerank(report)))


def summarise_scoring(
    spec: RerankerSpec, facts: RunFacts, totals: Totals, counts: Mapping[str, int]
) -> Scoring:
    """Return what the reranker pool did, for a report.

    Args:
        spec: of the reranker.
        facts: of this run.
        totals: of the published run.
        counts: by name, of the published run, or of this run as far as it came.
    """
    steady, pool = facts.steady_s, facts.workers.counts.get("rerankers", 0)
    tokens, padded = counts.get("pair_tokens", 0), counts.get("padded_tokens", 0)
    return Scoring(
        model=dataclasses.asdict(spec),
        pairs_out=totals.results.get("logit", 0),
        pair_tokens=tokens,
        truncated_pairs=counts.get("truncated_pairs", 0),
        padding_waste=1 - tokens / padded if padded else 0.0,
        pair_tokens_per_s=facts.counts["pair_tokens"] / steady if steady else 0.0,
        num_rerankers=pool,
        utilisation=facts.device_s / (steady * pool) if steady and pool else 0.0,
    )
