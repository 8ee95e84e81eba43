"""The search job: queries to a run over the index, or over the shards themselves, reranked if asked for.

Like the embed job it knows one mode: take in, subtract what is done, do the rest, publish.
"""

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from bge_ray.dataset.commit import ROW_GROUP_ROWS
from bge_ray.dataset.lookup import ShardMap
from bge_ray.dataset.passing import Passing
from bge_ray.errors import DatasetMismatchError, IncompleteRunError, SettingsError
from bge_ray.formats.queries import read_queries
from bge_ray.index.refill import RESULTS_AT_ONCE
from bge_ray.index.seismic import package
from bge_ray.model.source import fetch_model
from bge_ray.model.spec import asked_of_queries, hash_files, resolve_reranker
from bge_ray.pipeline.engine.flow import by_actors, by_tasks, follow, parcels, receipts
from bge_ray.pipeline.engine.model_stage import ModelJob, ModelStage
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.pools import (
    SEARCHERS,
    Pool,
    Sizes,
    await_pools,
    cluster_sizes,
    device_of,
    encoder_request,
    reranker_request,
    searcher_request,
)
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.pipeline.index.published import index_files, read_index
from bge_ray.pipeline.index.tasks import WrittenFile
from bge_ray.pipeline.rerank.score import PairJob, by_reranker, make_score_job, summarise_scoring
from bge_ray.pipeline.rerank.texts import TextSource, open_texts, takes_kept
from bge_ray.pipeline.runs.groups import QUERY_SCHEMA, GroupTask, Workplace
from bge_ray.pipeline.runs.holders import Handover, Holders, start_holders
from bge_ray.pipeline.runs.intake import Block, Intake, Limits, Rejections
from bge_ray.pipeline.runs.parts import LEFT_OUT, RUN_FILES, RunOutput, Totals, part_stage
from bge_ray.pipeline.runs.passages import text_columns
from bge_ray.pipeline.runs.source import Source, open_source, refuse_in_source
from bge_ray.pipeline.runs.work import TASKS, WORK, Outcome, RunWork, check_rejected, published_files
from bge_ray.pipeline.search.asked import settle_asked
from bge_ray.pipeline.search.filtering import FILTER, Filtering, is_filtered, passes_of
from bge_ray.pipeline.search.finders import Finder, weigh_terms
from bge_ray.pipeline.search.freshness import check_index
from bge_ray.pipeline.search.gate import EncodedSample, sample_of, settle_sparse
from bge_ray.pipeline.search.replicas import replicas_of, start_exact, start_index
from bge_ray.pipeline.search.retrieve import Retrieval, plan_retrieval, told_columns
from bge_ray.pipeline.search.stages import (
    QueryJob,
    RetrieveJob,
    read_queries_stage,
    retrieve_stage,
)
from bge_ray.pipeline.work import carry_out, refuse_taken
from bge_ray.records.canonical import digest, from_json, to_json
from bge_ray.records.index import Shortfall
from bge_ray.records.model import BM25, EMBEDDING, SPARSE, ModelSpec
from bge_ray.records.reports import SearchedIndex, SearchReport
from bge_ray.records.sparse import SparseChoice
from bge_ray.report.advice import advise_search, advise_shortfall
from bge_ray.report.facts import RunFacts, summarise
from bge_ray.report.run_page import search_page
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings
from bge_ray.storage.folders import refuse_collisions
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder, open_folder

if TYPE_CHECKING:
    from ray.data import Dataset

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
# Below search.output, where rerank.output does not say otherwise.
RERANKED = "reranked"
# What holds each output that is searched.
POOL_OF = {EMBEDDING: SEARCHERS, SPARSE: f"sparse_{SEARCHERS}", BM25: f"bm25_{SEARCHERS}"}


def search(settings: Settings, stop: StopRequest | None = None) -> SearchReport:
    """Answer queries from a data set, doing only what is not done yet.

    Args:
        settings: needs output.uri (a data set that the embed job completed), search.queries, search.output.
        stop: asked between receipts whether to stop.

    Returns:
        The content of report.json.

    Raises:
        SettingsError, CorpusError, ModelError, DatasetMismatchError, OutputCollisionError, OutputBusyError:
            nothing was published.
        IncompleteRunError, TakenOverError, StorageError: run again to continue.
        RejectedRowsError: the run is published, but too many queries, or pairs, were left out.
    """
    facts = RunFacts("search", run_id())
    job = SearchJob(settings)
    report = carry_out(RunWork(settings, job), facts, stop)
    _check_share(settings, report)
    return report


def plan_search(settings: Settings) -> str:
    """Say what `search` would do, without writing anything (``--dry-run``)."""
    job = SearchJob(settings)
    work = RunWork(settings, job)
    refuse_taken(work.folders)
    rejections = Rejections()
    count = sum(len(block["query_id"]) for block in job.blocks(rejections, lambda: None))
    done = work.current() is not None
    again = f", reranked by {job.reranker.name}" if job.reranker else ""
    return (
        f"{count:,} queries ({len(rejections):,} left out), {settings.search.k} results each from "
        f"{job.source.manifest.vectors:,} vectors by {job.way()}{again}, to {settings.search.output}: "
        f"{'up to date' if done else 'to be done'}"
    )


class SearchJob:
    """One search, planned; see `runs.work.RunJob`."""

    name, rows = "search", "queries"
    kind = SearchReport

    def __init__(self, settings: Settings, output_key: str = "search.output") -> None:
        """Open the data set and its index, and settle the models; reads only.

        Args:
            settings: as `search` takes them.
            output_key: the setting that named search.output, for messages.
        """
        settings.require("output.uri", "search.queries", "search.output")
        asked = settings.search
        outputs = {
            output_key: asked.output,
            "rerank.output": settings.rerank.output if asked.rerank else None,
        }
        refuse_collisions(
            {"output.uri": settings.output.uri, **outputs},
            {
                "corpus.uri": settings.corpus.uri,
                "search.queries": asked.queries,
                "model.name": settings.model.name,
                "rerank.model": settings.rerank.model if asked.rerank else None,
            },
            {},
        )
        self._settings = settings
        self.source = open_source(settings)
        refuse_in_source(self.source, outputs)
        self.asked = settle_asked(asked, self.source)
        if asked.sparse == "approximate":
            package()
        self.filtering = Filtering(asked, self.source)
        self.schema = (
            QUERY_SCHEMA.append(pa.field(FILTER, pa.string())) if is_filtered(asked) else QUERY_SCHEMA
        )
        if (
            self.source.chunked
            and asked.rerank
            and asked.group == "chunk"
            and settings.rerank.reads != "chunk"
        ):
            raise SettingsError(
                "search.group chunk: a rerank of whole passages would read a passage once for each of its "
                "chunks; set search.group to passage, or rerank.reads to chunk"
            )
        by_vectors = EMBEDDING in self.asked.found_by
        self.index = read_index(self.storage, self.source.root) if by_vectors and not asked.exact else None
        if self.index is not None:
            way_out = "set search.stale_index"
            check_index(self.index, self.source, allowed=asked.stale_index, way_out=way_out)
            if shortfall := self._shortfall():
                logger.warning("%s: %s", self.source.root, advise_shortfall(shortfall))
            results = "passages" if self.source.chunked and asked.group == "passage" else "vectors"
            if self.index.results != results:
                logger.warning(
                    "%s: its index was tuned for %s and is searched for %s: its recall is of the former; run "
                    "index.py with the same search.group to tune it for these",
                    self.source.root,
                    *(self.index.results, results),
                )
        elif by_vectors and not asked.exact:
            if asked.replicas:
                raise SettingsError(
                    f"search.replicas {asked.replicas}: {self.source.root} has no index to be held; run "
                    "index.py first, or leave it out"
                )
            logger.info("%s has no index: the embedding shards are searched exactly", self.source.root)
        self.model = _query_model(settings, self.source, self.asked.of_queries)
        self.reranker = resolve_reranker(settings.rerank, on_gpu=False) if asked.rerank else None
        if asked.rerank:
            takes_kept(settings, self.source)
        self._searchers: list[ActorHandle] = []
        self._holders: Holders | None = None
        self._sparse: SparseChoice | None = None
        self._unit_key = ""
        self._passing: int | None = None
        self._passes: ray.ObjectRef | None = None

    @functools.cached_property
    def _folders(self) -> list[OwnedFolder]:
        return _folders(self._settings, self.storage)

    @property
    def storage(self) -> Storage:
        """For all requests."""
        return self.source.storage

    @property
    def key(self) -> str:
        """A name for all that decides the run; of dtypes what was asked: other devices redo nothing."""
        settings = self._settings
        listed = self.storage.list_files(str(settings.search.queries))
        inputs = [(info.uri, info.size, info.etag) for info in listed]
        folders = [folder.uri for folder in self._folders]
        asked = (
            settings.model.dtype,
            settings.rerank.dtype,
            settings.rerank.kernels,
            settings.search.tag,
            folders,
            inputs,
        )
        # What passes for a query goes by the filter stored beside it, and so does what is done anew.
        filters = (
            [[settings.search.filter, settings.search.filter_column]] if is_filtered(settings.search) else []
        )
        # It decides the run, but no score: what is done stays so where it changes on the way.
        share = settings.rerank.first_stage_share if self.reranker is not None else 0
        return digest(self.decisive(), *asked, *filters, *([share] if share else []))

    def outputs(self) -> list[RunOutput]:
        """Return the candidates, and the reranked run if there is one."""
        tag = self._settings.search.tag
        spans, combining = self.source.chunked, self.asked.combining
        scores = () if combining is None else combining.columns
        outputs = [RunOutput(self._folders[0], tag, "first_score", scores, spans)]
        if self.reranker is not None:
            more = (*scores, *self.reranker.layer_scores)
            share = self._settings.rerank.first_stage_share
            outputs.append(RunOutput(self._folders[1], f"{tag}-reranked", "score", more, spans, share))
        return outputs

    def withdraw(self) -> None:
        """Remove the reranked run of an earlier search, which is of other candidates."""
        folder = _reranked(self.storage, join(self._folders[0].uri, RERANKED))
        if self.reranker is not None or not folder.is_claimed():
            return
        there = [name for name in RUN_FILES if self.storage.info(join(folder.uri, name)) is not None]
        gone = set(there) - set(folder.remove(there))
        if gone:
            logger.info("%s: %s of an earlier search removed", folder.uri, ", ".join(sorted(gone)))

    def limits(self) -> Limits:
        """Return when units and groups are full, in queries; a reranked unit is counted in pairs.

        A group is as small as its results ask for, because all of them are in memory together.
        """
        settings = self._settings
        fetched = sum(self._retrieval(name).reach.first.fetched for name in self.asked.found_by)
        most = max(1, min(settings.search.unit_queries, RESULTS_AT_ONCE // fetched))
        if not settings.search.rerank:
            return Limits(most, most)
        depth = min(settings.rerank.depth, settings.search.k)
        unit = max(1, min(most, settings.rerank.unit_pairs // depth))
        return Limits(unit, max(unit, min(most, settings.rerank.join_pairs // depth)))

    def _rescored(self) -> int:
        """Return the candidates of the index that are scored again; 0 for none."""
        asked = self._settings.search
        if self.index is None:
            return 0
        return self.index.rescored(self.asked.candidates) if asked.rescore is None else asked.rescore

    def _shortfall(self) -> Shortfall | None:
        """Return what the index misses of its own target; None where it is not searched."""
        if self.index is None:
            return None
        return self.index.shortfall(self.asked.candidates, self._rescored())

    def _retrieval(self, output: str) -> Retrieval:
        """Return how results are found by one output."""
        asked, k = self._settings.search, self.asked.candidates
        if output != EMBEDDING:
            return plan_retrieval(self.source, None, k, 0, group=asked.group)
        return plan_retrieval(
            self.source, self.index, k, self._rescored(), group=asked.group, effort=asked.nprobe
        )

    def way(self) -> str:
        """Say what is searched, and what becomes of what is found."""
        asked, combining = self._settings.search, self.asked.combining
        vectors = "the embedding shards, exactly"
        if self.index is not None:
            vectors = f"the {self.index.factory} index"
        names = {EMBEDDING: vectors, SPARSE: "the weights of tokens", BM25: "BM25"}
        if asked.sparse == "approximate" and (self._sparse is None or self._sparse.taken):
            names[SPARSE] += ", approximately"
        way = "; ".join(names[name] for name in self.asked.found_by)
        if combining is not None and combining.fusion is not None:
            way += f"; fused by {combining.fusion.by}"
        if asked.rescore_with:
            way += f"; scored again by {', '.join(asked.rescore_with)}"
        if asked.filter is not None:
            way += f"; among what passes {asked.filter}"
        if asked.filter_column is not None:
            way += f"; each query's among what passes its {asked.filter_column}"
        return way

    def settle(self, watch: Callable[[], None]) -> str:
        """Settle the compute dtypes, which go by the devices of the cluster."""
        settings = self._settings
        dtype: str = settings.model.dtype
        if dtype == "auto":
            # Half precision is for GPUs; on a CPU the same weights give the same directions in float32.
            on_gpu = device_of(settings, encoder_request(settings, 1), watch) == "cuda"
            dtype = self.source.spec.model.dtype if on_gpu else "float32"
        self.model = dataclasses.replace(self.model, dtype=dtype)
        if self.reranker is not None:
            on_gpu = device_of(settings, reranker_request(settings, 1), watch) == "cuda"
            self.reranker = resolve_reranker(settings.rerank, on_gpu=on_gpu)
        reranked_in = [self.reranker.dtype, self.reranker.kernels] if self.reranker is not None else None
        self._unit_key = digest(self.decisive(), dtype, reranked_in)
        if settings.search.sparse == "approximate":
            chosen = self.storage.read_optional(self._sparse_uri)
            self._sparse = None if chosen is None else from_json(SparseChoice, chosen)
        return self._unit_key

    @property
    def _sparse_uri(self) -> str:
        """Where a run notes how it searches weights, so that all its units are answered in one way."""
        return join(self._folders[0].uri, WORK, "sparse", f"{self._unit_key}.json")

    def decisive(self) -> list[Any]:
        """Return all that decides the answers of a query beside the query, the compute dtypes and kernels."""
        source, settings, asked = self.source, self._settings, self._settings.search
        index = None
        if self.index is not None:
            effort = asked.nprobe or self.index.effort
            index = [self.index.kind, [file.sha256 for file in self.index.files], effort, self._rescored()]
        rerank: list[Any] | None = None
        if self.reranker is not None:
            spec = dataclasses.replace(self.reranker, name="", revision=None, dtype="", kernels="")
            rerank = [
                dataclasses.asdict(spec),
                settings.rerank.depth,
                settings.rerank.texts,
                settings.rerank.reads,
            ]
        queries = self.model.query_key()
        fingerprint = source.spec.vector_fingerprint
        decisive = [
            "search",
            FORMAT_VERSION,
            fingerprint,
            source.shard_hashes,
            index,
            queries,
            asked.k,
            rerank,
        ]
        # What a run over chunks holds beyond others, which are as they were before there were any.
        spans = ["spans", asked.group] if source.chunked else []
        if self.asked.is_dense:
            return [*decisive, *spans]
        combining = None if self.asked.combining is None else dataclasses.asdict(self.asked.combining)
        how = [self.asked.found_by, self.asked.candidates, combining]
        bm25 = [asked.bm25_k1, asked.bm25_b] if BM25 in self.asked.found_by else None
        sparse = ["approximate", asked.sparse_recall] if asked.sparse == "approximate" else []
        return [*decisive, *spans, "found by", how, bm25, *sparse]

    def blocks(self, rejections: Rejections, watch: Callable[[], None]) -> Iterator[Block]:
        """Yield the queries one by one."""
        asked = self._settings.search
        columns = (asked.id_column, asked.text_column, asked.filter_column)
        for batch in read_queries(self.storage, str(asked.queries), *columns):
            watch()
            for row in batch.rejected:
                rejections.add(row.passage_id, None, row.reason, f"{batch.uri} row {row.row}: {row.detail}")
            for query_id, text, own in zip(batch.query_ids, batch.texts, batch.filters, strict=True):
                try:
                    found = self.filtering.read(own)
                except SettingsError as error:
                    rejections.add(query_id, None, "bad_filter", f"{batch.uri}: {own}: {error}")
                    continue
                block: Block = {"query_id": [query_id], "query": [text]}
                yield block | {FILTER: [self.filtering.note(found)]} if is_filtered(asked) else block

    def receipts(
        self, place: Workplace, groups: tuple[GroupTask, ...], facts: RunFacts, watch: Callable[[], None]
    ) -> Callable[[], Iterator[Parcel]]:
        """Start the actors that hold the index; return what starts the data path."""
        sizes, retrieve = self.start(place, groups, facts, watch)
        texts = None
        if self.reranker is not None:
            texts = open_texts(self._settings, self.source, retrieve.stored)
        return lambda: self._flow(place, groups, sizes, retrieve, texts)

    def start(
        self, place: Workplace, groups: tuple[GroupTask, ...], facts: RunFacts, watch: Callable[[], None]
    ) -> tuple[Sizes, RetrieveJob]:
        """Size all pools, and start the actors that hold the index; return what a search task must know."""
        settings, source = self._settings, self.source
        files = index_files(source.root, self.index) if self.index is not None else []
        n_shards = sum(marker.embeddings is not None for marker in source.manifest.shards)
        requests = []
        if self.reranker is not None:
            requests.append(reranker_request(settings, sum(len(group.todo) for group in groups)))
        if not self.model.counts_only:
            requests.append(encoder_request(settings, len(groups)))
        # How many nodes there are says how often an index is held.
        await_pools(settings, requests, watch)
        replicas = replicas_of(settings.search.replicas, len(files), len(groups))
        # The dearest first, and whose time is told.
        for name in self.asked.found_by:
            most = len(files) * replicas if name == EMBEDDING and files else n_shards
            requests.append(searcher_request(settings, most, POOL_OF[name]))
        sizes = cluster_sizes(settings, requests, [TASKS], watch)
        facts.start(sizes.workers(requests[0].name), time.time())
        settled = self.filtering.settle(sizes.tasks["tasks"].count, watch)
        self._passing = self.filtering.passing(settled)
        # In Ray's memory once a node. Ray drops it with its last reference: an actor that is started again
        # has none.
        self._passes = ray.put({sql: one for sql, one in settled.items() if isinstance(one, Passing)})
        shards = ShardMap.of(source.manifest)
        self._holders = start_holders(self.storage, source.root, shards, sizes.tasks["tasks"].count)
        handover = Handover(self._holders, self._asked_again(facts.rows_planned))
        finders = tuple(
            self._start_finder(name, files, replicas, sizes.pools[POOL_OF[name]], handover, watch)
            for name in self.asked.found_by
        )
        if settings.search.sparse == "approximate":
            finders = tuple(self._gated(finder, place, groups, sizes, watch) for finder in finders)
        combining = self.asked.combining
        retrieve = RetrieveJob(place, finders, self._holders, source.chunked, combining, passes_of(settled))
        logger.info("%s queries to answer; %s", f"{facts.rows_planned:,}", sizes)
        return sizes, retrieve

    def _asked_again(self, queries: int) -> tuple[str, ...]:
        """Return the columns of which so many queries will ask for most row groups, once results are found.

        Of fewer results it costs less to fetch what they need than to move all that was read.
        """
        groups = self.source.manifest.vectors / ROW_GROUP_ROWS
        names: tuple[str, ...] = ()
        if queries * self.asked.candidates >= groups:
            combining = self.asked.combining
            again = () if combining is None or combining.rescoring is None else combining.rescoring.outputs
            names = (*told_columns(self.source), *(output.name for output in again))
        kept = self.reranker is not None and takes_kept(self._settings, self.source)
        if kept and queries * self._settings.rerank.depth >= groups:
            names += tuple(text_columns(self.source.spec.columns))
        return names

    def _flow(
        self,
        place: Workplace,
        groups: tuple[GroupTask, ...],
        sizes: Sizes,
        retrieve: RetrieveJob,
        texts: TextSource | None,
    ) -> Iterator[Parcel]:
        """The data path: groups of queries in, one receipt a unit out, in the order they finish."""
        settings, tasks = self._settings, sizes.tasks["tasks"]
        rows = self.encoded(place, groups, sizes)
        rows = by_tasks(rows, retrieve_stage, tasks, job=retrieve)
        if self.reranker is not None:
            pair = PairJob(place, self.reranker, settings.rerank.trust_remote_code, settings.rerank.depth)
            pool = sizes.pools["rerankers"]
            score = make_score_job(settings, place, self.reranker, pool)
            rows = by_reranker(rows, tasks, pool, pair, score, texts)
        layers = self.reranker.layer_scores if self.reranker is not None else ()
        rows = by_tasks(rows, part_stage, tasks, place=place, more=(*retrieve.more.names, *layers))
        return receipts(rows)

    def encoded(self, place: Workplace, groups: tuple[GroupTask, ...], sizes: Sizes) -> "Dataset":
        """Return groups of queries with their vectors, and what else is made of them."""
        settings, tasks, there = self._settings, sizes.tasks["tasks"], self.source.spec
        trust, counted = settings.model.trust_remote_code, None
        if BM25 in self.asked.found_by:
            counted = dataclasses.replace(
                there.model.only(BM25),
                name=self.model.name,
                revision=self.model.revision,
                max_length=self.model.max_length,
            )
        spec = None if self.model.counts_only else self.model
        read = QueryJob(place, spec, counted, there.canaries, trust)
        rows = parcels([group.parcel() for group in groups])
        rows = by_tasks(rows, read_queries_stage, tasks, job=read)
        if spec is None:
            return rows
        encoders = sizes.pools["encoders"]
        encode = ModelJob(
            stage="encode",
            spec=self.model,
            device=encoders.device,
            threads=encoders.threads,
            token_budget=settings.batching.token_budget,
            trust_remote_code=trust,
            ledger=place.ledger,
            max_attempts=place.max_attempts,
            dataset=self.source.spec,
            units_at_once=encoders.units_at_once,
        )
        return by_actors(rows, ModelStage, encoders, encode)

    def _start_finder(
        self,
        name: str,
        files: list[WrittenFile],
        replicas: int,
        pool: Pool,
        handover: Handover,
        watch: Callable[[], None],
    ) -> Finder:
        """Start the actors that share the index, or an output of the shards to be searched exactly."""
        retrieval, asked = self._retrieval(name), self._settings.search
        if name == EMBEDDING and files:
            given = asked.replicas is not None
            started = start_index(self.storage, files, pool, replicas, self._passes, asked=given)
        else:
            per_row = retrieval.per_row
            started = start_exact(self.source, name, pool, self._passes, handover, per_row=per_row)
        self._searchers += itertools.chain.from_iterable(started)
        weighing = None
        if name == BM25:
            weighing = weigh_terms(started[0], asked.bm25_k1, asked.bm25_b, watch)
        return Finder(name, started, retrieval, weighing)

    def _gated(
        self,
        finder: Finder,
        place: Workplace,
        groups: tuple[GroupTask, ...],
        sizes: Sizes,
        watch: Callable[[], None],
    ) -> Finder:
        """Return a finder that searches weights as this run does, which is measured where it is not noted."""
        if finder.output != SPARSE:
            return finder
        if self._sparse is None:
            sample, encoded = sample_of(groups), EncodedSample()
            follow(lambda: receipts(self.encoded(place, sample, sizes)), encoded.take, watch)
            k, target = finder.retrieval.reach.first.fetched, self._settings.search.sparse_recall
            self._sparse = settle_sparse(finder.replicas[0], encoded.queries(), k, target, watch)
            self.storage.write(self._sparse_uri, to_json(self._sparse))
        return dataclasses.replace(finder, sparse=self._sparse)

    def stop(self) -> None:
        """End the actors that hold the index, and what is stored."""
        for searcher in self._searchers:
            ray.kill(searcher)
        if self._holders is not None:
            self._holders.stop()

    def check(self, intake: Intake, totals: Totals) -> None:
        """Refuse parts that do not have every query."""
        if totals.queries != intake.rows:
            raise IncompleteRunError(f"{intake.rows} queries were planned, {totals.queries} came out")

    def report(self, facts: RunFacts, what: Outcome) -> SearchReport:
        """Return the report."""
        settings, asked, totals = self._settings, self._settings.search, what.totals
        counts = totals.facts if what.complete else facts.counts
        report = SearchReport(
            **summarise(facts, ended=time.time(), price_per_hour=settings.report.price_per_hour),
            key=what.key,
            complete=what.complete,
            outcome=what.outcome,
            files=published_files(self._folders[0], totals),
            settings=settings.model_dump(mode="json"),
            queries=str(asked.queries),
            dataset=self.source.root,
            model=self.model,
            index=self._searched(),
            sparse=self._sparse,
            found_by=self.asked.found_by,
            way=self.way(),
            k=asked.k,
            units=len(what.intake.units),
            queries_in=what.intake.rows + len(what.rejections),
            queries_out=totals.answered.get("first_score", 0),
            results=totals.results.get("first_score", 0),
            unknown_ids=counts["unknown_ids"],
            missing_results=counts["missing_results"],
            doubled_passages=counts["doubled_passages"],
            refilled_queries=counts["refilled_queries"],
            filter=asked.filter,
            passing=self._passing,
            filtered_queries=counts["filtered_queries"],
            few_passing=counts["few_passing"],
            compared_all=counts["compared_all"],
            query_tokens=counts["query_tokens"],
            truncated_queries=counts["truncated_queries"],
            without_trec=tuple(totals.without_trec),
            scoring=None
            if self.reranker is None
            else summarise_scoring(self.reranker, facts, totals, counts),
        )
        return dataclasses.replace(report, advice=tuple(advise_search(report)))

    def _searched(self) -> SearchedIndex | None:
        index, asked = self.index, self._settings.search
        if index is None:
            return None
        return SearchedIndex(
            factory=index.factory,
            kind=index.kind,
            ntotal=index.ntotal,
            parameter=index.parameter,
            effort=asked.nprobe or index.effort,
            tuned_effort=index.effort,
            rescore=self._rescored(),
            tuned_k=index.k,
            tuned_rescore=index.rescored(self.asked.candidates),
            lacking_shards=len(index.lacks(self.source.shard_hashes)),
            recall=index.recall,
            shortfall=self._shortfall(),
        )

    def page(self, report: SearchReport) -> bytes:
        """Return its page."""
        return search_page(report)


def _folders(settings: Settings, storage: Storage) -> list[OwnedFolder]:
    output = str(settings.search.output)
    folders = [open_folder(storage, output, "run", "search.output", (*RUN_FILES, LEFT_OUT))]
    if settings.search.rerank:
        reranked = settings.rerank.output or join(output, "reranked")
        folders.append(_reranked(storage, reranked))
        folders[-1].check_owner()
    return folders


def _reranked(storage: Storage, uri: str) -> OwnedFolder:
    """Return the folder of a search's reranked run; a rerank job's, which has a report, is another's."""
    return OwnedFolder(storage, uri, "reranked search", "rerank.output", RUN_FILES)


def _check_share(settings: Settings, report: SearchReport) -> None:
    folder, reasons = str(settings.search.output), report.rejected_reasons
    share = (report.queries_in - report.queries_out) / max(1, report.queries_in)
    allowed = settings.search.max_rejected_fraction
    check_rejected(folder, share, allowed, "search.max_rejected_fraction", reasons)
    if report.scoring is not None:
        scored, lost = report.scoring.pairs_out, report.scoring.pairs_rejected
        allowed = settings.rerank.max_rejected_fraction
        share = lost / max(1, scored + lost)
        check_rejected(folder, share, allowed, "rerank.max_rejected_fraction", reasons)


def _query_model(settings: Settings, source: Source, outputs: Sequence[str]) -> ModelSpec:
    """Return the model of the data set, from where this run finds it, with the instruction for queries.

    It makes those of the ``outputs`` that it is run for; where there are none, counts of tokens.

    Raises:
        DatasetMismatchError: model.name names another model.
        ModelError: the model is not to be had.
        SettingsError: an instruction for queries that nothing would read.
    """
    of_states = [name for name in outputs if name != BM25]
    spec = source.spec.model.only(*(of_states or [BM25])).stored_as("float32")
    asked = settings.model
    if spec.counts_only and asked.query_instruction:
        raise SettingsError(
            "model.query_instruction: BM25 counts the words of a query, and no model reads it; leave it out"
        )
    if "name" in asked.model_fields_set:
        spec = dataclasses.replace(spec, name=asked.name, revision=asked.revision)
    folder, commit = fetch_model(spec.name, spec.revision)
    if hash_files(spec, folder) != spec.weights_sha256:
        raise DatasetMismatchError(
            f"output.uri {source.root}: was embedded with {source.spec.model.name}, whose files differ from "
            f"those of {spec.name}; queries need the same model"
        )
    return dataclasses.replace(asked_of_queries(spec, asked), revision=commit)
