"""What search, rerank and mining have in common: input taken in, units run, parts published as a run."""

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import pyarrow as pa
from ray.actor import ActorHandle

from bge_ray.errors import IncompleteRunError, RejectedRowsError
from bge_ray.pipeline.engine.disks import refuse_unseen
from bge_ray.pipeline.engine.flow import follow
from bge_ray.pipeline.engine.isolation import running_ledger
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.pools import TaskRequest
from bge_ray.pipeline.engine.progress import Progress, Step, work_line
from bge_ray.pipeline.engine.telemetry import Telemetry
from bge_ray.pipeline.runs.groups import GroupTask, Workplace
from bge_ray.pipeline.runs.intake import Block, Intake, Limits, Rejections, take_in
from bge_ray.pipeline.runs.parts import Output, Totals, publish
from bge_ray.pipeline.work import Told
from bge_ray.records.dataset import FileFact
from bge_ray.records.reports import Report, read_report
from bge_ray.report.facts import RunFacts, read_receipt
from bge_ray.settings.sections import Settings
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder, holds
from bge_ray.storage.sweep import sweep_work

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Report)

WORK = "work"
# Files below it that are provably ours: their names hold hashes, or the names of our own pieces.
_OWN_WORK = re.compile(
    r"groups/\d{8}-[0-9a-f]{32}\.parquet|parts/[0-9a-f]{64}\.parquet|sparse/[0-9a-f]{64}\.json|"
    r"pieces/((first_)?score-(parquet|trec)|rejected|audit|negatives|tuples|lists)-\d{6}"
)
# Stages of tasks between the pools share what the pools leave of the CPUs.
TASKS = TaskRequest("tasks", most=1_000_000, share=0.2)


@dataclass(frozen=True)
class Outcome:
    """What a run came to, for its report."""

    key: str
    intake: Intake
    rejections: Rejections
    totals: Totals
    outcome: str
    complete: bool


class RunJob(Protocol[R]):
    """What a search, a rerank or a mining is; the rest is common."""

    name: str
    rows: str
    schema: pa.Schema

    @property
    def kind(self) -> type[R]:
        """The type of its report."""

    @property
    def storage(self) -> Storage:
        """For all requests."""

    @property
    def key(self) -> str:
        """A name for all that decides the run, the input included."""

    def outputs(self) -> Sequence[Output]:
        """Return what to publish; the first folder has the report."""

    def withdraw(self) -> None:
        """Remove what an earlier run published below the output and this one will not replace."""

    def limits(self) -> Limits:
        """Return when units and groups of the input are full."""

    def settle(self, watch: Callable[[], None]) -> str:
        """Settle what goes by the cluster's devices; return a name for all that decides a row's outcome."""

    def blocks(self, rejections: Rejections, watch: Callable[[], None]) -> Iterator[Block]:
        """Yield the input, and note what is left out."""

    def receipts(
        self, place: Workplace, groups: tuple[GroupTask, ...], facts: RunFacts, watch: Callable[[], None]
    ) -> Callable[[], Iterator[Parcel]]:
        """Start the pools; return what starts the data path."""

    def stop(self) -> None:
        """End what `receipts` started beside the data path."""

    def check(self, intake: Intake, totals: Totals) -> None:
        """Refuse parts that do not add up to the input."""

    def report(self, facts: RunFacts, what: Outcome) -> R:
        """Return the report."""

    def page(self, report: R) -> bytes:
        """Return its page."""


class RunWork(Generic[R]):
    """One search, rerank or mining run, planned; see `pipeline.work.Work`."""

    def __init__(self, settings: Settings, job: RunJob[R]) -> None:
        """Take what is to be done; nothing is written."""
        self._settings, self._job = settings, job
        self._outputs = tuple(job.outputs())
        self._rejections, self._totals = Rejections(), Totals()
        self._intake = Intake((), ())
        self._told = Told()

    @property
    def storage(self) -> Storage:
        """For all requests."""
        return self._job.storage

    @property
    def folders(self) -> tuple[OwnedFolder, ...]:
        """The folders of the runs."""
        return tuple(output.folder for output in self._outputs)

    @property
    def _place(self) -> str:
        return join(self.folders[0].uri, WORK)

    def current(self) -> R | None:
        """Return the report of the published run, if it is of the same key and its files are as they were."""
        folder = self.folders[0]
        report = read_report(self._job.kind, self.storage.read_optional(join(folder.uri, "report.json")))
        if report is None or not report.complete or report.key != self._job.key:
            return None
        for fact in report.files:
            uri = fact.path if "://" in fact.path else join(folder.uri, fact.path)
            if not holds(self.storage, uri, fact):
                self._told.warn(f"{uri}: is missing, or is not what was written; the run is made again")
                return None
        return report

    def sweep_is_due(self) -> bool:
        """A run is replaced in one step: nothing of an earlier one is kept."""
        return False

    def do(self, facts: RunFacts, watch: Callable[[], None]) -> None:
        """Take the input in, and answer what is not answered."""
        job = self._job
        job.withdraw()
        unit_key = job.settle(watch)
        blocks = job.blocks(self._rejections, watch)
        with Step("reading", job.rows, None, self._settings.report.log_interval_s) as step:
            self._intake = take_in(
                self.storage, self._place, step.each(blocks), job.schema, job.limits(), unit_key
            )
        facts.plan(units=self._intake.todo_units, rows=self._intake.todo_rows)
        facts.book_rejected(Counter(self._rejections.reasons), self._rejections.examples())
        if self._intake.groups:
            with running_ledger() as ledger:
                self._run(facts, watch, ledger)

    def _run(self, facts: RunFacts, watch: Callable[[], None], ledger: ActorHandle) -> None:
        attempts = self._settings.resources.max_unit_attempts
        telemetry = Telemetry(self._job.name)
        groups = self._intake.groups
        try:
            place = Workplace(self.storage, self._place, attempts, ledger)
            start = self._job.receipts(place, groups, facts, watch)
            refuse_unseen(self.folders, watch)
            telemetry.start(facts)
            with Progress(lambda: work_line(facts, self._job.rows), self._settings.report.log_interval_s):
                follow(start, lambda receipt: _book(receipt, facts, telemetry), watch)
        finally:
            self._job.stop()
        if facts.failures:
            raise IncompleteRunError(
                f"{len(facts.failures)} of {facts.units_planned} units are not done, "
                f"the first: {facts.failures[0]}; run again to continue"
            )

    def publish(self, facts: RunFacts) -> None:
        """Put the parts together, once they add up."""
        intake = self._intake
        self._totals = publish(
            self.storage,
            self._place,
            intake.units,
            self._outputs,
            self._rejections,
            lambda totals: self._job.check(intake, totals),
        )
        facts.book_rejected(self._totals.reasons, self._totals.examples)
        for why in self._totals.without_trec:
            logger.warning("there is no run.trec, only run.parquet: %s", why)

    def sweep(self) -> None:
        """Remove stored inputs and parts."""
        sweep_work(self.storage, self._place, _OWN_WORK)

    def report(self, facts: RunFacts, outcome: str, *, complete: bool) -> R:
        """Return what the run came to."""
        what = Outcome(self._job.key, self._intake, self._rejections, self._totals, outcome, complete)
        return self._job.report(facts, what)

    def page(self, report: R) -> bytes:
        """Return the page of a report."""
        return self._job.page(report)


def _book(receipt: Parcel, facts: RunFacts, telemetry: Telemetry) -> None:
    """Book a receipt; one with an error may stand for all units of a group."""
    task = receipt.task_as(GroupTask)
    if receipt.error is not None:
        facts.book_failure(f"group {task.name}: {receipt.error}", units=len(task.todo))
        logger.error("%s given up", facts.failures[-1], extra={"unit": task.name})
        for _ in task.todo:
            telemetry.fail_unit()
        return
    done = read_receipt(task.n_rows, receipt.facts)
    facts.book(done)
    telemetry.finish_unit(done)


def published_files(folder: OwnedFolder, totals: Totals) -> tuple[FileFact, ...]:
    """Return what a run published as its report names it: below its folder, or by full URI elsewhere."""
    below = f"{folder.uri.rstrip('/')}/"

    def named(fact: FileFact) -> FileFact:
        if fact.path.startswith(below):
            return dataclasses.replace(fact, path=fact.path.removeprefix(below))
        there = folder.storage.info(fact.path)
        return fact if there is None else dataclasses.replace(fact, path=there.uri)

    return tuple(named(fact) for fact in totals.files)


def check_rejected(folder: str, share: float, allowed: float, key: str, reasons: dict[str, int]) -> None:
    """Refuse to call a published run good if too much of its input was left out.

    Raises:
        RejectedRowsError: names the reasons.
    """
    if share > allowed:
        counted = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        raise RejectedRowsError(
            f"{folder}: the run is published, but {share:.1%} of its input was left out ({counted}), more "
            f"than {key} {allowed:g}; rejected.parquet names each"
        )
