"""The merge job: models of one architecture to one, tensor by tensor; runs on one machine, without Ray.

A folder is a model once it has a config.json. That goes before anything else of an earlier merge is
replaced, and comes after everything else of this one is there.
"""

import dataclasses
import hashlib
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from bge_ray.errors import CorpusError, IncompleteRunError, ModelError, SettingsError
from bge_ray.formats.training import Example, read_examples
from bge_ray.model.merge import MergePlan, plan_merge
from bge_ray.model.source import fetch_model, hash_model
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.pipeline.merge.card import make_card
from bge_ray.pipeline.runs.parts import PieceFile
from bge_ray.pipeline.work import carry_out, refuse_taken
from bge_ray.records.canonical import digest
from bge_ray.records.dataset import FileFact
from bge_ray.records.reports import MergedModel, MergeReport
from bge_ray.report.facts import RunFacts, summarise
from bge_ray.report.merge_page import merge_page
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings
from bge_ray.storage.folders import refuse_collisions
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder, open_folder
from bge_ray.storage.reports import REPORT_FILES, standing_report
from bge_ray.storage.sweep import sweep_work

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CARD, CONFIG, WORK = "README.md", "config.json", "work"
_OWN_WORK = re.compile(r"weights-\d+-\d{6}")


def merge(settings: Settings, stop: StopRequest | None = None) -> MergeReport:
    """Merge models into one.

    Args:
        settings: needs merge.models and merge.output.
        stop: asked between tensors whether to stop.

    Returns:
        The content of report.json.

    Raises:
        SettingsError, ModelError, CorpusError, OutputCollisionError, OutputBusyError: nothing was published.
        TakenOverError, StorageError: run again.
    """
    facts = RunFacts("merge", run_id())
    return carry_out(MergeWork(settings), facts, stop)


def plan_merged(settings: Settings) -> str:
    """Say what `merge` would do, without writing anything (``--dry-run``)."""
    work = MergeWork(settings)
    refuse_taken(work.folders)
    done = work.current() is not None
    tensors = sum(len(file.tensors) for file in work.plan.weights)
    how = "by given weights" if settings.merge.weights else "by equal weights"
    if settings.merge.examples is not None:
        how = f"by their losses on {len(work.examples):,} examples"
    return (
        f"{len(work.models)} models of {tensors:,} tensors, {how}, to {settings.merge.output}: "
        f"{'up to date' if done else 'to be done'}"
    )


class MergeWork:
    """One merge, planned; see `pipeline.work.Work`."""

    def __init__(self, settings: Settings) -> None:
        """Fetch and compare the models, and read the examples; nothing is written to the output."""
        settings.require("merge.models", "merge.output")
        asked = settings.merge
        names = asked.models or ()
        if len(set(names)) != len(names):
            raise SettingsError("merge.models: a model is named twice; give it a greater weight instead")
        refuse_collisions(
            {"merge.output": asked.output},
            {f"merge.models[{number}]": name for number, name in enumerate(names)}
            | {"merge.examples": asked.examples},
            {},
        )
        self._settings = settings
        self._storage = Storage(settings.output.storage_timeout_s)
        fetched = {name: fetch_model(name, None, "merge.models") for name in names}
        folders = {name: folder for name, (folder, _) in fetched.items()}
        self.plan: MergePlan = plan_merge(folders)
        given = asked.weights or tuple(1 / len(names) for _ in names)
        self.models = tuple(
            MergedModel(name, commit, hash_model(folder), weight, None)
            for (name, (folder, commit)), weight in zip(fetched.items(), given, strict=True)
        )
        self.examples = self._read_examples()
        # Before the examples have changed the weights.
        self._key = self._make_key()
        files = [*(file.path for file in self.plan.weights), *self.plan.copied, CARD]
        self._folder = open_folder(
            self._storage, str(asked.output), "merged model", "merge.output", tuple(sorted(files))
        )
        self._written: list[tuple[str, PieceFile]] = []
        self._files: list[FileFact] = []

    def _read_examples(self) -> list[Example]:
        asked = self._settings.merge
        if asked.examples is None:
            return []
        faults: list[str] = []
        found = []

        def reject(query_id: str | None, _: str | None, reason: str, detail: str) -> None:
            faults.append(f"{query_id}: {reason}: {detail}")

        for example in read_examples(self._storage, asked.examples, reject):
            if example.negatives:
                found.append(example)
            else:
                faults.append(f"{example.query_id}: no_negative: neg is missing or empty")
        for fault in faults[:3]:
            logger.warning("merge.examples: left out: %s", fault)
        if not found:
            raise CorpusError(
                f"merge.examples {asked.examples}: no line has a query, pos and neg; {len(faults)} left out"
            )
        logger.info("merge.examples: %d examples, %d lines left out", len(found), len(faults))
        return found

    @property
    def storage(self) -> Storage:
        """For all requests."""
        return self._storage

    @property
    def folders(self) -> tuple[OwnedFolder, ...]:
        """The folder of the merged model."""
        return (self._folder,)

    def _make_key(self) -> str:
        """Return a name for all that decides the merged model and its card."""
        models = [(model.name, model.revision, model.weights_sha256, model.weight) for model in self.models]
        asked = self._settings.merge
        examples = [(e.query_id, e.query, e.texts, e.negatives) for e in self.examples]
        weighed = [
            examples,
            asked.temperature,
            self._settings.model.model_dump(mode="json", exclude={"name"}),
        ]
        return digest("merge", FORMAT_VERSION, models, weighed if examples else None)

    def current(self) -> MergeReport | None:
        """Return the report of the merged model that is there, if it is this one and its files are whole."""
        return standing_report(self._folder, MergeReport, self._key)

    def sweep_is_due(self) -> bool:
        """A model is replaced in one step: nothing of an earlier one is kept."""
        return False

    def do(self, facts: RunFacts, watch: Callable[[], None]) -> None:
        """Weigh the models, and merge their tensors into pieces of files."""
        # torch, which refused settings do without.
        from bge_ray.model.run.merging import merged_bytes

        if self.examples:
            self._weigh(facts, watch)
        tensors = sum(len(file.tensors) for file in self.plan.weights)
        facts.plan(units=0, rows=tensors)
        began = time.time()
        weights = [model.weight for model in self.models]
        for number, file in enumerate(self.plan.weights):
            target = PieceFile(self._storage, join(self._folder.uri, WORK, f"weights-{number}"))
            for data in merged_bytes(file, weights):
                watch()
                target.write(data)
                facts.bytes_out += len(data)
            self._written.append((file.path, target))
            facts.rows_in += len(file.tensors)
            facts.rows_out += len(file.tensors)
        facts.book_step("merge", tensors, tensors, (began, time.time()))

    def _weigh(self, facts: RunFacts, watch: Callable[[], None]) -> None:
        from bge_ray.model.run.merging import example_loss, group_of, loss_weights

        began = time.time()
        queries = [example.query for example in self.examples]
        passages = [text for example in self.examples for text in group_of(example.texts, example.negatives)]
        losses = []
        for model in self.models:
            watch()
            asked = self._settings.model.model_copy(update={"name": model.name, "revision": model.revision})
            losses.append(example_loss(asked, queries, passages))
            logger.info("%s: loss %.4f on %d examples", model.name, losses[-1], len(queries))
        weights = loss_weights(losses, self._settings.merge.temperature)
        self.models = tuple(
            dataclasses.replace(model, weight=weight, loss=loss)
            for model, weight, loss in zip(self.models, weights, losses, strict=True)
        )
        facts.book_step("weigh", len(losses), len(losses), (began, time.time()))

    def publish(self, facts: RunFacts) -> None:
        """Put the files of the model under their names, config.json last."""
        if facts.rows_out != facts.rows_planned:
            raise IncompleteRunError(
                f"{facts.rows_planned} tensors were planned, {facts.rows_out} are merged"
            )
        folder = self._folder
        folder.remove([CONFIG])
        # What an earlier merge had and this one has not would be read as a part of this one.
        folder.remove(sorted(set(folder.known_names()) - {*folder.names, *REPORT_FILES}))
        for name, target in self._written:
            self._files.append(dataclasses.replace(target.publish(folder, name, 0), path=name))
        small = {name: _read(path) for name, path in self.plan.copied.items()}
        small[CARD] = make_card(self.models, len(self.examples), has_modules="modules.json" in small)
        for name in sorted(small, key=lambda name: name == CONFIG):
            folder.put(name, small[name])
            self._files.append(_fact_of(name, small[name]))

    def report(self, facts: RunFacts, outcome: str, *, complete: bool) -> MergeReport:
        """Return what the merge came to."""
        settings = self._settings
        parameters = sum(
            tensor.numbers
            for file in self.plan.weights
            for tensor in file.tensors
            if len(tensor.files) == len(self.models)
        )
        return MergeReport(
            **summarise(facts, ended=time.time(), price_per_hour=settings.report.price_per_hour),
            key=self._key,
            complete=complete,
            outcome=outcome,
            files=tuple(self._files),
            settings=settings.model_dump(mode="json"),
            output=self._folder.uri,
            models=self.models,
            examples=len(self.examples),
            parameters=parameters,
        )

    def page(self, report: MergeReport) -> bytes:
        """Return its page."""
        return merge_page(report)

    def sweep(self) -> None:
        """Remove the pieces of files."""
        sweep_work(self._storage, join(self._folder.uri, WORK), _OWN_WORK)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error}") from error


def _fact_of(name: str, data: bytes) -> FileFact:
    return FileFact(name, len(data), hashlib.sha256(data).hexdigest(), 0)
