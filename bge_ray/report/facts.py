"""What an embed run did, as facts: the driver adds them up, `report.json` holds them."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bge_ray.report.advice import advise

FORMAT_VERSION = 1
EXAMPLES_PER_REASON = 5
TIMELINE_BINS = 60


@dataclass(frozen=True)
class Workers:
    """How many processes each stage had; ``devices`` counts GPUs, or CPU cores of encoders on CPUs."""

    device: str = "cpu"
    devices: float = 0.0
    encoders: int = 0
    readers: int = 0
    writers: int = 0


@dataclass
class RunFacts:
    """What the driver adds up from receipts while a run goes on; times are Unix seconds."""

    started: float
    run_id: str = ""
    workers: Workers = Workers()
    pipeline_started: float | None = None
    units_planned: int = 0
    rows_planned: int = 0
    units_done: int = 0
    rows_in: int = 0
    rows_out: int = 0
    rows_rejected: int = 0
    tokens: int = 0
    truncated: int = 0
    padded_tokens: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    memory_splits: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    rejected_examples: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stage_s: Counter[str] = field(default_factory=Counter)
    device_s: float = 0.0
    waited_s: float = 0.0
    first_encode: float | None = None
    last_encode: float | None = None
    lengths: list[int] = field(default_factory=list)
    length_edges: tuple[int, ...] = ()
    # Of each unit: when encoding began and ended, its tokens, its rows out.
    timeline: list[tuple[float, float, int, int]] = field(default_factory=list)

    @property
    def steady_s(self) -> float:
        """Seconds from the first passage encoded to the last, start-up and wind-down apart."""
        if self.first_encode is None or self.last_encode is None:
            return 0.0
        return self.last_encode - self.first_encode

    def add_receipt(self, marker: dict[str, Any], facts: dict[str, Any]) -> None:
        """Add a finished unit: its marker and the facts its stages noted."""
        self.units_done += 1
        self.rows_in += marker["unit"]["n_rows"]
        self.rows_out += marker["rows_out"]
        self.rows_rejected += marker["rows_rejected"]
        self.tokens += marker["tokens"]
        self.truncated += marker["truncated"]
        self.bytes_in += facts["text_bytes"]
        self.bytes_out += written_bytes(marker)
        self.padded_tokens += facts["padded_tokens"]
        self.memory_splits += facts["memory_splits"]
        self.device_s += facts["device_s"]
        self.waited_s += facts["waited_s"]
        for stage in ("read_s", "tokenise_s", "write_s"):
            self.stage_s[stage.removesuffix("_s")] += facts[stage]
        self.stage_s["encode"] += facts["encode_ended"] - facts["encode_started"]
        self.first_encode = min(self.first_encode or facts["encode_started"], facts["encode_started"])
        self.last_encode = max(self.last_encode or 0.0, facts["encode_ended"])
        self.lengths = [
            a + b for a, b in zip(self.lengths or [0] * len(facts["lengths"]), facts["lengths"], strict=True)
        ]
        times = (facts["encode_started"], facts["encode_ended"])
        self.timeline.append((*times, marker["tokens"], marker["rows_out"]))
        self._add_rejected(marker["reasons"], facts["rejected_examples"])

    def _add_rejected(self, reasons: dict[str, int], examples: list[dict[str, Any]]) -> None:
        self.reasons.update(reasons)
        shown = Counter(example["reason"] for example in self.rejected_examples)
        for example in examples:
            if shown[example["reason"]] < EXAMPLES_PER_REASON:
                shown[example["reason"]] += 1
                self.rejected_examples.append(example)


def written_bytes(marker: dict[str, Any]) -> int:
    """Return the bytes of the files that a unit's marker vouches for."""
    return sum(f["bytes"] for f in (marker["embeddings"], marker["rejected"]) if f)


def make_report(facts: RunFacts, *, ended: float, outcome: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a run as JSON-able facts.

    Args:
        facts: what the driver added up.
        ended: Unix seconds.
        outcome: one line, what the run came to.
        extra: facts about data set, settings and price that the caller knows.
    """
    steady, workers = facts.steady_s, facts.workers
    encoder_s = steady * workers.encoders
    reader_s = steady * workers.readers
    price = extra.get("price_per_hour")
    hours = workers.devices * (ended - facts.started) / 3600
    cost = None if price is None else price * hours
    report = {
        "format_version": FORMAT_VERSION,
        "run_id": facts.run_id,
        "outcome": outcome,
        "started": facts.started,
        "wall_s": ended - facts.started,
        "startup_s": (facts.first_encode or ended) - facts.started,
        "steady_s": steady,
        "phase_s": _phases(facts, ended),
        "units_planned": facts.units_planned,
        "units_done": facts.units_done,
        "rows_planned": facts.rows_planned,
        "rows_in": facts.rows_in,
        "rows_out": facts.rows_out,
        "rows_rejected": facts.rows_rejected,
        "rejected_reasons": dict(sorted(facts.reasons.items())),
        "rejected_examples": facts.rejected_examples,
        "failures": facts.failures,
        "tokens": facts.tokens,
        "truncated": facts.truncated,
        "padding_waste": 1 - facts.tokens / facts.padded_tokens if facts.padded_tokens else 0.0,
        "memory_splits": facts.memory_splits,
        "bytes_in": facts.bytes_in,
        "bytes_out": facts.bytes_out,
        "rows_per_s": facts.rows_out / steady if steady else 0.0,
        "tokens_per_s": facts.tokens / steady if steady else 0.0,
        "device": workers.device,
        "devices": workers.devices,
        "num_encoders": workers.encoders,
        "num_readers": workers.readers,
        "num_writers": workers.writers,
        "utilisation": facts.device_s / encoder_s if encoder_s else 0.0,
        "waiting": facts.waited_s / encoder_s if encoder_s else 0.0,
        "readers_busy": (facts.stage_s["read"] + facts.stage_s["tokenise"]) / reader_s if reader_s else 0.0,
        "stage_s": dict(sorted(facts.stage_s.items())),
        "device_hours": hours,
        "cost": cost,
        "cost_per_million_tokens": cost / facts.tokens * 1e6 if cost is not None and facts.tokens else None,
        "lengths": {"upper_edges": list(facts.length_edges), "counts": facts.lengths},
        "throughput": _throughput(facts),
        **extra,
    }
    return report | {"advice": advise(report)}


def report_json(report: dict[str, Any]) -> bytes:
    """Return the report as JSON text."""
    return (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode()


def _phases(facts: RunFacts, ended: float) -> dict[str, float]:
    """Split the run's time; the phases follow each other and add up to all of it."""
    planned = facts.pipeline_started or ended
    encoding = max(planned, facts.first_encode or ended)
    encoded = max(encoding, facts.last_encode or ended)
    return {
        "plan": planned - facts.started,
        "start": encoding - planned,
        "encode": encoded - encoding,
        "finish": ended - encoded,
    }


def _throughput(facts: RunFacts) -> dict[str, Any]:
    """Return tokens/s over the run in equal bins; a unit's tokens are spread over the time it took."""
    if not facts.timeline:
        return {"bin_s": 0.0, "tokens_per_s": []}
    width = max(max(ended for _, ended, *_ in facts.timeline) - facts.started, 1.0) / TIMELINE_BINS
    sums = [0.0] * TIMELINE_BINS
    for begun, ended, tokens, _ in facts.timeline:
        first, last = (begun - facts.started) / width, (ended - facts.started) / width
        for k in range(max(0, int(first)), min(TIMELINE_BINS, int(last) + 1)):
            overlap = min(last, k + 1) - max(first, k)
            sums[k] += tokens * overlap / max(last - first, 1e-9)
    return {"bin_s": width, "tokens_per_s": [tokens / width for tokens in sums]}
