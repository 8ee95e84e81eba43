"""The embed job: corpus in object storage to exactly-once embedding shards.

A first run, a run after a crash and a nightly run over a corpus with some new files are the same
code: plan, subtract what is done, do the rest, publish. See `embed`.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import ray.data
from ray.exceptions import RayError

from bge_ray.dataset.folder import marker_files
from bge_ray.errors import BgeRayError, IncompleteRunError, OutputBusyError, RejectedRowsError, StorageError
from bge_ray.model.run.batching import settle_budget
from bge_ray.pipeline.embed.encode import EncodeStage
from bge_ray.pipeline.embed.estimate import Estimate, estimate
from bge_ray.pipeline.embed.prepare import Work, prepare
from bge_ray.pipeline.embed.read import LENGTH_EDGES, read_stage
from bge_ray.pipeline.embed.tasks import EmbedJob, SpanTask, span_batch
from bge_ray.pipeline.embed.write import write_stage
from bge_ray.pipeline.engine.cluster import Sizes, cap_sizes, cluster_sizes, connect, root_cause
from bge_ray.pipeline.engine.isolation import start_ledger
from bge_ray.pipeline.engine.nodes import await_nodes
from bge_ray.pipeline.engine.payload import UnitRow
from bge_ray.pipeline.engine.progress import Progress, work_line
from bge_ray.pipeline.engine.receipts import draw_receipts
from bge_ray.pipeline.engine.stopping import Stopped, StopRequest, make_watch
from bge_ray.pipeline.engine.telemetry import Telemetry
from bge_ray.records.canonical import to_json
from bge_ray.records.dataset import Manifest, Marker, make_manifest
from bge_ray.records.reports import EmbedReport
from bge_ray.report.advice import advise_embed
from bge_ray.report.embed_page import embed_page
from bge_ray.report.facts import RunFacts, Workers, read_receipt, summarise, text_lengths
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings
from bge_ray.storage.lease import Lease, is_leased
from bge_ray.storage.objects import join
from bge_ray.storage.reports import write_report

logger = logging.getLogger(__name__)

# This many units given up in a row mean that the fault is not in the units.
MAX_FAILURES_IN_A_ROW = 10


@dataclass(frozen=True)
class EmbedResult:
    """What a run came to; ``report`` is what report.json says."""

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
        SettingsError, CorpusError, ModelError, DatasetMismatchError, OutputBusyError: nothing was
            written.
        IncompleteRunError, TakenOverError, StorageError: run again to continue.
        RejectedRowsError: too many rows were rejected; the run stopped.
    """
    facts = RunFacts("embed", run_id(), length_edges=LENGTH_EDGES)
    work = prepare(settings)
    published = work.dataset.read_manifest()
    # A run that was cut off after it published has left its lease, and things to sweep and to report.
    cut_off = is_leased(work.dataset.storage, work.dataset.root)
    if published is not None and _is_current(work, published) and not cut_off:
        logger.info("nothing to do: all %d units of %s are done", len(published.shards), work.dataset.root)
        return EmbedResult(published, _report(settings, work, facts, "nothing to do"))
    stop = stop or StopRequest()
    with stop.deferred(), Lease(work.dataset.storage, work.dataset.root) as lease:
        # What was planned without the lease is still true if no other run planned since.
        if work.dataset.latest_plan()[0] != work.previous_number:
            raise OutputBusyError(
                f"{work.dataset.root}: another run has just worked on this output; run again"
            )
        work.dataset.create_spec(work.spec)
        if not work.dataset.create_plan(work.previous_number + 1, work.plan):
            raise OutputBusyError(
                f"{work.dataset.root}: another run took plan {work.previous_number + 1}; run again"
            )
        facts.plan(units=len(work.todo_units), rows=work.todo_rows)
        markers = dict(work.finished)
        try:
            if work.todo:
                _run(settings, work, make_watch(lease, stop), facts, markers)
            manifest = _publish(settings, work, lease, facts, markers)
        except (BgeRayError, Stopped) as error:
            if not lease.lost.is_set():
                _tell_failure(work, _report(settings, work, facts, f"incomplete: {error}"))
            raise
        outcome = f"complete: {manifest.rows_in:,} rows in {len(manifest.shards):,} units"
        report = _report(settings, work, facts, outcome)
        _write_report(work, report)
        return EmbedResult(manifest, report)


def plan_only(settings: Settings) -> Estimate:
    """Say what `embed` would do, without writing anything (``--dry-run``)."""
    work = prepare(settings)
    sizes = cluster_sizes(settings.resources) if work.todo else None
    return estimate(work.dataset, work.spec, work.plan, list(work.todo), sizes, settings)


@dataclass(frozen=True)
class Stages:
    """What is done to a unit; the bench puts others here, which only take time."""

    read: Callable[..., Iterator[pa.Table]]
    encode: type
    write: Callable[..., pa.Table]


STAGES = Stages(read_stage, EncodeStage, write_stage)


def embedding_receipts(
    job: object, sizes: Sizes, spans: list[SpanTask], stages: Stages = STAGES
) -> Iterator[UnitRow]:
    """The data path: spans in, one receipt a unit out, in the order they finish; each stage gets the job."""
    config = {"job": job}
    return (
        UnitRow.from_batch(batch)
        for batch in ray.data.from_items([span_batch(span) for span in spans], override_num_blocks=len(spans))
        .map_batches(
            stages.read,
            batch_format="pyarrow",
            batch_size=1,
            num_cpus=sizes.reader_cpus,
            compute=ray.data.TaskPoolStrategy(size=sizes.num_readers),
            fn_kwargs=config,
        )
        .map_batches(
            stages.encode,
            batch_format="pyarrow",
            batch_size=1,
            num_cpus=sizes.encoder_cpus,
            num_gpus=sizes.encoder_gpus,
            compute=ray.data.ActorPoolStrategy(size=sizes.num_encoders, max_tasks_in_flight_per_actor=2),
            fn_constructor_kwargs=config,
        )
        .map_batches(
            stages.write,
            batch_format="pyarrow",
            batch_size=1,
            num_cpus=sizes.writer_cpus,
            compute=ray.data.TaskPoolStrategy(size=sizes.num_writers),
            fn_kwargs=config,
        )
        .iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
    )


def _run(
    settings: Settings, work: Work, watch: Callable[[], None], facts: RunFacts, markers: dict[str, Marker]
) -> None:
    asked = settings.resources
    connect(asked)
    await_nodes("resources.num_encoders", asked.num_encoders, asked.gpus_per_encoder, watch)
    sizes = cap_sizes(cluster_sizes(asked), spans=len(work.todo), units=len(work.todo_units))
    counts = {"encoders": sizes.num_encoders, "readers": sizes.num_readers, "writers": sizes.num_writers}
    facts.start(Workers(sizes.device, sizes.devices, counts), time.time())
    job = EmbedJob(
        storage=work.dataset.storage,
        root=work.dataset.root,
        spec=work.spec,
        compression=settings.output.compression,
        token_budget=settle_budget(settings.batching.token_budget, on_gpu=sizes.device != "cpu"),
        device=sizes.device,
        threads=sizes.encoder_threads,
        trust_remote_code=settings.model.trust_remote_code,
        max_attempts=settings.resources.max_unit_attempts,
        ledger=start_ledger(),
    )
    logger.info("%d units, %s rows to embed; %s", len(work.todo_units), f"{work.todo_rows:,}", sizes)
    rejected = sum(m.rows_rejected for m in markers.values())
    allowed = settings.corpus.max_rejected_fraction * sum(u.n_rows for u in work.plan.units())
    in_a_row = 0
    telemetry = Telemetry("embed")
    telemetry.start(facts)
    try:
        with Progress(lambda: work_line(facts, "passages"), settings.report.log_interval_s):
            for receipt in draw_receipts(lambda: embedding_receipts(job, sizes, list(work.todo)), watch):
                _book(receipt, facts, telemetry, markers)
                in_a_row = 0 if receipt.marker else in_a_row + 1
                if in_a_row >= MAX_FAILURES_IN_A_ROW:
                    raise IncompleteRunError(
                        f"{in_a_row} units failed in a row, the last: {facts.failures[-1]}"
                    )
                if rejected + facts.rows_rejected > allowed:
                    raise _too_many_rejected(work.dataset.root, facts, allowed)
    except RayError as error:
        raise IncompleteRunError(f"the pipeline failed: {root_cause(error)}") from error


def _book(receipt: UnitRow, facts: RunFacts, telemetry: Telemetry, markers: dict[str, Marker]) -> None:
    if receipt.marker is None:
        unit = receipt.task.unit
        rows = f"rows {unit.first_row} to {unit.first_row + unit.n_rows - 1}"
        facts.book_failure(f"{receipt.task.uri} {rows}: {receipt.error}")
        logger.error("unit %s given up: %s", unit.name, facts.failures[-1], extra={"unit": unit.name})
        telemetry.fail_unit()
        return
    markers[receipt.marker.unit.name] = receipt.marker
    marker = receipt.marker
    committed = {name: getattr(marker, name) for name in ("rows_out", "tokens", "truncated", "reasons")}
    bytes_out = sum(file.bytes for file in marker_files(marker))
    done = read_receipt(marker.unit.n_rows, {**receipt.facts, **committed, "bytes_out": bytes_out})
    facts.book(done)
    telemetry.finish_unit(done)


def _publish(
    settings: Settings, work: Work, lease: Lease, facts: RunFacts, markers: dict[str, Marker]
) -> Manifest:
    """Check that every planned row is accounted for, then publish and sweep."""
    planned = work.plan.units()
    missing = [unit for unit in planned if unit.name not in markers]
    if missing:
        cause = facts.failures[0] if facts.failures else "no cause is known"
        raise IncompleteRunError(
            f"{len(missing)} of {len(planned)} units are not done: {cause}; report.json names every cause; "
            "run again to continue"
        )
    manifest = make_manifest(work.spec.vector_fingerprint, (markers[unit.name] for unit in planned))
    rows = sum(unit.n_rows for unit in planned)
    if (manifest.rows_in, manifest.rows_out + manifest.rows_rejected) != (rows, rows):
        raise IncompleteRunError(
            f"{rows} rows were planned, {manifest.rows_out} came out, {manifest.rows_rejected} were rejected"
        )
    if manifest.rows_rejected > settings.corpus.max_rejected_fraction * rows:
        raise RejectedRowsError(
            f"{manifest.rows_rejected} of {rows} rows were rejected, more than corpus.max_rejected_fraction "
            f"{settings.corpus.max_rejected_fraction:g}; {join(work.dataset.root, 'rejected')} names each"
        )
    lease.check()
    work.dataset.publish(manifest)
    swept = work.dataset.sweep(manifest)
    if swept:
        logger.info("removed %d shard files of objects that are gone or changed", swept)
    return manifest


def _is_current(work: Work, manifest: Manifest) -> bool:
    return not work.todo and [m.unit for m in manifest.shards] == sorted(work.plan.units())


def _too_many_rejected(root: str, facts: RunFacts, allowed: float) -> RejectedRowsError:
    reasons = ", ".join(f"{reason} {count}" for reason, count in facts.reasons.most_common())
    return RejectedRowsError(
        f"{facts.rows_rejected} rows rejected so far ({reasons}), {allowed:.0f} are allowed by "
        f"corpus.max_rejected_fraction; {join(root, 'rejected')} names each; mend the corpus or raise it"
    )


def _report(settings: Settings, work: Work, facts: RunFacts, outcome: str) -> EmbedReport:
    reader_s = facts.steady_s * facts.workers.counts.get("readers", 0)
    report = EmbedReport(
        **summarise(facts, ended=time.time(), price_per_hour=settings.report.price_per_hour),
        key=work.spec.vector_fingerprint,
        complete=not outcome.startswith("incomplete"),
        outcome=outcome,
        files=(),
        settings=settings.model_dump(mode="json"),
        output=work.dataset.root,
        corpus=str(settings.corpus.uri),
        plan=work.previous_number + 1,
        model=work.spec.model,
        vector_fingerprint=work.spec.vector_fingerprint,
        readers_busy=(facts.stage_s["read"] + facts.stage_s["tokenise"]) / reader_s if reader_s else 0.0,
        lengths=text_lengths(facts),
    )
    return dataclasses.replace(report, advice=tuple(advise_embed(report)))


def _write_report(work: Work, report: EmbedReport) -> None:
    write_report(work.dataset.storage, work.dataset.root, embed_page(report), to_json(report))


def _tell_failure(work: Work, report: EmbedReport) -> None:
    """Write the report of a failed run; what failed the run may refuse the report, too."""
    try:
        _write_report(work, report)
    except StorageError as error:
        logger.error("no report of this run: %s", error)  # noqa: TRY400 - the run's own error follows
