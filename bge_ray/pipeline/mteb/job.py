"""The mteb job: tasks of mteb done by models and rerankers through our own jobs, to mteb's own result files.

A result is a file, published as soon as its task is done: a run that was cut off goes on with the next task.
"""

import copy
import dataclasses
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bge_ray.errors import IncompleteRunError, SettingsError
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.pipeline.mteb.averages import means_of
from bge_ray.pipeline.mteb.contestants import FORMAT_VERSION, Entrant, plan_entrants
from bge_ray.pipeline.mteb.encode import Encoders, JobEncoder
from bge_ray.pipeline.mteb.package import mteb as package
from bge_ray.pipeline.mteb.results import SHARED, Results, file_of, meta_of, score_of
from bge_ray.pipeline.mteb.search import Desk, JobSearch
from bge_ray.pipeline.mteb.tasks import choose_tasks, searches
from bge_ray.pipeline.work import carry_out, refuse_taken
from bge_ray.records.canonical import digest
from bge_ray.records.dataset import FileFact
from bge_ray.records.reports import Mean, MtebReport, TaskScore
from bge_ray.report.facts import Receipt, RunFacts, Workers, read_receipt, summarise
from bge_ray.report.mteb_page import mteb_page
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings
from bge_ray.storage.folders import refuse_collisions
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder, open_folder
from bge_ray.storage.reports import standing_report

logger = logging.getLogger(__name__)

WORK = "work"


def mteb(settings: Settings, stop: StopRequest | None = None) -> MtebReport:
    """Measure models on tasks of mteb, doing only what is not done yet.

    Args:
        settings: needs mteb.output, and mteb.tasks, mteb.benchmark or mteb.beir.
        stop: asked between tasks, and by the jobs of each, whether to stop.

    Returns:
        The content of report.json.

    Raises:
        SettingsError, ModelError, CorpusError, OutputCollisionError, OutputBusyError: nothing was published.
        IncompleteRunError, TakenOverError, StorageError: run again to continue.
    """
    facts = RunFacts("mteb", run_id())
    stop = stop or StopRequest()
    return carry_out(MtebWork(settings, stop), facts, stop)


def plan_mteb(settings: Settings) -> str:
    """Say what `mteb` would do, without writing anything (``--dry-run``)."""
    work = MtebWork(settings, StopRequest())
    refuse_taken(work.folders)
    with tempfile.TemporaryDirectory(prefix="bge-ray-mteb-") as cache:
        todo = [pair for pair in work.pairs() if work.results(pair[0], Path(cache)).read(pair[1]) is None]
    who = "; ".join(f"{entrant.name} ({entrant.revision})" for entrant in work.entrants)
    return (
        f"{len(work.tasks)} tasks, {len(work.pairs())} results of {len(work.entrants)} models, {who}, to "
        f"{settings.mteb.output}: {f'{len(todo)} to be done' if todo else 'up to date'}"
    )


class MtebWork:
    """One mteb run, planned; see `pipeline.work.Work`."""

    def __init__(self, settings: Settings, stop: StopRequest) -> None:
        """Choose tasks and contestants; nothing is written."""
        settings.require("mteb.output")
        asked = settings.mteb
        inputs = {f"mteb.beir[{n}]": uri for n, uri in enumerate(asked.beir or ())}
        inputs |= {f"mteb.models[{n}]": name for n, name in enumerate(asked.models or ())}
        inputs |= {f"mteb.rerankers[{n}]": name for n, name in enumerate(asked.rerankers)}
        refuse_collisions({"mteb.output": asked.output}, inputs, {})
        for name in ("filter", "filter_column"):
            if getattr(settings.search, name) is not None:
                raise SettingsError(
                    f"search.{name}: corpora of mteb have no column to filter by; leave it out"
                )
        self._settings, self._stop = settings, stop
        self._storage = Storage(settings.output.storage_timeout_s)
        chosen = choose_tasks(asked, self._storage)
        self._average = chosen.average
        self.tasks = chosen.leaves()
        self.entrants = plan_entrants(settings, self.tasks)
        names = {file_of(entrant, f"{task.metadata.name}.json") for entrant, task in self.pairs()}
        names |= {file_of(entrant, name) for entrant in self.entrants for name in SHARED}
        self._folder = open_folder(
            self._storage, str(asked.output), "mteb results", "mteb.output", tuple(sorted(names))
        )
        self._left_out: dict[str, int] = {}
        self._scores: list[TaskScore] = []

    @property
    def storage(self) -> Storage:
        """For all requests."""
        return self._storage

    @property
    def folders(self) -> tuple[OwnedFolder, ...]:
        """The folder of the results."""
        return (self._folder,)

    def pairs(self) -> list[tuple[Entrant, Any]]:
        """Return who does which task, in the order in which that is done.

        First what is not searched, model by model, whose actors stay; then each corpus by all.
        """
        both = [(entrant, task) for entrant in self.entrants for task in self.tasks if entrant.takes(task)]
        order = {id(task): number for number, task in enumerate(self.tasks)}
        quiet = [pair for pair in both if not searches(pair[1]) and not pair[1].is_aggregate]
        corpora = sorted((pair for pair in both if searches(pair[1])), key=lambda pair: order[id(pair[1])])
        return [*quiet, *corpora, *(pair for pair in both if pair[1].is_aggregate)]

    def results(self, entrant: Entrant, cache: Path) -> Results:
        """Return the results of a contestant."""
        return Results(self._storage, self._folder, entrant, cache)

    @property
    def _key(self) -> str:
        """A name for all that decides the results and the page."""
        pairs = [
            (entrant.name, entrant.revision, task.metadata.name, task.metadata.revision)
            for entrant, task in self.pairs()
        ]
        average = None if self._average is None else [self._average.name, dict(self._average.tasks)]
        return digest("mteb", FORMAT_VERSION, pairs, average)

    def current(self) -> MtebReport | None:
        """Return the report that is there, if it is of these results and they are as they were."""
        return standing_report(self._folder, MtebReport, self._key)

    def sweep_is_due(self) -> bool:
        """Results of other models and settings stay where they are."""
        return False

    def do(self, facts: RunFacts, watch: Callable[[], None]) -> None:
        """Have each task done that is not, and publish its result."""
        work = join(self._folder.uri, WORK)
        desk = Desk(self._settings, self._storage, work, self._stop, watch)
        pairs = self.pairs()
        facts.plan(units=len(pairs), rows=len(pairs))
        facts.start(Workers(), time.time())
        with tempfile.TemporaryDirectory(prefix="bge-ray-mteb-") as cache:
            results = {e.revision: self.results(e, Path(cache)) for e in self.entrants}
            for found in results.values():
                found.fetch_shared()
            with _encoders(self._settings, watch) as encoders_of:
                for number, (entrant, task) in enumerate(pairs):
                    watch()
                    mine = results[entrant.revision]
                    began = time.time()
                    result = mine.read(task)
                    if result is None:
                        model = self._model(entrant, task, desk, encoders_of)
                        result = self._evaluate(model, task, mine)
                        mine.put(task)
                    self._scores.append(score_of(entrant, task, result))
                    self._tell(number, len(pairs), began)
                    facts.book(_receipt(began, searched=searches(task)))
                    later = [other.metadata.name for _, other in pairs[number + 1 :]]
                    # Of a task that was done before nothing is there; what is there is a later one's.
                    if searches(task) and task.data_loaded and task.metadata.name not in later:
                        task.unload_data()
                        desk.clean()
        self._left_out = dict(desk.left_out)

    def _model(
        self,
        entrant: Entrant,
        task: Any,
        desk: Desk,
        encoders_of: Callable[[Entrant | None], Encoders | None],
    ) -> Any:
        """Return what mteb takes for the model of a contestant in a task."""
        encoder = entrant.encoder
        if searches(task) or task.is_aggregate or encoder is None:
            encoders_of(None)
            return JobSearch(meta_of(entrant), entrant, desk)
        encoders = encoders_of(entrant)
        if encoders is None:
            raise AssertionError(f"{entrant.name}: no encoders")
        return JobEncoder(meta_of(entrant), encoders, encoder.rules)

    def _evaluate(self, model: Any, task: Any, results: Results) -> Any:
        """Have mteb evaluate a task; the result is in its cache then."""
        if searches(task):
            # Once for all contestants.
            task.load_data()
        elif not task.is_aggregate:
            # mteb draws samples with a generator of the task, whose state each contestant finds anew.
            task = copy.deepcopy(task)
        done = package.evaluate(model, task, cache=results.cache, co2_tracker=False, show_progress_bar=False)
        if not done.task_results:
            raise IncompleteRunError(f"{task.metadata.name}: mteb gave no result; run again")
        return done.task_results[0]

    def _tell(self, number: int, count: int, began: float) -> None:
        score = self._scores[-1]
        logger.info(
            "%d of %d: %s, %s: %.4f (%.0f s)",
            number + 1,
            count,
            score.task,
            score.model,
            score.score,
            time.time() - began,
        )

    def publish(self, facts: RunFacts) -> None:
        """Check that every result is there."""
        if facts.rows_in != facts.rows_planned:
            raise IncompleteRunError(f"{facts.rows_planned} results were planned, {facts.rows_in} are there")

    def report(self, facts: RunFacts, outcome: str, *, complete: bool) -> MtebReport:
        """Return what the run came to."""
        settings = self._settings
        return MtebReport(
            # Devices are counted by the jobs of the tasks, whose reports go with what they worked with.
            **summarise(facts, ended=time.time(), price_per_hour=None),
            key=self._key,
            complete=complete,
            outcome=outcome,
            files=self._files() if complete else (),
            settings=settings.model_dump(mode="json"),
            output=self._folder.uri,
            rules=settings.mteb.rules,
            mteb_version=package.__version__,
            contestants=tuple(entrant.described() for entrant in self.entrants),
            results=tuple(self._scores),
            means=tuple(self._means()),
            left_out=self._left_out,
        )

    def _files(self) -> tuple[FileFact, ...]:
        facts = []
        for name in self._folder.names:
            data = self._storage.read(join(self._folder.uri, name))
            facts.append(FileFact(name, len(data), hashlib.sha256(data).hexdigest(), 0))
        return tuple(facts)

    def _means(self) -> Iterator[Mean]:
        if self._average is None:
            return
        for entrant in self.entrants:
            name = f"{entrant.name} {entrant.revision}"
            scores = {score.task: score.score for score in self._scores if score.model == name}
            yield from means_of(self._average, name, scores, entrant.card_id)

    def page(self, report: MtebReport) -> bytes:
        """Return its page."""
        return mteb_page(report)

    def sweep(self) -> None:
        """Remove what tasks of a run that was cut off have left to work with."""
        work = join(self._folder.uri, WORK)
        Desk(self._settings, self._storage, work, self._stop, lambda: None).clean()


@contextmanager
def _encoders(
    settings: Settings, watch: Callable[[], None]
) -> Iterator[Callable[[Entrant | None], Encoders | None]]:
    """Give the actors of one contestant at a time, started for its first task; None ends them."""
    held: dict[str, Encoders] = {}

    def encoders_of(entrant: Entrant | None) -> Encoders | None:
        for revision in [one for one in held if entrant is None or one != entrant.revision]:
            held.pop(revision).stop()
        if entrant is None or entrant.encoder is None:
            return None
        if entrant.revision not in held:
            held[entrant.revision] = Encoders(settings, entrant.encoder.raw, watch)
        return held[entrant.revision]

    try:
        yield encoders_of
    finally:
        encoders_of(None)


def _receipt(began: float, *, searched: bool) -> Receipt:
    """Return a task that is done, as all jobs count units."""
    spent = {"retrieval_s" if searched else "other tasks_s": time.time() - began}
    return dataclasses.replace(read_receipt(1, spent), began=began, ended=time.time())
