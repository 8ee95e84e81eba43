"""What a run did, as facts (`report.json`) and as a page (`report.html`); it reads no storage."""

import html
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

FORMAT_VERSION = 1
PICTURE_BINS = 60


@dataclass
class RunFacts:
    """What the driver adds up from receipts while a run goes on; times are Unix seconds."""

    started: float
    num_encoders: int = 0
    units_planned: int = 0
    units_done: int = 0
    rows_in: int = 0
    rows_out: int = 0
    rows_rejected: int = 0
    tokens: int = 0
    truncated: int = 0
    padded_tokens: int = 0
    bytes_out: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    stage_s: Counter[str] = field(default_factory=Counter)
    device_s: float = 0.0
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
        self.reasons.update(marker["reasons"])
        self.bytes_out += sum(f["bytes"] for f in (marker["embeddings"], marker["rejected"]) if f)
        self.padded_tokens += facts["padded_tokens"]
        self.device_s += facts["device_s"]
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


def make_report(facts: RunFacts, *, ended: float, outcome: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a run as JSON-able facts.

    Args:
        facts: what the driver added up.
        ended: Unix seconds.
        outcome: one line, what the run came to.
        extra: facts about data set, settings and price that the caller knows.
    """
    steady = facts.steady_s
    price = extra.get("price_per_hour")
    hours = facts.num_encoders * (ended - facts.started) / 3600
    cost = None if price is None else price * hours
    return {
        "format_version": FORMAT_VERSION,
        "outcome": outcome,
        "started": facts.started,
        "wall_s": ended - facts.started,
        "startup_s": (facts.first_encode or ended) - facts.started,
        "steady_s": steady,
        "units_planned": facts.units_planned,
        "units_done": facts.units_done,
        "rows_in": facts.rows_in,
        "rows_out": facts.rows_out,
        "rows_rejected": facts.rows_rejected,
        "rejected_reasons": dict(sorted(facts.reasons.items())),
        "failures": facts.failures,
        "tokens": facts.tokens,
        "truncated": facts.truncated,
        "padding_waste": 1 - facts.tokens / facts.padded_tokens if facts.padded_tokens else 0.0,
        "bytes_out": facts.bytes_out,
        "rows_per_s": facts.rows_out / steady if steady else 0.0,
        "tokens_per_s": facts.tokens / steady if steady else 0.0,
        "num_encoders": facts.num_encoders,
        "utilisation": facts.device_s / (steady * facts.num_encoders)
        if steady and facts.num_encoders
        else 0.0,
        "stage_s": dict(sorted(facts.stage_s.items())),
        "device_hours": hours,
        "cost": cost,
        "cost_per_million_tokens": cost / facts.tokens * 1e6 if cost is not None and facts.tokens else None,
        "lengths": {"upper_edges": list(facts.length_edges), "counts": facts.lengths},
        **extra,
    }


def report_json(report: dict[str, Any]) -> bytes:
    """Return the report as JSON text."""
    return (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode()


def report_html(report: dict[str, Any], facts: RunFacts) -> bytes:
    """Return the report as one page that needs no other file."""
    rows = [
        ("Outcome", report["outcome"]),
        (
            "Rows",
            f"{report['rows_in']:,} in = {report['rows_out']:,} out + {report['rows_rejected']:,} rejected",
        ),
        ("Tokens", f"{report['tokens']:,}, {report['truncated']:,} texts truncated"),
        ("Units", f"{report['units_done']:,} of {report['units_planned']:,} planned"),
        (
            "Rate",
            f"{report['tokens_per_s']:,.0f} tokens/s, {report['rows_per_s']:,.0f} rows/s "
            f"for {report['steady_s']:,.1f} s",
        ),
        ("Start-up", f"{report['startup_s']:,.1f} s of {report['wall_s']:,.1f} s"),
        ("Encoders", f"{report['num_encoders']}, busy {report['utilisation']:.0%} of the steady time"),
        ("Padding", f"{report['padding_waste']:.1%} of the tokens computed"),
        ("Written", f"{report['bytes_out'] / 1e6:,.1f} MB"),
        ("Cost", _cost(report)),
        (
            "Model",
            f"{report['model']['name']}, {report['model']['dtype']}, {report['model']['pooling']} pooling",
        ),
        ("Data set", report["output"]),
    ]
    table = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    reasons = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{v:,}</td></tr>" for k, v in report["rejected_reasons"].items()
    )
    failures = "".join(f"<li>{html.escape(line)}</li>" for line in report["failures"][:50])
    advice = "".join(f"<li>{html.escape(line)}</li>" for line in advise(report))
    page = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>bge-ray embed report</title>",
        f"<style>{_STYLE}</style><h1>Embedding run</h1><table>{table}</table>",
        f"<h2>What to change next</h2><ul>{advice}</ul>" if advice else "",
        f"<h2>Failures</h2><ul>{failures}</ul>" if failures else "",
        f"<h2>Rejected rows by reason</h2><table>{reasons}</table>" if reasons else "",
    ]
    if facts.units_done:
        page += [f"<figure>{picture}</figure>" for picture in _pictures(facts)]
    return "".join(page).encode()


def advise(report: dict[str, Any]) -> list[str]:
    """Return what the figures suggest to change, most valuable first."""
    advice = []
    if report["steady_s"] > 60 and report["utilisation"] < 0.8:
        advice.append(
            f"The encoders worked {report['utilisation']:.0%} of the time: raise resources.num_readers, "
            "or add CPUs."
        )
    if report["padding_waste"] > 0.1:
        advice.append(
            f"{report['padding_waste']:.0%} of the computed tokens were padding: larger units sort better."
        )
    if report["rows_out"] and report["truncated"] > 0.2 * report["rows_out"]:
        share = report["truncated"] / report["rows_out"]
        advice.append(
            f"{share:.0%} of the texts were cut at {report['model']['max_length']} tokens: split them first."
        )
    if report["wall_s"] > 120 and report["startup_s"] > 0.5 * report["wall_s"]:
        advice.append("More than half of the time was start-up: keep the cluster warm or run less often.")
    return advice


def _cost(report: dict[str, Any]) -> str:
    if report["cost"] is None:
        return f"{report['device_hours']:.3f} device hours (set report.gpu_price_per_hour for a price)"
    per_million = report["cost_per_million_tokens"]
    each = f", {per_million:.4f} per million tokens" if per_million is not None else ""
    return f"{report['cost']:.2f} for {report['device_hours']:.3f} device hours{each}"


def _pictures(facts: RunFacts) -> list[str]:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt
    import numpy as np

    pictures = []

    def draw(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
        figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        return figure, axes

    def finish(figure: Any) -> None:
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
        plt.close(figure)
        pictures.append(sink.getvalue()[sink.getvalue().index("<svg") :])

    figure, axes = draw("Passage lengths", "tokens, special tokens included", "passages")
    counts = facts.lengths[: len(facts.length_edges)]
    filled = [i for i, c in enumerate(counts) if c] or [0]
    low, high = max(0, filled[0] - 1), filled[-1] + 2
    axes.bar([str(e) for e in facts.length_edges[low:high]], counts[low:high], color=_BLUE)
    axes.set_xlabel("tokens, up to")
    axes.tick_params(axis="x", rotation=45)
    finish(figure)

    figure, axes = draw("Throughput", "seconds since the start", "tokens/s")
    spans = np.array(
        [(begun - facts.started, ended - facts.started, tokens) for begun, ended, tokens, _ in facts.timeline]
    )
    edges = np.linspace(0, max(float(spans[:, 1].max()), 1.0), PICTURE_BINS + 1)
    sums = np.zeros(PICTURE_BINS)
    for begun, ended, tokens in spans:  # a unit's tokens are spread over the time it was encoded in
        overlap = np.clip(np.minimum(edges[1:], ended) - np.maximum(edges[:-1], begun), 0, None)
        sums += tokens * overlap / max(ended - begun, 1e-9)
    axes.stairs(sums / np.diff(edges), edges, fill=True, color=_BLUE)
    finish(figure)

    figure, axes = draw("Time per stage, summed over tasks", "seconds", "")
    stages = [s for s in ("read", "tokenise", "encode", "write") if s in facts.stage_s]
    bars = axes.barh(stages[::-1], [facts.stage_s[s] for s in stages[::-1]], color=_BLUE)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    finish(figure)
    return pictures


_BLUE = "#3568a8"
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:46em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}"
    "th{text-align:left;padding:.2em 1.5em .2em 0;font-weight:600;vertical-align:top}"
    "td{padding:.2em 0}figure{margin:1.5em 0}svg{max-width:100%;height:auto}h2{margin-top:1.5em}"
)
