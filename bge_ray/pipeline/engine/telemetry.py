"""What a run tells Prometheus, by way of `ray.util.metrics`; nothing here can make a run fail.

The driver sets all of it, from the one receipt that it gets of each unit. So a unit counts once however
often its tasks were repeated, which a counter in a stage could not promise, and the cost is a few
numbers a unit. The series are few: names below, times jobs, times reasons for rejecting a row. Runs are no
label, because there is a new one every night and Prometheus keeps a series for each: the moment at which a
run began is a gauge, and log lines and reports carry its id.
Fractions (busy, waiting, padding) are left to the query, which can take them over any time:
see infra/observability.
"""

import logging
from collections.abc import Callable
from typing import Any

from bge_ray.report.facts import Receipt, RunFacts

logger = logging.getLogger(__name__)

COUNTERS = {
    "rows": "rows that were done: passages embedded, queries answered, pairs scored",
    "rejected_rows": "rows that were rejected, by reason",
    "tokens": "tokens of the texts that were encoded, special tokens included",
    "padded_tokens": "tokens computed, padding included",
    "truncated_rows": "texts that were cut at model.max_length",
    "bytes_in": "bytes of text, in UTF-8",
    "bytes_out": "bytes of files written",
    "units": "work units finished",
    "failed_units": "work units given up; the next run does them",
    "device_busy_seconds": "seconds that models computed, summed over encoders or rerankers",
    "queue_wait_seconds": "seconds that encoders waited for a unit, their first apart",
}
GAUGES = {
    "units_left": "work units of this run still to do",
    "encoders": "encoders or rerankers of this run",
    "run_started_seconds": "when the run began, in Unix seconds; its report tells its id",
}
PREFIX = "bge_"
# Not `job`: Prometheus gives that label to what it scrapes, and would rename ours.
TAGS = ("bge_job",)


class Telemetry:
    """The metrics of one run, under its job."""

    def __init__(self, job: str) -> None:
        """Register the metrics; Ray must be connected."""
        self._tags = {"bge_job": job}
        self._metrics: dict[str, Any] = {}
        self._units_left = 0
        self._given_up = False
        self._attempt(self._register)

    def start(self, facts: RunFacts) -> None:
        """Say when the run began, how much there is to do, and by how many."""
        self._units_left = facts.units_planned
        self._set("run_started_seconds", facts.started)
        self._set("encoders", facts.workers.models)
        self._set("units_left", facts.units_planned)

    def finish_unit(self, receipt: Receipt, units: int = 1) -> None:
        """Count a finished unit, or some that were done together."""
        for name, amount in _amounts(receipt).items():
            self._count(name, amount)
        for reason, rows in receipt.reasons.items():
            self._count("rejected_rows", rows, reason=reason)
        self._end_units("units", units)

    def fail_unit(self) -> None:
        """Count a unit that was given up."""
        self._end_units("failed_units", 1)

    def _end_units(self, counter: str, units: int) -> None:
        self._count(counter, units)
        self._units_left -= units
        self._set("units_left", self._units_left)

    def _register(self) -> None:
        from ray.util.metrics import Counter, Gauge

        for kind, names in ((Counter, COUNTERS), (Gauge, GAUGES)):
            for name, meaning in names.items():
                tags = (*TAGS, "reason") if name == "rejected_rows" else TAGS
                metric = kind(f"{PREFIX}{name}", description=meaning, tag_keys=tags)
                self._metrics[name] = metric.set_default_tags(self._tags)

    def _count(self, name: str, amount: float, **tags: str) -> None:
        def count() -> None:
            if amount > 0:  # Ray refuses zero
                self._metrics[name].inc(amount, tags=tags)

        self._attempt(count)

    def _set(self, name: str, amount: float) -> None:
        self._attempt(lambda: self._metrics[name].set(amount))

    def _attempt(self, operation: Callable[[], None]) -> None:
        if self._given_up:
            return
        try:
            operation()
        except Exception as error:  # noqa: BLE001 - whatever it is, the run is worth more than its metrics
            self._given_up = True
            logger.warning("no metrics of this run: %s: %s", type(error).__name__, error)


def _amounts(receipt: Receipt) -> dict[str, float]:
    """Return what a unit counts for, by the names of COUNTERS."""
    return {
        "rows": receipt.rows_out,
        "tokens": receipt.tokens_encoded,
        "padded_tokens": receipt.padded_tokens,
        "truncated_rows": receipt.truncated,
        "bytes_in": receipt.bytes_in,
        "bytes_out": receipt.bytes_out,
        "device_busy_seconds": receipt.device_s,
        "queue_wait_seconds": receipt.waited_s,
    }
