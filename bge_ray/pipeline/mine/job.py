"""The mine job: queries and their positives to hard negatives, out of a search that it drives itself.

Like the search job it knows one mode: take in, subtract what is done, do the rest, publish.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from bge_ray.errors import IncompleteRunError, RejectedRowsError, SettingsError
from bge_ray.pipeline.engine.flow import by_actors, by_tasks, receipts
from bge_ray.pipeline.engine.model_stage import ModelStage
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.pools import Sizes
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.pipeline.mine.intake import QUESTION_SCHEMA, Questions
from bge_ray.pipeline.mine.outputs import MINED_FILES, Mined, MinedOutput
from bge_ray.pipeline.mine.rules import VERDICTS
from bge_ray.pipeline.mine.stages import Mining, draw_stage, judge_stage
from bge_ray.pipeline.rerank.score import PairJob, make_score_job, pair_stage
from bge_ray.pipeline.rerank.texts import open_texts, takes_kept
from bge_ray.pipeline.runs.groups import GroupTask, Workplace
from bge_ray.pipeline.runs.intake import Block, Intake, Limits, Rejections
from bge_ray.pipeline.runs.parts import LEFT_OUT, Totals
from bge_ray.pipeline.runs.work import Outcome, RunWork, check_rejected, published_files
from bge_ray.pipeline.search.filtering import is_filtered
from bge_ray.pipeline.search.job import SearchJob
from bge_ray.pipeline.work import carry_out, refuse_taken
from bge_ray.records.canonical import digest
from bge_ray.records.reports import MineReport
from bge_ray.report.advice import advise_mine
from bge_ray.report.facts import RunFacts, summarise
from bge_ray.report.mine_page import mine_page
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings
from bge_ray.storage.folders import refuse_collisions
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import open_folder

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


def mine(settings: Settings, stop: StopRequest | None = None) -> MineReport:
    """Mine hard negatives, doing only what is not done yet.

    Args:
        settings: needs output.uri (a data set that embed completed), mine.output, and mine.queries with
            mine.qrels, or mine.input.
        stop: asked between receipts whether to stop.

    Returns:
        The content of report.json.

    Raises:
        SettingsError, CorpusError, ModelError, DatasetMismatchError, OutputCollisionError, OutputBusyError:
            nothing was published.
        IncompleteRunError, TakenOverError, StorageError: run again to continue.
        RejectedRowsError: the files are published, but too many queries could not be mined for.
    """
    facts = RunFacts("mine", run_id())
    report = carry_out(RunWork(settings, MineJob(settings)), facts, stop)
    _check_share(settings, report)
    return report


def plan_mine(settings: Settings) -> str:
    """Say what `mine` would do, without writing anything (``--dry-run``)."""
    job = MineJob(settings)
    work = RunWork(settings, job)
    refuse_taken(work.folders)
    rejections = Rejections()
    queries = positives = 0
    for block in job.blocks(rejections, lambda: None):
        queries += 1
        positives += len(block["positives"][0])
    done = work.current() is not None
    asked, search = settings.mine, job.search
    where = f"the {search.index.factory} index" if search.index else "the embedding shards, exactly"
    teacher = f", scored again by {search.reranker.name}" if search.reranker else ""
    return (
        f"{queries:,} queries with {positives:,} positives ({len(rejections):,} left out, "
        f"{job.questions.unjudged:,} without judgement), up to {asked.negatives} negatives each out of "
        f"{asked.depth} results by {where}{teacher}, to {asked.output}: "
        f"{'up to date' if done else 'to be done'}"
    )


class MineJob:
    """One mining run, planned; see `runs.work.RunJob`."""

    name, rows, schema = "mine", "queries", QUESTION_SCHEMA
    kind = MineReport

    def __init__(self, settings: Settings) -> None:
        """Open the data set and its index, settle the models, read the judgements; writes nothing."""
        _check_inputs(settings)
        asked = settings.mine
        self._settings = settings
        self.search = SearchJob(_search_settings(settings), "mine.output")
        source = self.search.source
        if source.spec.chunking is not None:
            raise SettingsError(
                f"output.uri {source.root}: its passages were cut into chunks, and a training file needs "
                "them whole; mine from a data set that was embedded without chunking.max_tokens"
            )
        takes_kept(settings, source)
        self._folder = open_folder(
            self.storage, str(asked.output), "mined", "mine.output", (*MINED_FILES, LEFT_OUT)
        )
        self._mined = Mined()
        self.questions = Questions(self.storage, settings)

    @property
    def storage(self) -> Storage:
        """For all requests."""
        return self.search.storage

    @property
    def key(self) -> str:
        """A name for all that decides the files; of dtypes what was asked: other devices redo nothing."""
        settings, asked = self._settings, self._settings.mine
        given = [uri for uri in (asked.queries, asked.qrels, asked.input, asked.held_out) if uri is not None]
        inputs = [(info.uri, info.size, info.etag) for uri in given for info in self.storage.list_files(uri)]
        dtypes = (settings.model.dtype, settings.rerank.dtype, settings.rerank.kernels)
        return digest(self.search.decisive(), self._decisive(), *dtypes, inputs)

    def _decisive(self) -> list[Any]:
        """Return what decides the negatives of a query beside what its search and its scores go by."""
        places = {"queries", "qrels", "input", "held_out", "output", "max_rejected_fraction"}
        rules = self._settings.mine.model_dump(mode="json", exclude=places)
        return ["mine", FORMAT_VERSION, rules, self._settings.rerank.texts]

    def outputs(self) -> list[MinedOutput]:
        """Return the training files and the audit."""
        asked = self._settings.mine
        return [MinedOutput(self._folder, asked.negatives, asked.teacher, self._mined)]

    def withdraw(self) -> None:
        """Everything that an earlier run published is replaced."""

    def limits(self) -> Limits:
        """Return when units and groups are full, in queries; a unit is a group.

        So queries are encoded, and pairs scored, beside the same others whether a run was cut off or not:
        the last digits of a score depend on that.
        """
        settings = self._settings
        pairs = settings.rerank.join_pairs // settings.mine.depth
        rows = max(1, min(settings.search.unit_queries, pairs))
        return Limits(rows, rows)

    def settle(self, watch: Callable[[], None]) -> str:
        """Settle the compute dtypes, which go by the devices of the cluster."""
        return digest(self.search.settle(watch), self._decisive())

    def blocks(self, rejections: Rejections, watch: Callable[[], None]) -> Iterator[Block]:
        """Yield the queries that have positives, one by one."""
        return self.questions.blocks(rejections, watch)

    def receipts(
        self, place: Workplace, groups: tuple[GroupTask, ...], facts: RunFacts, watch: Callable[[], None]
    ) -> Callable[[], Iterator[Parcel]]:
        """Start the actors that hold the index; return what starts the data path."""
        sizes, retrieve = self.search.start(place, groups, facts, watch)
        texts = open_texts(self._settings, self.search.source, retrieve.stored)
        mining = Mining(place, retrieve, texts, self._settings.mine)
        return lambda: self._flow(place, groups, sizes, mining)

    def _flow(
        self, place: Workplace, groups: tuple[GroupTask, ...], sizes: Sizes, mining: Mining
    ) -> Iterator[Parcel]:
        """The data path: groups of queries in, one receipt a unit out, in the order they finish."""
        settings, tasks, teacher = self._settings, sizes.tasks["tasks"], self.search.reranker
        rows = self.search.encoded(place, groups, sizes)
        rows = by_tasks(rows, judge_stage, tasks, job=mining)
        if teacher is not None:
            pair = PairJob(place, teacher, settings.rerank.trust_remote_code, settings.mine.depth)
            pool = sizes.pools["rerankers"]
            rows = by_tasks(rows, pair_stage, tasks, job=pair)
            rows = by_actors(rows, ModelStage, pool, make_score_job(settings, place, teacher, pool))
        rows = by_tasks(rows, draw_stage, tasks, job=mining)
        return receipts(rows)

    def stop(self) -> None:
        """End the actors that hold the index."""
        self.search.stop()

    def check(self, intake: Intake, totals: Totals) -> None:
        """Refuse parts that do not have every query."""
        if totals.queries != intake.rows:
            raise IncompleteRunError(f"{intake.rows} queries were planned, {totals.queries} came out")

    def report(self, facts: RunFacts, what: Outcome) -> MineReport:
        """Return the report."""
        settings, asked, totals, mined = self._settings, self._settings.mine, what.totals, self._mined
        counts = totals.facts if what.complete else facts.counts
        search = self.search
        report = MineReport(
            **summarise(facts, ended=time.time(), price_per_hour=settings.report.price_per_hour),
            key=what.key,
            complete=what.complete,
            outcome=what.outcome,
            files=published_files(self._folder, totals),
            settings=settings.model_dump(mode="json"),
            units=len(what.intake.units),
            queries=str(asked.input or asked.queries),
            dataset=search.source.root,
            model=search.model,
            exact=search.index is None,
            teacher=None if search.reranker is None else search.reranker.name,
            queries_in=what.intake.rows + len(what.rejections),
            queries_out=mined.queries if what.complete else counts["mined_queries"],
            queries_short=counts["short_queries"],
            queries_unjudged=self.questions.unjudged,
            positives_unknown=counts["positives_unknown"],
            positives_beyond=counts["positives_beyond"],
            negatives=mined.negatives if what.complete else counts["verdict_negative"],
            tuples=mined.tuples,
            verdicts={verdict: counts[f"verdict_{verdict}"] for verdict in VERDICTS},
            examples=mined.examples,
            gaps=mined.gaps,
        )
        return dataclasses.replace(report, advice=tuple(advise_mine(report)))

    def page(self, report: MineReport) -> bytes:
        """Return its page."""
        return mine_page(report)


def _check_inputs(settings: Settings) -> None:
    """Refuse settings that do not say where queries and positives are, and folders in each other's way."""
    settings.require("output.uri", "mine.output")
    asked = settings.mine
    if asked.input is None:
        settings.require("mine.queries", "mine.qrels")
    elif asked.queries is not None or asked.qrels is not None:
        raise SettingsError("mine.input: says what mine.queries and mine.qrels say; set it, or those two")
    if settings.search.first_stage != "dense" or settings.search.rescore_with:
        raise SettingsError(
            "search.first_stage, search.rescore_with: negatives are mined by vectors alone; leave them out"
        )
    if is_filtered(settings.search):
        raise SettingsError(
            "search.filter, search.filter_column: negatives are mined out of all passages; leave them out"
        )
    if settings.search.rescore and settings.search.rescore < asked.depth:
        raise SettingsError(f"search.rescore: must be 0, or at least mine.depth ({asked.depth})")
    if settings.rerank.first_stage_share:
        raise SettingsError(
            "rerank.first_stage_share: a teacher's scores are its own, and the search's stand beside them; "
            "leave it out"
        )
    refuse_collisions(
        {
            "output.uri": settings.output.uri,
            "search.output": settings.search.output,
            "rerank.output": settings.rerank.output,
            "mine.output": asked.output,
        },
        {
            "corpus.uri": settings.corpus.uri,
            "mine.queries": asked.queries,
            "mine.input": asked.input,
            "mine.held_out": asked.held_out,
            "model.name": settings.model.name,
            "rerank.model": settings.rerank.model if asked.teacher else None,
        },
        {"mine.qrels": asked.qrels},
    )


def _search_settings(settings: Settings) -> Settings:
    """Return the settings of the search that a mining run drives; its results are not published."""
    asked = settings.mine
    search = {
        "queries": asked.input or asked.queries,
        "output": asked.output,
        "k": asked.depth,
        "rerank": asked.teacher,
    }
    rerank = {"output": None, "depth": asked.depth}
    return settings.model_copy(
        update={
            "search": settings.search.model_copy(update=search),
            "rerank": settings.rerank.model_copy(update=rerank),
        }
    )


def _check_share(settings: Settings, report: MineReport) -> None:
    folder, reasons = str(settings.mine.output), dict(report.rejected_reasons)
    emptied = reasons.pop("no_negative", 0)
    if not report.queries_out:
        raise RejectedRowsError(
            f"{folder}: no query has a negative; of {report.queries_in:,} the rules left {emptied:,} none; "
            "report.html shows which rule dropped what"
        )
    unmined = report.queries_in - report.queries_out - emptied
    share = unmined / max(1, report.queries_in)
    allowed = settings.mine.max_rejected_fraction
    check_rejected(folder, share, allowed, "mine.max_rejected_fraction", reasons)
