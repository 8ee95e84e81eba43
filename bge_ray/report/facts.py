"""What a run of any job did, as facts: the driver adds up receipts, `summarise` makes a report of them."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from bge_ray.records.reports import PHASES, Lengths, RejectedRow, Throughput
from bge_ray.report.start import take_start

EXAMPLES_PER_REASON = 5
TIMELINE_BINS = 60
# Of a bin's width.
LEAST_BIN = 1e-6
# Of what a stage notes, seconds that are a part of another stage's.
PARTS_OF_STAGES = ("device_s", "waited_s")
# Stages that a model's actors run: what they note as begun and ended is the work of the run.
MODEL_STAGES = ("encode", "score")


@dataclass(frozen=True)
class Workers:
    """How many actors and tasks each stage had at once; ``model`` is the pool whose time is dear.

    ``devices`` counts GPUs, or the CPU cores that actors compute on: what is paid for by the hour.
    """

    device: str = "cpu"
    devices: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)
    model: str = "encoders"

    @property
    def models(self) -> int:
        """Actors of the pool whose time is dear."""
        return self.counts.get(self.model, 0)


@dataclass(frozen=True)
class Receipt:
    """A finished unit of any job, in the words that all jobs share; see `read_receipt`."""

    rows: int
    rows_out: int
    reasons: Mapping[str, int]
    examples: tuple[RejectedRow, ...]
    tokens: int
    tokens_encoded: int
    padded_tokens: int
    truncated: int
    bytes_in: int
    bytes_out: int
    memory_splits: int
    device_s: float
    waited_s: float
    stage_s: Mapping[str, float]
    began: float | None
    ended: float | None
    lengths: tuple[int, ...]
    counts: Mapping[str, int]


def read_receipt(rows: int, noted: Mapping[str, Any]) -> Receipt:
    """Return a finished unit as all jobs count it.

    Args:
        rows: what was planned of it.
        noted: what its stages noted, as they are: ``<stage>_s`` are seconds, ``<stage>_started`` and
            ``<stage>_ended`` moments, ``<stage>_queued`` seconds between them in which the device was another
            unit's, ``written`` the last moment; tokens, padded_tokens, truncated (or
            query_tokens, pair_tokens, truncated_queries, truncated_pairs), text_bytes, bytes_out,
            memory_splits, lengths, device_s, waited_s; rows_out, reasons, rejected_examples, without which
            every row came out; tokens_encoded, without which all tokens were. Other whole numbers are counted
            by their own names.
    """
    reasons = dict(noted.get("reasons", {}))
    queries, pairs = noted.get("query_tokens", 0), noted.get("pair_tokens", 0)
    begun = [noted[f"{stage}_started"] for stage in MODEL_STAGES if f"{stage}_started" in noted]
    ended = [noted[f"{stage}_ended"] for stage in MODEL_STAGES if f"{stage}_ended" in noted]
    written = noted.get("written")
    stage_s = {
        name.removesuffix("_s"): float(seconds)
        for name, seconds in noted.items()
        if name.endswith("_s") and name not in PARTS_OF_STAGES
    }
    for stage in MODEL_STAGES:
        if f"{stage}_ended" in noted:
            spent = noted[f"{stage}_ended"] - noted[f"{stage}_started"]
            # Units overlap in an actor; while one waits for the device, the time is another's.
            stage_s[stage] = spent - noted.get(f"{stage}_queued", 0.0)
    tokens = noted.get("tokens", 0) + queries + pairs
    return Receipt(
        rows=rows,
        rows_out=noted.get("rows_out", rows - sum(reasons.values())),
        reasons=reasons,
        examples=tuple(RejectedRow(**example) for example in noted.get("rejected_examples", ())),
        tokens=tokens,
        tokens_encoded=noted.get("tokens_encoded", tokens),
        # A reranker notes the padding of its pairs in the place of that of the queries before them.
        padded_tokens=noted.get("padded_tokens", 0) + (queries if "score_ended" in noted else 0),
        truncated=sum(noted.get(name, 0) for name in ("truncated", "truncated_queries", "truncated_pairs")),
        bytes_in=noted.get("text_bytes", 0),
        bytes_out=noted.get("bytes_out", 0),
        memory_splits=noted.get("memory_splits", 0),
        device_s=noted.get("device_s", 0.0),
        waited_s=noted.get("waited_s", 0.0),
        stage_s=stage_s,
        began=min(begun, default=written),
        ended=max(ended, default=written),
        lengths=tuple(noted.get("lengths", ())),
        counts={name: value for name, value in noted.items() if type(value) is int},
    )


@dataclass(frozen=True)
class Moment:
    """When a unit was at work, how long a model computed, for how many tokens, and how many rows it has."""

    began: float
    ended: float
    device_s: float
    tokens: int
    rows: int


@dataclass
class RunFacts:
    """What the driver adds up while a run goes on; moments are Unix seconds.

    ``started`` counts from the process where a command runs the job (see `take_start`), ``entered`` is when
    the job itself began.
    """

    job: str
    run_id: str = ""
    started: float = field(default_factory=take_start)
    entered: float = field(default_factory=time.time)
    pipeline_started: float | None = None
    workers: Workers = Workers()
    units_planned: int = 0
    rows_planned: int = 0
    units_done: int = 0
    rows_in: int = 0
    rows_out: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[RejectedRow] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    tokens: int = 0
    tokens_encoded: int = 0
    padded_tokens: int = 0
    truncated: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    memory_splits: int = 0
    device_s: float = 0.0
    waited_s: float = 0.0
    stage_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter[str] = field(default_factory=Counter)
    first_work: float | None = None
    last_work: float | None = None
    lengths: list[int] = field(default_factory=list)
    length_edges: tuple[int, ...] = ()
    timeline: list[Moment] = field(default_factory=list)

    @property
    def rows_rejected(self) -> int:
        """Rows left out so far."""
        return sum(self.reasons.values())

    @property
    def steady_s(self) -> float:
        """Seconds from the first work to the last, start-up and wind-down apart."""
        if self.first_work is None or self.last_work is None:
            return 0.0
        return self.last_work - self.first_work

    def plan(self, *, units: int, rows: int) -> None:
        """Say how much there is to do."""
        self.units_planned, self.rows_planned = units, rows

    def start(self, workers: Workers, now: float) -> None:
        """Say by whom it is done; what came before was planning."""
        self.workers, self.pipeline_started = workers, now

    def book(self, receipt: Receipt, units: int = 1) -> None:
        """Add a finished unit, or some that were done together."""
        self.units_done += units
        self.rows_in += receipt.rows
        self.rows_out += receipt.rows_out
        self.tokens += receipt.tokens
        self.tokens_encoded += receipt.tokens_encoded
        self.padded_tokens += receipt.padded_tokens
        self.truncated += receipt.truncated
        self.bytes_in += receipt.bytes_in
        self.bytes_out += receipt.bytes_out
        self.memory_splits += receipt.memory_splits
        self.device_s += receipt.device_s
        self.waited_s += receipt.waited_s
        for stage, seconds in receipt.stage_s.items():
            self.stage_s[stage] += seconds
        self.counts.update(receipt.counts)
        self.book_rejected(receipt.reasons, receipt.examples)
        if receipt.lengths:
            so_far = self.lengths or [0] * len(receipt.lengths)
            self.lengths = [a + b for a, b in zip(so_far, receipt.lengths, strict=True)]
        if receipt.began is not None and receipt.ended is not None:
            self.mark_work(receipt.began, receipt.ended)
            times = (receipt.began, receipt.ended, receipt.device_s)
            self.timeline.append(Moment(*times, receipt.tokens_encoded, receipt.rows))

    def mark_work(self, began: float, ended: float) -> None:
        """Widen the time of work to a span."""
        self.first_work = began if self.first_work is None else min(self.first_work, began)
        self.last_work = ended if self.last_work is None else max(self.last_work, ended)

    def book_step(self, name: str, planned: int, done: int, span: tuple[float, float]) -> None:
        """Add a step of a job that goes step by step: its tasks as units, its time as a stage."""
        self.units_planned += planned
        self.units_done += done
        self.stage_s[name] += span[1] - span[0]
        self.mark_work(*span)

    def book_rejected(self, reasons: Mapping[str, int], examples: Iterable[RejectedRow]) -> None:
        """Add rows that were left out; a few examples of each reason are kept."""
        self.reasons.update(reasons)
        shown = Counter(example.reason for example in self.examples)
        for example in examples:
            if shown[example.reason] < EXAMPLES_PER_REASON:
                shown[example.reason] += 1
                self.examples.append(example)

    def book_failure(self, failure: str, units: int = 1) -> None:
        """Add units that were given up, all for one cause."""
        self.failures += [failure] * units


class Summary(TypedDict):
    """The part of `records.reports.Report` that follows from the facts."""

    job: str
    run_id: str
    started: float
    wall_s: float
    startup_s: float
    steady_s: float
    phase_s: dict[str, float]
    stage_s: dict[str, float]
    units_planned: int
    units_done: int
    rows_planned: int
    rows_in: int
    rows_out: int
    rows_rejected: int
    rejected_reasons: dict[str, int]
    rejected_examples: tuple[RejectedRow, ...]
    failures: tuple[str, ...]
    bytes_in: int
    bytes_out: int
    tokens: int
    truncated: int
    padding_waste: float
    memory_splits: int
    rows_per_s: float
    tokens_per_s: float
    device: str
    devices: float
    workers: dict[str, int]
    utilisation: float
    waiting: float
    device_hours: float
    price_per_hour: float | None
    cost: float | None
    cost_per_million_tokens: float | None
    throughput: Throughput


def summarise(facts: RunFacts, *, ended: float, price_per_hour: float | None) -> Summary:
    """Return what the facts say of a report's fields, to be given to its constructor with ``**``.

    Args:
        facts: what the driver added up.
        ended: Unix seconds.
        price_per_hour: of a device; None if it is not known.
    """
    steady, workers = facts.steady_s, facts.workers
    model_s = steady * workers.models
    hours = workers.devices * (ended - facts.started) / 3600
    cost = None if price_per_hour is None else price_per_hour * hours
    return Summary(
        job=facts.job,
        run_id=facts.run_id,
        started=facts.started,
        wall_s=ended - facts.started,
        startup_s=(facts.first_work or ended) - facts.started,
        steady_s=steady,
        phase_s=_phases(facts, ended),
        stage_s=dict(facts.stage_s),
        units_planned=facts.units_planned,
        units_done=facts.units_done,
        rows_planned=facts.rows_planned,
        rows_in=facts.rows_in,
        rows_out=facts.rows_out,
        rows_rejected=facts.rows_rejected,
        rejected_reasons=dict(sorted(facts.reasons.items())),
        rejected_examples=tuple(facts.examples),
        failures=tuple(facts.failures),
        bytes_in=facts.bytes_in,
        bytes_out=facts.bytes_out,
        tokens=facts.tokens,
        truncated=facts.truncated,
        padding_waste=1 - facts.tokens_encoded / facts.padded_tokens if facts.padded_tokens else 0.0,
        memory_splits=facts.memory_splits,
        rows_per_s=facts.rows_out / steady if steady else 0.0,
        tokens_per_s=facts.tokens_encoded / steady if steady else 0.0,
        device=workers.device,
        devices=workers.devices,
        workers=dict(workers.counts),
        utilisation=facts.device_s / model_s if model_s else 0.0,
        waiting=facts.waited_s / model_s if model_s else 0.0,
        device_hours=hours,
        price_per_hour=price_per_hour,
        cost=cost,
        cost_per_million_tokens=(
            cost / facts.tokens_encoded * 1e6 if cost is not None and facts.tokens_encoded else None
        ),
        throughput=_throughput(facts),
    )


def cost_saved(facts: RunFacts, tokens: int, price_per_hour: float | None) -> float | None:
    """Return what devices would have cost to encode more tokens, at the rate at which they computed.

    None without a price, or if nothing was encoded.
    """
    if price_per_hour is None or not facts.tokens_encoded or not facts.workers.models:
        return None
    device_s = facts.device_s * tokens / facts.tokens_encoded * facts.workers.devices / facts.workers.models
    return price_per_hour * device_s / 3600


def text_lengths(facts: RunFacts) -> Lengths:
    """Return how long the texts of a run are."""
    return Lengths(tuple(facts.length_edges), tuple(facts.lengths))


def _phases(facts: RunFacts, ended: float) -> dict[str, float]:
    """Split the run's time; the phases follow each other and add up to all of it."""
    entered = max(facts.started, facts.entered)
    planned = max(entered, facts.pipeline_started or facts.first_work or ended)
    at_work = max(planned, facts.first_work or ended)
    worked = max(at_work, facts.last_work or ended)
    moments = (facts.started, entered, planned, at_work, worked, ended)
    return {name: moments[k + 1] - moments[k] for k, name in enumerate(PHASES)}


def _throughput(facts: RunFacts) -> Throughput:
    """Return rates over the run in equal bins; what a unit came to is spread over the time it took."""
    if not facts.timeline:
        return Throughput()
    width = max(max(unit.ended for unit in facts.timeline) - facts.started, 1.0) / TIMELINE_BINS
    tokens, rows = [0.0] * TIMELINE_BINS, [0.0] * TIMELINE_BINS
    for unit in facts.timeline:
        first, last = (unit.began - facts.started) / width, (unit.ended - facts.started) / width
        # A unit of no length lies in one bin, the last one at most.
        first = min(first, TIMELINE_BINS - LEAST_BIN)
        last = max(last, first + LEAST_BIN)
        for k in range(max(0, int(first)), min(TIMELINE_BINS, int(last) + 1)):
            share = max(0.0, min(last, k + 1) - max(first, k)) / (last - first)
            tokens[k] += unit.tokens * share
            rows[k] += unit.rows * share
    return Throughput(width, tuple(t / width for t in tokens), tuple(r / width for r in rows))
