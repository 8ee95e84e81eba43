"""The rerank job: candidate lists to a run ordered by a reranker.

Like the embed job it knows one mode: take in, subtract what is done, do the rest, publish.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from bge_ray.dataset.lookup import ShardMap
from bge_ray.errors import IncompleteRunError, SettingsError
from bge_ray.formats.candidates import NO_SPAN, Candidates, find_candidates, read_candidate_lists
from bge_ray.formats.queries import read_queries
from bge_ray.model.spec import resolve_reranker
from bge_ray.pipeline.engine.flow import by_tasks, parcels, receipts
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.pools import Sizes, cluster_sizes, device_of, reranker_request
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.pipeline.rerank.score import PairJob, by_reranker, make_score_job, summarise_scoring
from bge_ray.pipeline.rerank.texts import TextSource, open_texts, takes_kept
from bge_ray.pipeline.runs.groups import CANDIDATE_SCHEMA, SPAN_SCHEMA, GroupTask, Workplace
from bge_ray.pipeline.runs.holders import Holders, start_holders
from bge_ray.pipeline.runs.intake import Block, Intake, Limits, Rejections, read_group_stage
from bge_ray.pipeline.runs.parts import LEFT_OUT, RUN_FILES, RunOutput, Totals, part_stage
from bge_ray.pipeline.runs.source import open_source, refuse_in_source
from bge_ray.pipeline.runs.work import TASKS, Outcome, RunWork, check_rejected, published_files
from bge_ray.pipeline.work import carry_out, refuse_taken
from bge_ray.records.canonical import digest
from bge_ray.records.reports import RerankReport
from bge_ray.report.advice import advise_rerank
from bge_ray.report.facts import RunFacts, summarise
from bge_ray.report.run_page import rerank_page
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings
from bge_ray.storage.folders import refuse_collisions
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import open_folder

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2


def rerank(settings: Settings, stop: StopRequest | None = None) -> RerankReport:
    """Rerank candidate lists, doing only what is not done yet.

    Args:
        settings: needs rerank.candidates and rerank.output; output.uri where candidates are bare ids,
            and search.queries where they come without their queries.
        stop: asked between receipts whether to stop.

    Returns:
        The content of report.json.

    Raises:
        SettingsError, CorpusError, ModelError, OutputCollisionError, OutputBusyError: nothing was published.
        IncompleteRunError, TakenOverError, StorageError: run again to continue.
        RejectedRowsError: the run is published, but too many pairs were left out.
    """
    facts = RunFacts("rerank", run_id())
    report = carry_out(RunWork(settings, RerankJob(settings)), facts, stop)
    _check_share(settings, report)
    return report


def plan_rerank(settings: Settings) -> str:
    """Say what `rerank` would do, without writing anything (``--dry-run``)."""
    job = RerankJob(settings)
    work = RunWork(settings, job)
    refuse_taken(work.folders)
    rejections = Rejections()
    lists = pairs = 0
    for block in job.blocks(rejections, lambda: None):
        lists += 1
        pairs += len(block["query_id"])
    done = work.current() is not None
    return (
        f"{pairs:,} pairs of {lists:,} queries by {job.spec.name} ({job.spec.max_length} tokens a pair), "
        f"{len(rejections):,} lines left out, to {settings.rerank.output}: "
        f"{'up to date' if done else 'to be done'}"
    )


class RerankJob:
    """One rerank run, planned; see `runs.work.RunJob`."""

    name, rows = "rerank", "pairs"
    kind = RerankReport

    def __init__(self, settings: Settings) -> None:
        """Settle the model, and open the data set where there is one; reads only."""
        settings.require("rerank.candidates", "rerank.output")
        asked = settings.rerank
        refuse_collisions(
            {
                "output.uri": settings.output.uri,
                "search.output": settings.search.output,
                "rerank.output": asked.output,
            },
            {
                "corpus.uri": settings.corpus.uri,
                "search.queries": settings.search.queries,
                "rerank.model": asked.model,
            },
            {"rerank.candidates": asked.candidates},
        )
        self._settings = settings
        self._storage = Storage(settings.output.storage_timeout_s)
        self._source = open_source(settings) if settings.output.uri is not None else None
        if self._source is not None:
            refuse_in_source(self._source, {"rerank.output": asked.output})
            takes_kept(settings, self._source)
        self._holders: Holders | None = None
        self._chunked = self._source is not None and self._source.chunked
        self.schema = pa.schema([*CANDIDATE_SCHEMA, *(SPAN_SCHEMA if self._chunked else ())])
        self.spec = resolve_reranker(asked, on_gpu=False)
        self._folder = open_folder(
            self._storage, str(asked.output), "reranked", "rerank.output", (*RUN_FILES, LEFT_OUT)
        )

    @property
    def storage(self) -> Storage:
        """For all requests."""
        return self._storage

    @property
    def key(self) -> str:
        """A name for all that decides the run; of dtype and kernels what was asked, for any device."""
        settings = self._settings
        found = [find_candidates(self._storage, str(settings.rerank.candidates))]
        if settings.search.queries is not None:
            found += self._storage.list_files(settings.search.queries)
        inputs = [(info.uri, info.size, info.etag) for info in found]
        asked = (settings.rerank.dtype, settings.rerank.kernels, settings.search.tag, inputs)
        # It decides the run, but no score: what is done stays so where it changes on the way.
        share = settings.rerank.first_stage_share
        return digest(self._decisive(), *asked, *([share] if share else []))

    def outputs(self) -> list[RunOutput]:
        """Return the reranked run."""
        tag, layers = self._settings.search.tag, self.spec.layer_scores
        share = self._settings.rerank.first_stage_share
        return [RunOutput(self._folder, tag, "score", layers, self._chunked, share)]

    def withdraw(self) -> None:
        """Everything that an earlier run published is replaced."""

    def limits(self) -> Limits:
        """Return when units and groups are full, in pairs."""
        return Limits(self._settings.rerank.unit_pairs, self._settings.rerank.join_pairs)

    def settle(self, watch: Callable[[], None]) -> str:
        """Settle the compute dtype, which goes by the devices of the cluster."""
        on_gpu = device_of(self._settings, reranker_request(self._settings, 1), watch) == "cuda"
        self.spec = resolve_reranker(self._settings.rerank, on_gpu=on_gpu)
        return digest(self._decisive(), self.spec.dtype, self.spec.kernels)

    def _decisive(self) -> list[Any]:
        """Return all that decides the score of a pair beside the pair itself, compute dtype and kernels."""
        asked, corpus = self._settings.rerank, None
        if self._source is not None:
            corpus = [self._source.spec.vector_fingerprint, self._source.shard_hashes]
        spec = dataclasses.replace(self.spec, name="", revision=None, dtype="", kernels="")
        decisive = [
            "rerank",
            FORMAT_VERSION,
            dataclasses.asdict(spec),
            asked.depth,
            asked.texts,
            asked.reads,
            corpus,
        ]
        return [*decisive, "spans"] if self._chunked else decisive

    def blocks(self, rejections: Rejections, watch: Callable[[], None]) -> Iterator[Block]:
        """Yield the candidates of each query, cut at rerank.depth, with the query's text.

        Raises:
            SettingsError: the candidates need texts, and no setting says where they are.
        """
        settings, texts = self._settings, self._query_texts()
        chunks = self._chunked and settings.rerank.reads == "chunk"
        lists = read_candidate_lists(
            self._storage, str(settings.rerank.candidates), rejections.add, chunks=chunks
        )
        for found in lists:
            watch()
            query = found.query if found.query is not None else texts.get(found.query_id)
            if query is None and settings.search.queries is None:
                raise SettingsError(
                    f"rerank.candidates: query {found.query_id!r} comes without its text; set search.queries"
                )
            if query is None:
                detail = "search.queries has no query of this id"
                rejections.add(found.query_id, None, "unknown_query", detail)
            elif not query.strip():
                rejections.add(found.query_id, None, "empty_query", "nothing but white space")
            elif not found.passage_ids:
                rejections.add(found.query_id, None, "empty_list", "no candidate")
            elif found.texts is None and self._source is None:
                raise SettingsError(
                    f"rerank.candidates: the candidates of query {found.query_id!r} come without texts; set "
                    "output.uri to the data set they are from"
                )
            elif settings.rerank.first_stage_share and not _finite(found, settings.rerank.depth):
                raise SettingsError(
                    f"rerank.first_stage_share: a candidate of query {found.query_id!r} has no score, or an "
                    "infinite one; set it to 0, or give scores to all of them"
                )
            else:
                yield _block(found, query, settings.rerank.depth, spans=self._chunked)

    def _query_texts(self) -> dict[str, str]:
        asked = self._settings.search
        texts: dict[str, str] = {}
        if asked.queries is not None:
            for batch in read_queries(self._storage, asked.queries, asked.id_column, asked.text_column):
                texts.update(zip(batch.query_ids, batch.texts, strict=True))
        return texts

    def receipts(
        self, place: Workplace, groups: tuple[GroupTask, ...], facts: RunFacts, watch: Callable[[], None]
    ) -> Callable[[], Iterator[Parcel]]:
        """Size the pool; return what starts the data path."""
        settings = self._settings
        units = sum(len(group.todo) for group in groups)
        sizes = cluster_sizes(settings, [reranker_request(settings, units)], [TASKS], watch)
        facts.start(sizes.workers("rerankers"), time.time())
        texts = None
        if (source := self._source) is not None:
            shards = ShardMap.of(source.manifest)
            self._holders = start_holders(source.storage, source.root, shards, sizes.tasks["tasks"].count)
            texts = open_texts(settings, source, self._holders)
        logger.info("%s pairs to score; %s", f"{facts.rows_planned:,}", sizes)
        return lambda: self._flow(place, groups, sizes, texts)

    def _flow(
        self, place: Workplace, groups: tuple[GroupTask, ...], sizes: Sizes, texts: TextSource | None
    ) -> Iterator[Parcel]:
        """The data path: groups of candidates in, one receipt a unit out, in the order they finish."""
        settings, tasks, pool = self._settings, sizes.tasks["tasks"], sizes.pools["rerankers"]
        pair = PairJob(place, self.spec, settings.rerank.trust_remote_code, settings.rerank.depth)
        rows = parcels([group.parcel() for group in groups])
        rows = by_tasks(rows, read_group_stage, tasks, storage=place.storage)
        score = make_score_job(settings, place, self.spec, pool)
        rows = by_reranker(rows, tasks, pool, pair, score, texts)
        spans = SPAN_SCHEMA.names if self._chunked else ()
        rows = by_tasks(rows, part_stage, tasks, place=place, more=(*spans, *self.spec.layer_scores))
        return receipts(rows)

    def stop(self) -> None:
        """End the actors that hold what is stored."""
        if self._holders is not None:
            self._holders.stop()

    def check(self, intake: Intake, totals: Totals) -> None:
        """Refuse parts that do not have every pair."""
        if totals.rows != intake.rows:
            raise IncompleteRunError(f"{intake.rows} pairs were planned, {totals.rows} came out")

    def report(self, facts: RunFacts, what: Outcome) -> RerankReport:
        """Return the report."""
        settings, totals = self._settings, what.totals
        lists = sum(passage_id is None for passage_id in what.rejections.passage_ids)
        counts = totals.facts if what.complete else facts.counts
        scoring = summarise_scoring(self.spec, facts, totals, counts)
        report = RerankReport(
            **summarise(facts, ended=time.time(), price_per_hour=settings.report.price_per_hour),
            key=what.key,
            complete=what.complete,
            outcome=what.outcome,
            files=published_files(self._folder, totals),
            settings=settings.model_dump(mode="json"),
            candidates=str(settings.rerank.candidates),
            units=len(what.intake.units),
            queries=totals.queries,
            pairs_in=what.intake.rows + len(what.rejections) - lists,
            pairs_out=scoring.pairs_out,
            lists_rejected=lists,
            without_trec=tuple(totals.without_trec),
            scoring=scoring,
        )
        return dataclasses.replace(report, advice=tuple(advise_rerank(report)))

    def page(self, report: RerankReport) -> bytes:
        """Return its page."""
        return rerank_page(report)


def _finite(found: Candidates, depth: int) -> bool:
    return found.scores is not None and all(map(math.isfinite, found.scores[:depth]))


def _block(found: Candidates, query: str, depth: int, *, spans: bool) -> Block:
    ids = found.passage_ids[:depth]
    nothing: list[Any] = [None] * len(ids)
    named = found.spans if spans and found.spans is not None else [NO_SPAN] * len(ids)
    chunks = {name: [span[i] for span in named[:depth]] for i, name in enumerate(SPAN_SCHEMA.names)}
    return {
        **(chunks if spans else {}),
        "query_id": [found.query_id] * len(ids),
        "query": [query] * len(ids),
        "passage_id": ids,
        "text": found.texts[:depth] if found.texts is not None else nothing,
        "vector_id": found.vector_ids[:depth] if found.vector_ids is not None else nothing,
        "first_score": found.scores[:depth] if found.scores is not None else nothing,
        "score": nothing,
        "reason": nothing,
        "detail": nothing,
    }


def _check_share(settings: Settings, report: RerankReport) -> None:
    left_out = report.pairs_in - report.pairs_out + report.lists_rejected
    share = left_out / max(1, report.pairs_in + report.lists_rejected)
    allowed = settings.rerank.max_rejected_fraction
    folder, reasons = str(settings.rerank.output), report.rejected_reasons
    check_rejected(folder, share, allowed, "rerank.max_rejected_fraction", reasons)
