"""The page of an embed run: what happened, what it cost, where the time went, what to change next."""

import json
import time
from typing import Any

from bge_ray.report.page import (
    ACCENT,
    Html,
    bars,
    bullets,
    folded,
    page,
    paragraph,
    picture,
    pictures,
    section,
    table,
    tiles,
)
from bge_ray.report.words import count, duration, short, size

MAX_FAILURES = 50
PHASES = {
    "plan": ("planning", "listing and scanning the corpus, resolving the model"),
    "start": ("starting", "workers, loading the model, reading the first unit"),
    "encode": ("encoding", "from the first passage encoded to the last"),
    "finish": ("finishing", "last writes, manifest, sweep"),
}
STAGES = ("read", "tokenise", "encode", "write")
REASONS = {
    "malformed_line": "the line cannot be parsed",
    "null_id": "the id is missing or empty",
    "non_string_id": "the id is neither text nor a whole number",
    "duplicate_id": "the id stands earlier in the same work unit",
    "null_text": "the text is missing",
    "non_string_text": "text or title is not text",
    "empty_text": "nothing but white space",
    "invalid_unicode": "not valid Unicode",
    "non_finite": "the vector holds NaN or infinity",
    "out_of_memory": "the row alone does not fit in memory",
    "killed_worker": "the row ended its process twice",
}
SHARES = (0.5, 0.9, 0.99)


def embed_page(report: dict[str, Any]) -> bytes:
    """Return the page of a run.

    Args:
        report: the content of report.json.
    """
    complete = report["outcome"].startswith("complete")
    parts = [
        tiles(_figures(report)),
        section("What to change next", bullets(report["advice"]) or paragraph(_no_advice(report))),
        section("Not done", *_failures(report)),
        section("Rows", paragraph(_accounts(report)), *_rejected(report)),
        section("Cost", table(_cost(report))),
        section("Where the time went", *_time(report)),
        section("Texts", paragraph(_lengths(report)), pictures(*_drawn(report))),
        section("The run", table(_identity(report)), folded("All settings", _settings(report))),
    ]
    return page("Embedding run", "good" if complete else "bad", report["outcome"], parts)


def _figures(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    price = report["cost_per_million_tokens"]
    return [
        ("Rows embedded", f"{report['rows_out']:,}", f"{report['rows_rejected']:,} rejected"),
        ("Tokens", short(report["tokens"]), f"{short(report['tokens_per_s'])} a second"),
        ("Wall time", duration(report["wall_s"]), f"{duration(report['startup_s'])} of it start-up"),
        (
            "Encoders busy",
            f"{report['utilisation']:.0%}",
            f"{report['num_encoders']} of them, waiting {report['waiting']:.0%}",
        ),
        (
            "Price" if report["cost"] is not None else f"{_device(report)} hours",
            f"{report['cost']:.2f}" if report["cost"] is not None else f"{report['device_hours']:.3f}",
            f"{price:.4f} per million tokens" if price is not None else "no price is set",
        ),
    ]


def _no_advice(report: dict[str, Any]) -> str:
    if not report["units_done"]:
        return "Nothing to say: no unit was done."
    return "Nothing: no figure is beyond what it should be."


def _failures(report: dict[str, Any]) -> list[Html]:
    failures = report["failures"]
    left = report["units_planned"] - report["units_done"]
    if not left and not failures:
        return []
    words = (
        f"{left:,} of {report['units_planned']:,} units, {report['rows_planned'] - report['rows_in']:,} of "
        f"{report['rows_planned']:,} rows. Run the job again: it does these and nothing else."
    )
    more = f"and {len(failures) - MAX_FAILURES:,} more; report.json has all"
    shown = failures[:MAX_FAILURES] + ([more] if len(failures) > MAX_FAILURES else [])
    return [paragraph(words), bullets(shown)]


def _accounts(report: dict[str, Any]) -> str:
    rows_in, out, rejected = (f"{report[key]:,}" for key in ("rows_in", "rows_out", "rows_rejected"))
    units = f"{report['units_done']:,} of {report['units_planned']:,} planned units"
    text, written = size(report["bytes_in"]), size(report["bytes_out"])
    return (
        f"{rows_in} in = {out} embedded + {rejected} rejected, in {units}. {text} of text in, {written} of "
        "Parquet out."
    )


def _rejected(report: dict[str, Any]) -> list[Html]:
    reasons = sorted(report["rejected_reasons"].items(), key=lambda entry: -entry[1])
    counts = bars((reason, rows, _counted(reason, rows)) for reason, rows in reasons)
    # Most corpora are one folder; naming it in every line would hide what differs.
    folder = f"{str(report['corpus']).rstrip('/')}/"
    examples = [
        (e["reason"], str(e["passage_id"]), e["detail"], f"{_below(folder, e['uri'])}, row {e['row']}")
        for e in report["rejected_examples"]
    ]
    shown = table(examples, ("reason", "passage id", "what was wrong", "where"))
    if not shown:
        return [counts]
    words = f"Some of them; {report['output']}/rejected names every one. Rows are counted from 0."
    return [counts, paragraph(words), shown]


def _below(folder: str, uri: str) -> str:
    return uri.removeprefix("file://").removeprefix(folder)


def _counted(reason: str, rows: int) -> str:
    words = count(rows, "row")
    return f"{words}: {REASONS[reason]}" if reason in REASONS else words


def _cost(report: dict[str, Any]) -> list[tuple[str, str]]:
    device = _device(report)
    per_device = report["tokens_per_s"] / report["devices"] if report["devices"] else 0.0
    rows = [
        (
            f"{device} hours",
            f"{report['device_hours']:,.3f}: {report['devices']:g} for {duration(report['wall_s'])}",
        ),
        (
            "Speed",
            f"{report['tokens_per_s']:,.0f} tokens/s and {report['rows_per_s']:,.1f} rows/s while encoding, "
            f"{per_device:,.0f} tokens/s a {device}",
        ),
    ]
    if report["cost"] is None:
        return [*rows, ("Price", f"unknown; report.price_per_hour takes that of a {device} hour")]
    rows.append(("Price", f"{report['cost']:,.4f} at {report['price_per_hour']:g} a {device} hour"))
    if report["cost_per_million_tokens"] is not None:
        rows.append(("Per million tokens", f"{report['cost_per_million_tokens']:,.5f}"))
    return rows


def _time(report: dict[str, Any]) -> list[Html]:
    phases = bars(
        (PHASES[phase][0], seconds, f"{duration(seconds)}: {PHASES[phase][1]}")
        for phase, seconds in report["phase_s"].items()
    )
    encoder_s = report["steady_s"] * report["num_encoders"]
    if not encoder_s:
        return [phases]
    busy, waiting = report["utilisation"] * encoder_s, report["waiting"] * encoder_s
    other = max(0.0, encoder_s - busy - waiting)
    encoders = bars(
        [
            ("computing", busy, duration(busy)),
            ("waiting", waiting, f"{duration(waiting)} for a unit to be read and tokenised"),
            ("other", other, f"{duration(other)}: handing units over, and idle at the beginning and the end"),
        ]
    )
    slots = {"encode": report["num_encoders"], "write": report["num_writers"]}
    stages = bars(
        (stage, seconds, f"{duration(seconds)} by up to {slots.get(stage, report['num_readers'])} at once")
        for stage in STAGES
        if (seconds := report["stage_s"].get(stage)) is not None
    )
    return [
        phases,
        paragraph(f"The {count(report['num_encoders'], 'encoder')}, while encoding:"),
        encoders,
        paragraph("All stages, summed over their tasks:"),
        stages,
    ]


def _lengths(report: dict[str, Any]) -> str:
    edges, counts = report["lengths"]["upper_edges"], report["lengths"]["counts"]
    total = sum(counts)
    if not total:
        return "No text was tokenised."
    limits = []
    for share in SHARES:
        seen, edge = 0, f"more than {edges[-1]:,}"
        for upper, number in zip(edges, counts, strict=False):
            seen += number
            if seen >= share * total:
                edge = f"up to {upper:,}"
                break
        limits.append(f"{share:.0%} of the texts have {edge}")
    cut = report["truncated"] / report["rows_out"] if report["rows_out"] else 0.0
    return (
        f"{report['tokens'] / max(1, report['rows_out']):,.0f} tokens a text on average; {', '.join(limits)}."
        f" {report['truncated']:,} texts ({cut:.1%}) were cut at {report['model']['max_length']:,} tokens. "
        f"{report['padding_waste']:.1%} of the tokens computed were padding."
    )


def _drawn(report: dict[str, Any]) -> list[Html]:
    edges, counts = report["lengths"]["upper_edges"], report["lengths"]["counts"]
    filled = [k for k, number in enumerate(counts) if number]
    drawn = []
    if filled:
        names = [f"{edge:,}" for edge in edges] + ["more"]
        low, high = max(0, filled[0] - 1), min(len(names), filled[-1] + 2)

        def lengths(axes: Any) -> None:
            axes.bar(names[low:high], counts[low:high], color=ACCENT)
            axes.tick_params(axis="x", rotation=60)
            axes.yaxis.set_major_formatter("{x:,.0f}")

        drawn.append(picture("Lengths of texts", "tokens, up to", "texts", lengths))
    rates, width = report["throughput"]["tokens_per_s"], report["throughput"]["bin_s"]
    if rates:

        def throughput(axes: Any) -> None:
            axes.stairs(rates, [k * width for k in range(len(rates) + 1)], fill=True, color=ACCENT)
            axes.yaxis.set_major_formatter("{x:,.0f}")

        drawn.append(picture("Throughput", "seconds since the start", "tokens/s", throughput))
    return drawn


def _identity(report: dict[str, Any]) -> list[tuple[str, str]]:
    model = report["model"]
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(report["started"]))
    return [
        ("Corpus", str(report["corpus"])),
        ("Data set", str(report["output"])),
        (
            "Model",
            f"{model['name']}, {model['dtype']}, {model['pooling']} pooling, {model['max_length']:,} tokens",
        ),
        ("Began", began),
        ("Run", f"{report['run_id']}, plan {report['plan']}"),
        ("Data set fingerprint", report["vector_fingerprint"]),
    ]


def _settings(report: dict[str, Any]) -> Html:
    rows = [
        (f"{name}.{key}", json.dumps(value, ensure_ascii=False))
        for name, keys in report["settings"].items()
        for key, value in keys.items()
    ]
    return table(rows)


def _device(report: dict[str, Any]) -> str:
    return "GPU" if report["device"] == "cuda" else "CPU core"
