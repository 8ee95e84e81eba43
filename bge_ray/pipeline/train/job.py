"""The train job: a model, and examples of queries with their passages, to a better model.

The output has training.json from the first moment on, which says what is trained. Checkpoints lie in its work
folder. A folder is a model once it has a config.json, which comes after everything else.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable

from bge_ray.errors import DatasetMismatchError, IncompleteRunError
from bge_ray.metrics import compare, interval, mean
from bge_ray.model.train.base import resolve_base
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.pipeline.train.card import make_card
from bge_ray.pipeline.train.plan import (
    Identity,
    check_packages,
    identify,
    make_schedule,
    read_data,
    refuse_other,
)
from bge_ray.pipeline.train.run import Measured, Team, make_job, measure, run_training, settle_team
from bge_ray.pipeline.train.stored import OWN_WORK, StoredFolder, read_pieces, stored
from bge_ray.pipeline.work import carry_out, refuse_taken
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.dataset import FileFact
from bge_ray.records.reports import HeldOut, HeldOutFigures, TrainReport
from bge_ray.report.advice import advise_train
from bge_ray.report.facts import RunFacts, summarise
from bge_ray.report.train_page import train_page
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings
from bge_ray.storage.folders import refuse_collisions
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder, open_folder
from bge_ray.storage.reports import standing_report
from bge_ray.storage.sweep import sweep_work

logger = logging.getLogger(__name__)

TRAINING, CARD, CONFIG, WORK = "training.json", "README.md", "config.json", "work"
# What a folder of sentence-transformers may have; a foreign file of such a name is refused before a step.
MODEL_FILES = (
    "1_Pooling/config.json",
    "2_Normalize/config.json",
    "added_tokens.json",
    "colbert_linear.safetensors",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "modules.json",
    "sentence_bert_config.json",
    "sparse_linear.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def train(settings: Settings, stop: StopRequest | None = None) -> TrainReport:
    """Train a model.

    Args:
        settings: needs train.data and train.output.
        stop: asked while workers train whether to stop.

    Returns:
        The content of report.json.

    Raises:
        SettingsError, InstallationError, CorpusError, ModelError, DatasetMismatchError, OutputCollisionError,
            OutputBusyError: nothing was published.
        IncompleteRunError, TakenOverError, StorageError: run again to go on from the last checkpoint.
    """
    facts = RunFacts("train", run_id())
    return carry_out(TrainWork(settings), facts, stop)


def plan_train(settings: Settings) -> str:
    """Say what `train` would do, without writing anything (``--dry-run``)."""
    work = TrainWork(settings)
    refuse_taken(work.folders)
    asked, data, done = settings.train, work.data, work.current() is not None
    found = work.checkpoint_step()
    state = "up to date" if done else f"to go on behind step {found:,}" if found else "to be done"
    held_out = f", measured by {len(data.held_out):,} held-out queries" if data.held_out else ""
    return (
        f"{asked.kind} {work.base.spec.name}: {work.schedule.steps:,} steps of {asked.batch_queries} queries "
        f"with {asked.group} passages each, out of {len(data.examples):,} examples ({data.n_left_out:,} left "
        f"out){held_out}, to {asked.output}: {state}"
    )


class TrainWork:
    """One training, planned; see `pipeline.work.Work`."""

    def __init__(self, settings: Settings) -> None:
        """Settle the model, read and check the data, and refuse another training's output; writes nothing."""
        settings.require("train.data", "train.output")
        asked = settings.train
        check_packages(asked)
        name = (
            ("rerank.model", settings.rerank.model)
            if asked.kind == "reranker"
            else ("model.name", settings.model.name)
        )
        inputs = {"train.data": asked.data, "train.held_out": asked.held_out, name[0]: name[1]}
        refuse_collisions({"train.output": asked.output}, inputs, {})
        self._settings = settings
        self._storage = Storage(settings.output.storage_timeout_s)
        self._folder = open_folder(
            self._storage, str(asked.output), "trained model", "train.output", (*MODEL_FILES, CARD, TRAINING)
        )
        self.base = resolve_base(settings)
        self.data = read_data(self._storage, asked)
        self.schedule = make_schedule(asked, len(self.data.examples))
        self._identity = identify(settings, self.base, self.data)
        self._refuse_other()
        self._model: StoredFolder | None = None
        self._figures: HeldOutFigures | None = None
        self._files: list[FileFact] = []
        self._restarts = self._resumed_from = 0

    def _refuse_other(self) -> None:
        uri = join(self._folder.uri, TRAINING)
        data = self._storage.read_optional(uri)
        if data is None or not self._folder.is_claimed():
            return  # a foreign file of the name is refused with the others
        try:
            found = from_json(Identity, data)
        except ValueError as error:
            raise DatasetMismatchError(
                f"{uri}: does not say what is trained there ({error}); choose another train.output"
            ) from error
        refuse_other(found, self._identity, self._folder.uri)

    @property
    def storage(self) -> Storage:
        """For all requests."""
        return self._storage

    @property
    def folders(self) -> tuple[OwnedFolder, ...]:
        """The folder of the trained model."""
        return (self._folder,)

    @property
    def _work(self) -> str:
        return join(self._folder.uri, WORK)

    def checkpoint_step(self) -> int:
        """Return the step of the newest checkpoint; 0 if there is none."""
        found = stored(self._storage, self._work, "checkpoint", self._identity.key)
        return found[0].step if found else 0

    def current(self) -> TrainReport | None:
        """Return the report of the trained model that is there, if it is this one and its files are whole."""
        return standing_report(self._folder, TrainReport, self._identity.key)

    def sweep_is_due(self) -> bool:
        """A model is published in one step: nothing of an earlier one is kept."""
        return False

    def do(self, facts: RunFacts, watch: Callable[[], None]) -> None:
        """Train, unless that is done, and measure."""
        self._refuse_other()
        self._folder.put(TRAINING, to_json(self._identity))
        if typed := sum("type" in example.labels for example in self.data.examples):
            logger.warning("train.data: %d lines have a type, which is not looked at", typed)
        facts.plan(units=0, rows=self.schedule.positions)
        facts.book_rejected(
            {"held_out": self.data.n_left_out} if self.data.n_left_out else {}, self.data.left_out
        )
        team = settle_team(self._settings, watch)
        made = stored(self._storage, self._work, "model", self._identity.key)
        if not made:
            job = make_job(
                self._storage,
                self._work,
                self._identity.key,
                self.base,
                self._settings,
                self.schedule,
                team,
                self.data.examples,
            )
            self._resumed_from, self._restarts = run_training(job, team, self._settings, facts, watch)
            facts.rows_in = (self.schedule.steps - self._resumed_from) * self.schedule.batch_queries
            made = stored(self._storage, self._work, "model", self._identity.key)
        if not made:
            raise IncompleteRunError("the workers ended without a model; run again")
        self._model = made[0]
        # Rows are those of this run; what earlier ones did is in the model.
        facts.rows_planned = facts.rows_out = facts.rows_in
        began = time.time()
        if self.data.held_out:
            self._measure(team, watch)
            facts.book_step("measure", 1, 1, (began, time.time()))

    def _measure(self, team: Team, watch: Callable[[], None]) -> None:
        def of(trained: StoredFolder | None) -> Measured:
            return Measured(self._storage, self._work, self.base, self._settings, trained, team.cpus)

        models = [of(self._model)] if self.base.fresh_head else [of(self._model), of(None)]
        after, *before = measure(models, team, self.data.held_out, watch)
        figures = HeldOutFigures(len(self.data.held_out), None, _figure(after), None, None)
        if before:
            found = compare(after, before[0])
            gain = {query: after[query] - before[0][query] for query in after}
            figures = dataclasses.replace(
                figures, before=_figure(before[0]), difference=_figure(gain), p_value=found.p_value
            )
        self._figures = figures

    def publish(self, facts: RunFacts) -> None:
        """Put the files of the model under their names, config.json last."""
        model = self._model
        if model is None or model.step != self.schedule.steps:
            raise IncompleteRunError(
                f"{self.schedule.steps} steps were planned, and there is no model of them"
            )
        folder = self._folder
        folder.remove([CONFIG])
        self._files = [_fact(TRAINING, to_json(self._identity))]
        card = make_card(self.report(facts, "complete", complete=True))
        folder.put(CARD, card)
        self._files.append(_fact(CARD, card))
        for file in sorted(model.files, key=lambda file: file.path == CONFIG):
            if file.path == CARD:
                continue
            pieces = model.pieces(self._work, file)
            if len(pieces) == 1:
                folder.put(file.path, b"".join(read_pieces(self._storage, pieces)))
            else:
                folder.put_pieces(file.path, pieces, file.sha256)
            self._files.append(FileFact(file.path, file.bytes, file.sha256, 0))

    def report(self, facts: RunFacts, outcome: str, *, complete: bool) -> TrainReport:
        """Return what the training came to."""
        settings, data = self._settings, self.data
        report = TrainReport(
            **summarise(facts, ended=time.time(), price_per_hour=settings.report.price_per_hour),
            key=self._identity.key,
            complete=complete,
            outcome=outcome,
            files=tuple(self._files),
            settings=settings.model_dump(mode="json"),
            output=self._folder.uri,
            kind=settings.train.kind,
            model=self.base.spec,
            fresh_head=self.base.fresh_head,
            data=str(settings.train.data),
            data_sha256=data.sha256,
            examples=len(data.examples),
            left_out=data.n_left_out,
            held_out=settings.train.held_out,
            steps=self.schedule.steps,
            batch_queries=self.schedule.batch_queries,
            restarts=self._restarts,
            resumed_from=self._resumed_from,
            curve=self._model.curve if self._model is not None else (),
            figures=self._figures,
        )
        return dataclasses.replace(report, advice=tuple(advise_train(report) if complete else ()))

    def page(self, report: TrainReport) -> bytes:
        """Return its page."""
        return train_page(report)

    def sweep(self) -> None:
        """Remove checkpoints, and the pieces of the model."""
        sweep_work(self._storage, self._work, OWN_WORK)


def _fact(name: str, data: bytes) -> FileFact:
    return FileFact(name, len(data), hashlib.sha256(data).hexdigest(), 0)


def _figure(values: dict[str, float]) -> HeldOut:
    low, high = interval(values)
    return HeldOut(mean(values), low, high)
