"""The embed job: corpus in object storage to exactly-once embedding shards.

A first run, a run after a crash and a nightly run over a corpus with some new files are the same
code: plan, subtract what is done, do the rest, publish. See `embed` and `pipeline.work`.
"""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from ray.actor import ActorHandle

from bge_ray.dataset.changes import manifest_digest
from bge_ray.dataset.folder import Dataset, manifest_fact, marker_files
from bge_ray.dataset.shared import OWN_WORK, WORK
from bge_ray.errors import IncompleteRunError, OutputBusyError, RejectedRowsError
from bge_ray.formats.corpus import MAX_NAMED_OBJECTS
from bge_ray.pipeline.embed.estimate import Estimate, estimate
from bge_ray.pipeline.embed.prepare import Planned, prepare
from bge_ray.pipeline.embed.read import LENGTH_EDGES, read_stage
from bge_ray.pipeline.embed.reuse import ORIGINS
from bge_ray.pipeline.embed.sharing import by_ray, share_texts
from bge_ray.pipeline.embed.tasks import EmbedJob, ReadTask, UnitsTask
from bge_ray.pipeline.embed.write import commit_stage
from bge_ray.pipeline.engine.disks import refuse_unseen
from bge_ray.pipeline.engine.flow import by_actors, by_tasks, follow, parcels, receipts
from bge_ray.pipeline.engine.isolation import running_ledger
from bge_ray.pipeline.engine.model_stage import ModelJob, ModelStage
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.pools import Sizes, TaskRequest, cluster_sizes, encoder_request
from bge_ray.pipeline.engine.progress import Progress, work_line
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.pipeline.engine.telemetry import Telemetry
from bge_ray.pipeline.work import carry_out
from bge_ray.records.dataset import Manifest, make_manifest, marker_of
from bge_ray.records.reports import EmbedReport, read_report
from bge_ray.report.advice import advise_embed
from bge_ray.report.embed_page import embed_page
from bge_ray.report.facts import RunFacts, cost_saved, read_receipt, summarise, text_lengths
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder
from bge_ray.storage.sweep import is_due, sweep_work

logger = logging.getLogger(__name__)

# What a reader tokenises feeds a fraction of a GPU, of a small model an eighth; see docs/measured.md.
READERS_PER_GPU, READERS_PER_CORE = 12.0, 0.25
# Encoding and hashing the shard of a GPU's unit of 1.7 s takes a core half of that time, and its upload comes
# on top; see docs/measured.md.
WRITERS_PER_GPU, WRITERS_PER_CORE = 2.0, 1.0
MAX_WRITERS, WRITER_CPUS, WRITER_SHARE = 128, 0.1, 0.25


@dataclass(frozen=True)
class EmbedResult:
    """What a run came to."""

    manifest: Manifest
    report: EmbedReport


def embed(settings: Settings, stop: StopRequest | None = None) -> EmbedResult:
    """Embed a corpus into a data set, doing only what is not done yet.

    Args:
        settings: needs corpus.uri and output.uri.
        stop: asked between receipts whether to stop.

    Returns:
        The published manifest and the report of this run.

    Raises:
        SettingsError, CorpusError, ModelError, DatasetMismatchError, OutputCollisionError, OutputBusyError:
            nothing was written.
        IncompleteRunError, TakenOverError, StorageError: run again to continue.
        RejectedRowsError: too many rows were rejected; the run stopped.
    """
    facts = RunFacts("embed", run_id(), length_edges=LENGTH_EDGES)
    work = EmbedWork(settings, prepare(settings))
    report = carry_out(work, facts, stop)
    manifest = work.dataset.read_manifest()
    if manifest is None:
        raise IncompleteRunError(f"{work.dataset.root}: its manifest is gone; run again")
    return EmbedResult(manifest, report)


def plan_only(settings: Settings) -> Estimate:
    """Say what `embed` would do, without writing anything (``--dry-run``)."""
    planned = prepare(settings)
    sizes = embed_sizes(settings, planned, lambda: None) if planned.todo else None
    return estimate(planned, sizes, settings)


def embed_sizes(settings: Settings, planned: Planned, watch: Callable[[], None]) -> Sizes:
    """Size the stages for the cluster, without what a small job would leave idle."""
    parcels_todo = sum(task.n_parcels for task in planned.todo)
    writers = min(MAX_WRITERS, parcels_todo)
    tasks = [
        TaskRequest(
            "writers",
            writers,
            WRITER_SHARE,
            WRITER_CPUS,
            per_gpu=WRITERS_PER_GPU,
            per_core=WRITERS_PER_CORE,
        ),
        TaskRequest(
            "readers",
            len(planned.todo),
            share=1.0,
            count=settings.resources.num_readers,
            per_gpu=READERS_PER_GPU,
            per_core=READERS_PER_CORE,
        ),
    ]
    return cluster_sizes(settings, [encoder_request(settings, parcels_todo)], tasks, watch)


@dataclass(frozen=True)
class Stages:
    """What is done to the units; the bench puts others here, which only take time."""

    read: Callable[..., Iterator[pa.Table]]
    model: type
    write: Callable[..., Iterator[pa.Table]]


STAGES = Stages(read_stage, ModelStage, commit_stage)


def embedding_receipts(
    job: Any, model: Any, sizes: Sizes, tasks: tuple[ReadTask, ...], stages: Stages = STAGES
) -> Iterator[Parcel]:
    """The data path: spans in, receipts of their units out, in the order they finish."""
    rows = parcels([task.parcel() for task in tasks])
    rows = by_tasks(rows, stages.read, sizes.tasks["readers"], job=job)
    rows = by_actors(rows, stages.model, sizes.pools["encoders"], model)
    rows = by_tasks(rows, stages.write, sizes.tasks["writers"], job=job)
    return receipts(rows)


class EmbedWork:
    """One embed run, planned; see `pipeline.work.Work`."""

    def __init__(self, settings: Settings, planned: Planned) -> None:
        """Take what is to be done; nothing is written."""
        self._settings, self._planned = settings, planned
        self._markers = dict(planned.finished)
        self._tokenizer: str | None = None
        self._manifest: Manifest | None = None
        # Of the whole plan, counted once: a receipt must not cost more the more units there are.
        self._rows = sum(unit.n_rows for unit in planned.plan.units())
        self._rejected_before = sum(m.rows_rejected for m in planned.finished.values())

    @property
    def dataset(self) -> Dataset:
        """The output."""
        return self._planned.dataset

    @property
    def storage(self) -> Storage:
        """For all requests."""
        return self.dataset.storage

    @property
    def folders(self) -> tuple[OwnedFolder, ...]:
        """The data set alone."""
        return (self.dataset.folder,)

    def current(self) -> EmbedReport | None:
        """Return the report of the published data set, if it is the planned one to the last unit."""
        manifest = self.dataset.read_manifest()
        if self._planned.todo or manifest is None:
            return None
        if [m.unit for m in manifest.shards] != sorted(self._planned.plan.units()):
            return None
        spec = self.dataset.read_spec()
        if spec is None or spec.rows_fingerprint != self._planned.spec.rows_fingerprint:
            return None
        self._manifest = manifest
        report = read_report(EmbedReport, self.storage.read_optional(join(self.dataset.root, "report.json")))
        if report is None or not report.complete or report.key != manifest_digest(manifest):
            return None
        return report

    def sweep_is_due(self) -> bool:
        """Tell whether shards of an earlier state have been dead for long enough, or the card is gone."""
        return not self.dataset.has_card() or is_due(
            self.storage, self.dataset.root, self._settings.output.grace_s, time.time()
        )

    def do(self, facts: RunFacts, watch: Callable[[], None]) -> None:
        """Write what the data set is and its plan, then embed the units to do."""
        planned, dataset = self._planned, self.dataset
        facts.plan(units=len(planned.todo_units), rows=planned.todo_rows)
        sizes = None
        if planned.todo:
            sizes = embed_sizes(self._settings, planned, watch)  # which connects, if planning had no need to
            refuse_unseen(self.folders, watch)
        # What was planned without the lease is still true if no other run planned since.
        number = planned.previous_number
        if dataset.latest_plan()[0] != number or not dataset.create_plan(number + 1, planned.plan):
            raise OutputBusyError(f"{dataset.root}: another run has just worked on this output; run again")
        dataset.create_spec(planned.spec)
        if sizes is not None:
            with running_ledger() as ledger:
                self._run(facts, watch, sizes, ledger)

    def _run(self, facts: RunFacts, watch: Callable[[], None], sizes: Sizes, ledger: ActorHandle) -> None:
        settings, planned = self._settings, self._planned
        encoders = sizes.pools["encoders"]
        facts.start(sizes.workers("encoders"), time.time())
        attempts, trust = settings.resources.max_unit_attempts, settings.model.trust_remote_code
        job = EmbedJob(
            storage=self.storage,
            root=self.dataset.root,
            spec=planned.spec,
            compression=settings.output.compression,
            trust_remote_code=trust,
            max_attempts=attempts,
            ledger=ledger,
            reuse=settings.output.reuse,
        )
        model = ModelJob(
            stage="encode",
            spec=planned.spec.model,
            device=encoders.device,
            threads=encoders.threads,
            token_budget=settings.batching.token_budget,
            trust_remote_code=trust,
            ledger=ledger,
            max_attempts=attempts,
            dataset=planned.spec,
            units_at_once=encoders.units_at_once,
        )
        logger.info(
            "%d units, %s rows to embed; %s", len(planned.todo_units), f"{planned.todo_rows:,}", sizes
        )
        todo = planned.todo
        if planned.places is not None:
            interval = settings.report.log_interval_s
            book = partial(self._book_given, facts=facts)
            way = by_ray(model, STAGES.model, sizes, watch, book, interval)
            job = dataclasses.replace(job, shared=share_texts(job, planned.places, way))
            numbers = planned.places.numbers()
            todo = tuple(task.placed(numbers) for task in todo)
        telemetry = Telemetry("embed")
        telemetry.start(facts)
        with Progress(lambda: work_line(facts, "passages"), settings.report.log_interval_s):
            follow(
                lambda: embedding_receipts(job, model, sizes, todo),
                lambda receipt: self._book(receipt, facts, telemetry),
                watch,
            )

    def _book_given(self, receipt: Parcel, facts: RunFacts) -> None:
        """Count what was encoded beforehand for several parcels; no row is done by it."""
        if receipt.error is not None:
            logger.warning("%s: is encoded by each who has its texts: %s", receipt.name, receipt.error)
            return
        facts.book(read_receipt(0, {**receipt.facts, "rows_out": 0}), 0)

    def _book(self, receipt: Parcel, facts: RunFacts, telemetry: Telemetry) -> None:
        if receipt.error is not None:
            for task in receipt.task_as(UnitsTask).units:
                unit = task.unit
                rows = f"rows {unit.first_row} to {unit.first_row + unit.n_rows - 1}"
                facts.book_failure(f"{task.uri} {rows}: {receipt.error}")
                logger.error("unit %s given up: %s", unit.name, facts.failures[-1], extra={"unit": unit.name})
                telemetry.fail_unit()
            return
        self._tokenizer = receipt.facts.get("tokenizer") or self._tokenizer
        markers = [marker_of(tree) for tree in receipt.facts["markers"]]
        self._markers |= {marker.unit.name: marker for marker in markers}
        committed = {
            name: sum(getattr(m, name) for m in markers) for name in ("rows_out", "tokens", "truncated")
        }
        noted: Mapping[str, Any] = {
            **receipt.facts,
            **committed,
            "reasons": sum((Counter(marker.reasons) for marker in markers), Counter()),
            "bytes_out": sum(file.bytes for marker in markers for file in marker_files(marker)),
        }
        done = read_receipt(sum(marker.unit.n_rows for marker in markers), noted)
        facts.book(done, len(markers))
        telemetry.finish_unit(done, len(markers))
        self._refuse_rejected(facts)

    def _refuse_rejected(self, facts: RunFacts) -> None:
        """Stop once more rows are rejected than allowed, those of earlier runs among them."""
        rejected = facts.rows_rejected + self._rejected_before
        allowed = self._settings.corpus.max_rejected_fraction * self._rows
        if rejected > allowed:
            reasons = ", ".join(f"{reason} {count}" for reason, count in facts.reasons.most_common())
            raise RejectedRowsError(
                f"{rejected} of {self._rows} rows are rejected so far ({reasons or 'in earlier runs'}), "
                f"{allowed:.0f} are allowed by corpus.max_rejected_fraction; "
                f"{join(self.dataset.root, 'rejected')} names each; mend the corpus or raise it"
            )

    def publish(self, facts: RunFacts) -> None:
        """Check that every planned row is accounted for and every file is there, then publish."""
        planned = self._planned.plan.units()
        missing = [unit for unit in planned if unit.name not in self._markers]
        if missing:
            cause = facts.failures[0] if facts.failures else "no cause is known"
            raise IncompleteRunError(
                f"{len(missing)} of {len(planned)} units are not done: {cause}; report.json names every "
                "cause; run again to continue"
            )
        markers = (self._markers[unit.name] for unit in planned)
        manifest = make_manifest(self._planned.spec.vector_fingerprint, markers)
        if {manifest.rows_in, manifest.rows_out + manifest.rows_rejected} != {self._rows}:
            raise IncompleteRunError(
                f"{self._rows} rows were planned, {manifest.rows_out} came out, {manifest.rows_rejected} "
                "were rejected"
            )
        self._refuse_rejected(facts)
        gone = self.dataset.missing_files(manifest)
        if gone:
            raise IncompleteRunError(
                f"{len(gone)} files that were written are not at {self.dataset.root}, such as {gone[0]}: a "
                "folder of one machine is no output for a cluster of several (use a bucket or a shared "
                "disk), or they were removed; run again"
            )
        # A run that dies between the two leaves old shards under new columns, and the next one publishes.
        self.dataset.change_rows(self._planned.spec)
        self.dataset.publish(manifest)
        self._manifest = manifest

    def sweep(self) -> None:
        """Remove folded markers, old plans, and what has been dead for the grace."""
        if self._manifest is None:
            return
        sweep_work(self.storage, join(self.dataset.root, WORK), OWN_WORK)
        swept = self.dataset.sweep(self._planned.spec, self._manifest, self._settings.output.grace_s)
        if swept.removed or swept.waiting:
            logger.info(
                "shard files of objects that are gone or changed: %d removed, %d stay for output.grace_s",
                swept.removed,
                swept.waiting,
            )

    def report(self, facts: RunFacts, outcome: str, *, complete: bool) -> EmbedReport:
        """Return what the run came to."""
        settings, planned, manifest = self._settings, self._planned, self._manifest
        if complete and manifest is not None:
            outcome = f"complete: {manifest.rows_in:,} rows in {len(manifest.shards):,} units"
        reader_s = facts.steady_s * facts.workers.counts.get("readers", 0)
        report = EmbedReport(
            **summarise(facts, ended=time.time(), price_per_hour=settings.report.price_per_hour),
            key=manifest_digest(manifest) if manifest is not None else "",
            complete=complete,
            outcome=outcome,
            files=(manifest_fact(manifest),) if manifest is not None else (),
            settings=settings.model_dump(mode="json"),
            output=self.dataset.root,
            corpus=str(settings.corpus.uri),
            plan=planned.previous_number + 1,
            model=planned.spec.model,
            vector_fingerprint=planned.spec.vector_fingerprint,
            readers_busy=(facts.stage_s["read"] + facts.stage_s["tokenise"]) / reader_s if reader_s else 0.0,
            lengths=text_lengths(facts),
            objects_removed=len(planned.removal.uris),
            rows_removed=planned.removal.rows,
            removed_uris=planned.removal.uris[:MAX_NAMED_OBJECTS],
            tokenizer=self._tokenizer,
            tokens_encoded=facts.tokens_encoded,
            rows_reused=facts.counts["rows_reused"],
            tokens_reused=facts.counts["tokens_reused"],
            vectors_reused={
                origin: facts.counts[f"vectors_{origin}"]
                for origin in ORIGINS
                if facts.counts[f"vectors_{origin}"]
            },
            cost_saved=cost_saved(facts, facts.counts["tokens_reused"], settings.report.price_per_hour),
            output_bytes={
                output.name: facts.counts[f"{output.name}_bytes"] / facts.rows_out
                for output in planned.spec.model.outputs
                if facts.rows_out
            },
        )
        return dataclasses.replace(report, advice=tuple(advise_embed(report)))

    def page(self, report: EmbedReport) -> bytes:
        """Return the page of a report."""
        return embed_page(report)
