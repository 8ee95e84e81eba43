"""What search and rerank have in common around their pipelines: the run from its receipts to its files."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from ray.exceptions import RayError

from bge_ray.dataset.folder import Dataset
from bge_ray.errors import DatasetMismatchError, IncompleteRunError, RejectedRowsError, SettingsError
from bge_ray.pipeline.engine.cluster import root_cause
from bge_ray.pipeline.engine.progress import Progress, work_line
from bge_ray.pipeline.engine.receipts import draw_receipts
from bge_ray.pipeline.engine.telemetry import Telemetry
from bge_ray.pipeline.runs.intake import remove_all
from bge_ray.pipeline.runs.parcels import Parcel
from bge_ray.pipeline.runs.parts import Totals
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.dataset import DatasetSpec, FileFact, Manifest
from bge_ray.records.reports import REPORT_FORMAT_VERSION, Report, RerankReport, SearchReport
from bge_ray.report.facts import RunFacts, read_receipt
from bge_ray.report.run_page import rerank_page, search_page
from bge_ray.settings.sections import Settings
from bge_ray.storage.lease import Lease, is_leased
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.reports import write_report

logger = logging.getLogger(__name__)

R = TypeVar("R", SearchReport, RerankReport)

WORK = "work"
# This many units given up, and none done, mean that the fault is not in the units.
MAX_FAILURES_IN_A_ROW = 10


@dataclass(frozen=True)
class Source:
    """A complete data set, as a search reads it."""

    storage: Storage
    root: str
    spec: DatasetSpec
    manifest: Manifest


def open_source(settings: Settings) -> Source:
    """Open the data set at output.uri.

    Raises:
        SettingsError: there is no complete data set.
        DatasetMismatchError: its files do not belong together.
    """
    settings.require("output.uri")
    storage = Storage(settings.output.storage_timeout_s)
    dataset = Dataset(storage, str(settings.output.uri))
    spec, manifest = dataset.read_spec(), dataset.read_manifest()
    if spec is None or manifest is None:
        raise SettingsError(f"output.uri {dataset.root}: no complete data set there; run embed.py first")
    if manifest.vector_fingerprint != spec.vector_fingerprint:
        raise DatasetMismatchError(
            f"output.uri {dataset.root}: its manifest is of another data set than its dataset.json; "
            "run embed.py again"
        )
    if not manifest.rows_out:
        raise SettingsError(f"output.uri {dataset.root}: the data set has no vectors")
    return Source(storage, dataset.root, spec, manifest)


def follow(
    receipts: Callable[[], Iterator[Parcel]],
    facts: RunFacts,
    rows: str,
    telemetry: Telemetry,
    watch: Callable[[], None],
    interval_s: float,
) -> None:
    """Draw all receipts, book them, and tell how far the run is.

    Args:
        receipts: starts the data path.
        facts: with the plan of the run.
        rows: what a row is, in the plural.
        telemetry: of the run.
        watch: called while waiting; raises to stop.
        interval_s: between log lines where there is no terminal.

    Raises:
        IncompleteRunError: the pipeline failed, or units were given up.
    """
    try:
        with Progress(lambda: work_line(facts, rows), interval_s):
            for receipt in draw_receipts(receipts, watch):
                _book(receipt, facts, telemetry)
                if not facts.units_done and len(facts.failures) >= MAX_FAILURES_IN_A_ROW:
                    break
    except RayError as error:
        raise IncompleteRunError(f"the pipeline failed: {root_cause(error)}") from error
    if facts.failures:
        raise IncompleteRunError(
            f"{len(facts.failures)} of {facts.units_planned} units are not done, "
            f"the first: {facts.failures[0]}; run again to continue"
        )


def _book(receipt: Parcel, facts: RunFacts, telemetry: Telemetry) -> None:
    """Book a receipt; one with an error may stand for all units of a group."""
    todo = receipt.task.todo
    if receipt.error is not None:
        facts.book_failure(f"group {receipt.task.name}: {receipt.error}", units=len(todo))
        logger.error("%s given up", facts.failures[-1], extra={"unit": receipt.task.name})
        for _ in todo:
            telemetry.fail_unit()
        return
    done = read_receipt(sum(unit.n_rows for unit in todo), receipt.facts)
    facts.book(done)
    telemetry.finish_unit(done)


def read_current(storage: Storage, folder: str, key: str, kind: type[R]) -> R | None:
    """Return the report of the run that is published in a folder, if it is the one of that key."""
    data = storage.read_optional(join(folder, "report.json"))
    try:
        report = from_json(kind, data or b"{}")
    except ValueError:
        return None  # none, or of another job or version
    if (report.format_version, report.key, report.complete) != (REPORT_FORMAT_VERSION, key, True):
        return None
    for file in report.files:
        info = storage.info(_file_uri(folder, file.path))
        if info is None or info.size != file.bytes:
            logger.warning("%s: is missing or has another size; it is made again", file.path)
            return None
    return report


def _file_uri(folder: str, path: str) -> str:
    return path if "://" in path or path.startswith("/") else join(folder, path)


def published_files(folder: str, totals: Totals) -> tuple[FileFact, ...]:
    """Return what a run published as its report names it: below its folder where it lies there."""
    below = f"{folder.rstrip('/')}/"
    return tuple(dataclasses.replace(f, path=f.path.removeprefix(below)) for f in totals.files)


def publish_report(storage: Storage, folder: str, report: SearchReport | RerankReport) -> None:
    """Write the report of a run; with ``complete`` that is what vouches for the run files."""
    page = search_page(report) if isinstance(report, SearchReport) else rerank_page(report)
    write_report(storage, folder, page, to_json(report))


def clear_work(storage: Storage, folder: str) -> None:
    """Remove stored inputs and parts once the run is published."""
    remove_all(storage, [info.uri for info in storage.list_files(join(folder, WORK))])


def finish_clearing(storage: Storage, folder: str) -> None:
    """Clear up for a run that was cut off after it published.

    Raises:
        OutputBusyError: it lives.
    """
    if is_leased(storage, folder):
        with Lease(storage, folder):
            clear_work(storage, folder)


def check_rejected(report: Report, folder: str, share: float, allowed: float, key: str) -> None:
    """Refuse to call a published run good if too much of its input was left out.

    Raises:
        RejectedRowsError: names the reasons.
    """
    if share > allowed:
        reasons = ", ".join(f"{reason} {count}" for reason, count in report.rejected_reasons.items())
        raise RejectedRowsError(
            f"{folder}: the run is published, but {share:.1%} of its input was left out ({reasons}), more "
            f"than {key} {allowed:g}; rejected.parquet names each"
        )
