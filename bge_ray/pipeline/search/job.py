"""The search job: queries to a run over the index, or over the shards themselves, reranked if asked for.

Like the embed job it knows one mode: take in, subtract what is done, do the rest, publish.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from bge_ray.dataset.lookup import ShardMap
from bge_ray.errors import BgeRayError, DatasetMismatchError, IncompleteRunError, SettingsError
from bge_ray.formats.runs import read_queries
from bge_ray.model.run.batching import settle_budget
from bge_ray.model.source import fetch_model, hash_model
from bge_ray.model.spec import resolve_reranker
from bge_ray.pipeline.engine.flow import by_actors, by_tasks, parcels, receipts
from bge_ray.pipeline.engine.isolation import start_ledger
from bge_ray.pipeline.engine.pools import Pool, PoolSizes, cluster_pools, compute_dtype
from bge_ray.pipeline.engine.stopping import Stopped, StopRequest, make_watch
from bge_ray.pipeline.engine.telemetry import Telemetry
from bge_ray.pipeline.index.job import index_files, read_index
from bge_ray.pipeline.index.searchers import Searcher
from bge_ray.pipeline.rerank.job import (
    make_score_job,
    make_text_source,
    score_report,
)
from bge_ray.pipeline.rerank.stages import ScoreStage, pair_stage, texts_stage
from bge_ray.pipeline.rerank.texts import TextSource
from bge_ray.pipeline.runs.follow import (
    WORK,
    Source,
    Tally,
    check_rejected,
    clear_work,
    finish_clearing,
    follow,
    open_source,
    publish_report,
    read_current,
)
from bge_ray.pipeline.runs.intake import Block, Intake, Limits, Rejections, take_in
from bge_ray.pipeline.runs.parcels import (
    QUERY_SCHEMA,
    Device,
    EncodeJob,
    GroupTask,
    Parcel,
    ScoreJob,
    Workplace,
    digest,
)
from bge_ray.pipeline.runs.parts import RunOutput, Totals, publish, write_stage
from bge_ray.pipeline.search.stages import (
    QueryEncodeStage,
    SearchJob,
    ShardSearcher,
    read_stage,
    retrieve_stage,
)
from bge_ray.records.model import ModelSpec
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings
from bge_ray.storage.lease import Lease
from bge_ray.storage.objects import join

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# A searcher that dies is started again this often, and then the run ends: an index that does not fit
# in memory would otherwise be tried for ever.
SEARCHER_RESTARTS = 20


@dataclass(frozen=True)
class _Work:
    """All that is known before anything is written; ``index`` is None for an exact search."""

    source: Source
    folder: str
    model: ModelSpec
    index: dict[str, Any] | None
    reranker: ModelSpec | None
    key: str = ""


def search(settings: Settings, stop: StopRequest | None = None) -> dict[str, Any]:
    """Answer queries from a data set, doing only what is not done yet.

    Args:
        settings: needs output.uri (a data set that embed.py completed), search.queries, search.output.
        stop: asked between receipts whether to stop.

    Returns:
        The content of report.json.

    Raises:
        SettingsError, CorpusError, ModelError, DatasetMismatchError, OutputBusyError: nothing was
            published.
        IncompleteRunError, TakenOverError, StorageError: run again to continue.
        RejectedRowsError: the run is published, but too many queries have no answer.
    """
    work = _prepare(settings)
    storage = work.source.storage
    current = read_current(storage, work.folder, work.key)
    if current is not None:
        finish_clearing(storage, work.folder)
        logger.info("nothing to do: %s is up to date", work.folder)
        _check_share(settings, current, work.folder)
        return current | {"outcome": "nothing to do"}
    work = _with_dtypes(settings, work)
    stop = stop or StopRequest()
    with stop.deferred(), Lease(storage, work.folder) as lease:
        watch = make_watch(lease, stop)
        rejections = Rejections()
        place = join(work.folder, WORK)
        blocks = _blocks(settings, work, rejections, watch)
        intake = take_in(storage, place, blocks, QUERY_SCHEMA, _limits(settings), _unit_key(settings, work))
        tally = Tally(time.time(), sum(u.n_rows for g in intake.groups for u in g.todo))
        outcome = "failed"
        totals, sizes = Totals(), None
        try:
            if intake.groups:
                sizes = _run(settings, work, intake, tally, watch)
            lease.check()
            totals = publish(storage, place, intake.units, _outputs(settings, work), rejections)
            if totals.queries != intake.rows:
                raise IncompleteRunError(f"{intake.rows} queries were planned, {totals.queries} came out")
            outcome = "complete"
        except (BgeRayError, Stopped) as error:
            outcome = f"incomplete: {error}"
            raise
        finally:
            report = _report(settings, work, intake, rejections, tally, totals, sizes, outcome)
            if not lease.lost.is_set():
                publish_report(storage, work.folder, report)
        clear_work(storage, work.folder)
    _check_share(settings, report, work.folder)
    return report


def plan_search(settings: Settings) -> str:
    """Say what `search` would do, without writing anything (``--dry-run``)."""
    work = _prepare(settings)
    rejections = Rejections()
    count = sum(len(block["query_id"]) for block in _blocks(settings, work, rejections, lambda: None))
    done = read_current(work.source.storage, work.folder, work.key) is not None
    where = f"the {work.index['factory']} index" if work.index else "the embedding shards, exactly"
    again = f", reranked by {work.reranker.name}" if work.reranker else ""
    return (
        f"{count:,} queries ({len(rejections):,} left out), {settings.search.k} results each from "
        f"{work.source.manifest.rows_out:,} vectors by {where}{again}, to {work.folder}: "
        f"{'up to date' if done else 'to be done'}"
    )


def search_receipts(
    encode: EncodeJob,
    job: SearchJob,
    score: ScoreJob | None,
    source: TextSource | None,
    depth: int,
    sizes: PoolSizes,
    groups: tuple[GroupTask, ...],
) -> Iterator[Parcel]:
    """The data path: groups of queries in, one receipt a unit out, in the order they finish."""
    rows = parcels(groups)
    rows = by_tasks(rows, read_stage, sizes, place=job.place)
    rows = by_actors(rows, QueryEncodeStage, sizes["encoders"], encode)
    rows = by_tasks(rows, retrieve_stage, sizes, job=job)
    if score is not None:
        rows = by_tasks(rows, texts_stage, sizes, source=source, depth=depth)
        rows = by_tasks(rows, pair_stage, sizes, job=score)
        rows = by_actors(rows, ScoreStage, sizes["rerankers"], score)
    rows = by_tasks(rows, write_stage, sizes, place=job.place)
    return receipts(rows)


def _check_share(settings: Settings, report: dict[str, Any], folder: str) -> None:
    share = (report["queries_in"] - report["queries_out"]) / max(1, report["queries_in"])
    allowed = settings.search.max_rejected_fraction
    check_rejected(report, folder, share, allowed, "search.max_rejected_fraction")


def _prepare(settings: Settings) -> _Work:
    settings.require("output.uri", "search.queries", "search.output")
    source = open_source(settings)
    if not source.spec.model.normalize:
        raise SettingsError(f"output.uri {source.root}: its vectors are not normalised, which a search needs")
    index = None if settings.search.exact else read_index(source.storage, source.root)
    if index is None and not settings.search.exact:
        logger.info("%s has no index: the embedding shards are searched exactly", source.root)
    if index is not None:
        _check_index(index, source)
    reranker = resolve_reranker(settings.rerank, on_gpu=False) if settings.search.rerank else None
    work = _Work(source, str(settings.search.output), _query_model(settings, source), index, reranker)
    listed = source.storage.list_files(str(settings.search.queries))
    inputs = [(info.uri, info.size, info.etag) for info in listed]
    outputs = [output.folder for output in _outputs(settings, work)]
    # The dtypes of a report's key are those asked for: what is there is not made anew on other devices.
    asked = (settings.model.dtype, settings.rerank.dtype, settings.search.tag, outputs, inputs)
    return dataclasses.replace(work, key=digest(_unit_key(settings, work), *asked))


def _check_index(index: dict[str, Any], source: Source) -> None:
    """Refuse an index of other vectors; one that is merely older than the data set is told of."""
    where = f"output.uri {source.root}"
    if index["dataset_fingerprint"] != source.spec.fingerprint or index["dim"] != source.spec.model.dim:
        raise DatasetMismatchError(
            f"{where}: its index was built from vectors of another model or other settings; run index.py "
            "again, or set search.exact"
        )
    if index["ntotal"] != source.manifest.rows_out:
        logger.warning(
            "%s: the index holds %d vectors, the data set %d: it is older; run index.py to renew it",
            where,
            index["ntotal"],
            source.manifest.rows_out,
        )


def _query_model(settings: Settings, source: Source) -> ModelSpec:
    """Return the model of the data set, from where this run finds it, with the instruction for queries.

    Raises:
        DatasetMismatchError: model.name names another model.
        ModelError: the model is not to be had.
    """
    spec, asked = source.spec.model, settings.model
    if "name" in asked.model_fields_set:
        spec = dataclasses.replace(spec, name=asked.name, revision=asked.revision)
    folder, commit = fetch_model(spec.name, spec.revision)
    if hash_model(folder) != spec.weights_sha256:
        raise DatasetMismatchError(
            f"output.uri {source.root}: was embedded with {source.spec.model.name}, whose files differ from "
            f"those of {spec.name}; queries need the same model"
        )
    if asked.max_length is not None and asked.max_length < spec.max_length:
        spec = dataclasses.replace(spec, max_length=asked.max_length)
    if asked.query_instruction is not None:
        spec = dataclasses.replace(spec, query_instruction=asked.query_instruction)
    return dataclasses.replace(spec, revision=commit).stored_as("float32")


def _with_dtypes(settings: Settings, work: _Work) -> _Work:
    """Settle the compute dtypes, which go by the devices of the cluster."""
    dtype = compute_dtype(settings, "encoders", settings.model.dtype, work.model.dtype)
    work = dataclasses.replace(work, model=dataclasses.replace(work.model, dtype=dtype))
    if work.reranker is None:
        return work
    dtype = compute_dtype(settings, "rerankers", settings.rerank.dtype, "float16")
    return dataclasses.replace(work, reranker=dataclasses.replace(work.reranker, dtype=dtype))


def _outputs(settings: Settings, work: _Work) -> list[RunOutput]:
    """Return the runs to publish: the candidates, and the reranked run if there is one."""
    outputs = [RunOutput(work.folder, settings.search.tag, "score")]
    if work.reranker is not None:
        folder = settings.rerank.output or join(work.folder, "reranked")
        outputs.append(RunOutput(folder, f"{settings.search.tag}-reranked", "logit"))
    return outputs


def _limits(settings: Settings) -> Limits:
    """Return when units and groups are full, in queries; a reranked unit is counted in pairs."""
    most = settings.search.unit_queries
    if not settings.search.rerank:
        return Limits(most, most)
    depth = min(settings.rerank.depth, settings.search.k)
    unit = max(1, min(most, settings.rerank.unit_pairs // depth))
    return Limits(unit, max(unit, min(most, settings.rerank.join_pairs // depth)))


def _unit_key(settings: Settings, work: _Work) -> str:
    """Return a name for all that decides the answers of a query beside the query itself."""
    source, asked = work.source, settings.search
    shards = [m.embeddings.sha256 for m in source.manifest.shards if m.embeddings is not None]
    index = None
    if work.index is not None:
        effort = asked.nprobe or work.index["nprobe"]
        index = [work.index["kind"], [file["sha256"] for file in work.index["files"]], effort, asked.rescore]
    rerank: list[Any] | None = None
    if work.reranker is not None:
        spec = dataclasses.asdict(dataclasses.replace(work.reranker, name="", revision=None))
        rerank = [spec, settings.rerank.depth, settings.rerank.texts]
    queries = [work.model.query_instruction, work.model.max_length, work.model.dtype]
    return digest("search", FORMAT_VERSION, source.spec.fingerprint, shards, index, queries, asked.k, rerank)


def _blocks(
    settings: Settings, work: _Work, rejections: Rejections, watch: Callable[[], None]
) -> Iterator[Block]:
    """Yield the queries one by one."""
    asked = settings.search
    columns = (asked.id_column, asked.text_column)
    for batch in read_queries(work.source.storage, str(asked.queries), *columns):
        watch()
        for row in batch.rejected:
            rejections.add(row.passage_id, None, row.reason, f"{batch.uri} row {row.row}: {row.detail}")
        for query_id, text in zip(batch.query_ids, batch.texts, strict=True):
            yield {"query_id": [query_id], "query": [text]}


def _run(
    settings: Settings, work: _Work, intake: Intake, tally: Tally, watch: Callable[[], None]
) -> PoolSizes:
    source = work.source
    files = index_files(source.root, work.index) if work.index is not None else []
    shards = ShardMap.of(source.manifest)
    most = {"encoders": len(intake.groups), "searchers": len(files) if files else len(shards.facts)}
    if work.reranker is not None:
        most["rerankers"] = sum(len(group.todo) for group in intake.groups)
    sizes = cluster_pools(settings, most, watch)
    attempts = settings.resources.max_unit_attempts
    place = Workplace(source.storage, join(work.folder, WORK), attempts, start_ledger())
    score = texts = None
    if work.reranker is not None:
        score = make_score_job(settings, place, work.reranker, sizes["rerankers"])
        texts = make_text_source(settings.rerank, source, sizes)
    searchers = _start_searchers(work, files, shards, sizes["searchers"])
    asked = settings.search
    job = SearchJob(
        place=place,
        root=source.root,
        shards=shards,
        searchers=tuple(searchers),
        k=asked.k,
        fetched=max(asked.k, asked.rescore if work.index is not None else 0),
        effort=asked.nprobe or work.index["nprobe"] if work.index is not None else None,
        rescores=work.index is not None and asked.rescore > 0,
    )
    encode = _encode_job(settings, place, work.model, sizes["encoders"])
    logger.info("%s queries to answer; %s", f"{tally.rows_planned:,}", sizes)
    telemetry = Telemetry("search", run_id())
    telemetry.start(
        units=sum(len(group.todo) for group in intake.groups),
        encoders=sizes["rerankers" if work.reranker else "encoders"].count,
    )
    try:
        follow(
            lambda: search_receipts(encode, job, score, texts, settings.rerank.depth, sizes, intake.groups),
            intake,
            tally,
            telemetry,
            watch,
            settings.report.log_interval_s,
        )
    finally:
        for searcher in searchers:
            ray.kill(searcher)
    return sizes


def _encode_job(settings: Settings, place: Workplace, spec: ModelSpec, pool: Pool) -> EncodeJob:
    budget = settle_budget(settings.batching.token_budget, on_gpu=pool.gpus > 0)
    return EncodeJob(place, spec, Device(pool.device, pool.threads, budget, settings.model.trust_remote_code))


def _start_searchers(work: _Work, files: list[Any], shards: ShardMap, pool: Pool) -> list[ActorHandle]:
    """Start the actors that share the index, or the shards of an exact search."""
    options = {
        "num_cpus": pool.cpus,
        "max_restarts": SEARCHER_RESTARTS,
        "max_task_retries": SEARCHER_RESTARTS,
        # Each holds its share on its own machine.
        "scheduling_strategy": "SPREAD",
    }
    storage = work.source.storage
    if work.index is None:
        actor = ray.remote(**options)(ShardSearcher)
        shares = [shards.facts[i :: pool.count] for i in range(pool.count)]
        return [actor.remote(storage, work.source.root, share, pool.threads) for share in shares]
    actor = ray.remote(**options)(Searcher)
    return [actor.remote(storage, files[i :: pool.count], pool.threads) for i in range(pool.count)]


def _report(
    settings: Settings,
    work: _Work,
    intake: Intake,
    rejections: Rejections,
    tally: Tally,
    totals: Totals,
    sizes: PoolSizes | None,
    outcome: str,
) -> dict[str, Any]:
    complete = outcome == "complete"
    index = work.index or {}
    facts = totals.facts if complete else tally.facts
    report = {
        "complete": complete,
        "outcome": outcome,
        "key": work.key,
        "queries": settings.search.queries,
        "dataset": work.source.root,
        "model": dataclasses.asdict(work.model),
        "index": {name: index.get(name) for name in ("factory", "kind", "ntotal", "nprobe", "recall")}
        if index
        else None,
        "k": settings.search.k,
        "units": len(intake.units),
        "units_done_now": tally.done_units,
        "queries_in": intake.rows + len(rejections),
        "queries_out": totals.answered.get("score", 0),
        "results": totals.results.get("score", 0),
        "rejected_reasons": dict(sorted(totals.reasons.items())),
        "unknown_ids": facts.get("unknown_ids", 0),
        "missing_results": facts.get("missing_results", 0),
        "doubled_passages": facts.get("doubled_passages", 0),
        "query_tokens": facts.get("query_tokens", 0),
        "truncated_queries": facts.get("truncated_queries", 0),
        "failures": tally.failures[:100],
        "without_trec": totals.without_trec,
        "wall_s": time.time() - tally.started,
        "steady_s": tally.steady_s,
        "stage_s": {key: facts[key] for key in sorted(facts) if key.endswith("_s")},
    }
    if work.reranker is not None:
        pool = sizes["rerankers"] if sizes is not None else None
        report["rerank"] = {
            "model": dataclasses.asdict(work.reranker),
            "pairs_out": totals.results.get("logit", 0),
            **score_report(facts, tally, pool),
        }
    return report
