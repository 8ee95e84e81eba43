"""What search and rerank have in common around their pipelines: the run from its receipts to its files."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from bge_ray.dataset.folder import Dataset
from bge_ray.errors import DatasetMismatchError, IncompleteRunError, RejectedRowsError, SettingsError
from bge_ray.pipeline.engine.cluster import root_cause
from bge_ray.pipeline.engine.receipts import draw_receipts
from bge_ray.pipeline.engine.telemetry import Telemetry
from bge_ray.pipeline.runs.intake import Intake, remove_all
from bge_ray.pipeline.runs.parcels import Parcel
from bge_ray.records.dataset import DatasetSpec, Manifest
from bge_ray.report.facts import report_json
from bge_ray.report.run_page import run_page
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings
from bge_ray.storage.lease import Lease, is_leased
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder
from bge_ray.storage.reports import write_report

logger = logging.getLogger(__name__)

REPORT_FORMAT = 1
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


@dataclass
class Tally:
    """What the driver adds up from receipts; times are Unix seconds."""

    started: float
    rows_planned: int
    done_units: int = 0
    done_rows: int = 0
    failures: list[str] = field(default_factory=list)
    facts: Counter[str] = field(default_factory=Counter)
    first: float | None = None
    last: float | None = None

    def add(self, receipt: Parcel) -> None:
        """Book a receipt; one with an error may stand for all units of a group."""
        if receipt.error is not None:
            self.failures += [f"group {receipt.task.name}: {receipt.error}"] * len(receipt.task.todo)
            logger.error("%s given up", self.failures[-1], extra={"unit": receipt.task.name})
            return
        self.done_units += 1
        self.done_rows += sum(unit.n_rows for unit in receipt.task.todo)
        facts = dict(receipt.facts)
        begun, ended = facts.pop("score_started", None), facts.pop("score_ended", None)
        written = facts.pop("written")
        self.first = min(self.first or written, begun or written)
        self.last = max(self.last or written, ended or written)
        self.facts.update(facts)

    @property
    def steady_s(self) -> float:
        """Seconds from the first unit at work to the last."""
        return (self.last or 0.0) - (self.first or 0.0)


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
    intake: Intake,
    tally: Tally,
    telemetry: Telemetry,
    watch: Callable[[], None],
    interval_s: float,
) -> None:
    """Draw all receipts, book them, and say now and then how far the run is.

    Raises:
        IncompleteRunError: the pipeline failed, or units were given up.
    """
    told = time.time()
    try:
        for receipt in draw_receipts(receipts, watch):
            tally.add(receipt)
            _count(receipt, telemetry)
            if not tally.done_units and len(tally.failures) >= MAX_FAILURES_IN_A_ROW:
                break
            if time.time() > told + interval_s:
                told = time.time()
                rate = tally.done_rows / max(told - tally.started, 1e-3)
                logger.info(
                    "%d of %d rows, %.1f a second since the start", tally.done_rows, tally.rows_planned, rate
                )
    except RayError as error:
        raise IncompleteRunError(f"the pipeline failed: {root_cause(error)}") from error
    if tally.failures:
        raise IncompleteRunError(
            f"{len(tally.failures)} of {sum(len(g.todo) for g in intake.groups)} units are not done, "
            f"the first: {tally.failures[0]}; run again to continue"
        )


def _count(receipt: Parcel, telemetry: Telemetry) -> None:
    """Count a receipt for Prometheus; one with an error may stand for all units of a group."""
    if receipt.error is not None:
        for _ in receipt.task.todo:
            telemetry.fail_unit()
        return
    facts = receipt.facts
    queries, pairs = facts.get("query_tokens", 0), facts.get("pair_tokens", 0)
    amounts = {
        "rows": sum(unit.n_rows for unit in receipt.task.todo),
        "tokens": queries + pairs,
        # Of queries, which are few and short, no padding is noted.
        "padded_tokens": queries + facts.get("padded_tokens", 0),
        "truncated_rows": facts.get("truncated_queries", 0) + facts.get("truncated_pairs", 0),
        "device_busy_seconds": facts.get("device_s", 0.0),
    }
    telemetry.finish_unit(amounts, {})


def read_current(storage: Storage, folder: str, key: str) -> dict[str, Any] | None:
    """Return the report of the run that is published in a folder, if it is the one of that key."""
    data = storage.read_optional(join(folder, "report.json"))
    try:
        report = json.loads(data or b"{}")
    except ValueError:
        return None
    same = isinstance(report, dict) and report.get("key") == key and report.get("complete")
    return report if same and storage.info(join(folder, "run.parquet")) is not None else None


def publish_report(folder: OwnedFolder, report: dict[str, Any]) -> None:
    """Write the report of a run; with ``complete`` that is what vouches for the run files."""
    report = {"format_version": REPORT_FORMAT, "run_id": run_id(), **report}
    write_report(folder, run_page(report), report_json(report))


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


def check_rejected(report: dict[str, Any], folder: str, share: float, allowed: float, key: str) -> None:
    """Refuse to call a published run good if too much of its input was left out.

    Raises:
        RejectedRowsError: names the reasons.
    """
    if share > allowed:
        reasons: Iterable[tuple[str, int]] = report["rejected_reasons"].items()
        raise RejectedRowsError(
            f"{folder}: the run is published, but {share:.1%} of its input was left out "
            f"({', '.join(f'{reason} {count}' for reason, count in reasons)}), more than {key} {allowed:g}; "
            "rejected.parquet names each"
        )
