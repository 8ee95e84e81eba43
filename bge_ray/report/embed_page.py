"""The page of an embed run: what happened, what it cost, where the time went, what to change next."""

from typing import Any

from bge_ray.records.reports import EmbedReport
from bge_ray.report.page import ACCENT, Html, bars, page, paragraph, picture, pictures, section, table, tiles
from bge_ray.report.sections import (
    Figure,
    advice_section,
    cost_rows,
    device_name,
    failures_section,
    left_out,
    left_out_figure,
    phase_bars,
    price_figure,
    run_section,
    stage_bars,
    throughput_picture,
    wall_figure,
)
from bge_ray.report.words import count, duration, short, size

STAGES = ("read", "tokenise", "encode", "write")
_ORIGINS = {
    "object": "from earlier versions or copies of their files",
    "corpus": "from other files of the data set",
    "repeated": "from the same text elsewhere in this run",
}
SHARES = (0.5, 0.9, 0.99)
_KINDS = {
    "dense": "one vector",
    "sparse": "token weights",
    "multi": "one vector a token",
    "scalar": "one number",
}


def embed_page(report: EmbedReport) -> bytes:
    """Return the page of a run."""
    parts = [
        tiles(_figures(report)),
        advice_section(report),
        failures_section(report),
        section(
            "Rows", paragraph(_accounts(report)), *_reused(report), *_removed(report), *_left_out(report)
        ),
        section("Outputs", paragraph("Before compression:"), table(_outputs(report))),
        section("Cost", table(_cost(report))),
        section("Where the time went", *_time(report)),
        section("Texts", paragraph(_lengths(report)), pictures(*_drawn(report))),
        run_section(report, _identity(report)),
    ]
    return page("Embedding run", "good" if report.complete else "bad", report.outcome, parts)


def _figures(report: EmbedReport) -> list[Figure]:
    busy = f"{count(report.workers.get('encoders', 0), 'encoder')}, waiting {report.waiting:.0%}"
    return [
        ("Rows embedded", f"{report.rows_out:,}", f"of {report.rows_planned:,} to do"),
        wall_figure(report),
        left_out_figure(report, report.rows_rejected),
        ("Tokens encoded", short(report.tokens_encoded), f"{short(report.tokens_per_s)} a second"),
        ("Encoders busy", f"{report.utilisation:.0%}", busy),
        price_figure(report),
    ]


def _accounts(report: EmbedReport) -> str:
    units = f"{report.units_done:,} of {report.units_planned:,} planned units"
    return (
        f"{report.rows_in:,} in = {report.rows_out:,} embedded + {report.rows_rejected:,} rejected, "
        f"in {units}. "
        f"{size(report.bytes_in)} of text in, {size(report.bytes_out)} of Parquet out."
    )


def _outputs(report: EmbedReport) -> list[tuple[str, str]]:
    """Return each output, what it is, and what a row of it takes if this run did any."""
    told = []
    for output in report.model.outputs:
        size = report.output_bytes.get(output.name)
        each = f"{size:,.0f} bytes a row" if size is not None else "no row in this run"
        told.append((output.name, f"{_KINDS[output.kind]}, {output.dtype}, {each}"))
    return told


def _reused(report: EmbedReport) -> list[Html]:
    if not report.vectors_reused:
        return []
    sources = ", ".join(f"{n:,} {_ORIGINS[origin]}" for origin, n in report.vectors_reused.items())
    saved = f" They would have cost about {report.cost_saved:,.2f}." if report.cost_saved is not None else ""
    return [
        paragraph(
            f"Of {report.rows_reused:,} rows nothing was encoded: their texts had vectors. Taken over: "
            f"{sources}; with {report.tokens_reused:,} tokens, beside {report.tokens_encoded:,} that were "
            f"encoded.{saved}"
        )
    ]


def _removed(report: EmbedReport) -> list[Html]:
    if not report.objects_removed:
        return []
    told = (
        f"{count(report.objects_removed, 'object')} with {report.rows_removed:,} rows left the corpus, and "
        "with this run the data set:"
    )
    more = report.objects_removed - len(report.removed_uris)
    names = [*report.removed_uris, *([f"and {more:,} more"] if more else [])]
    return [paragraph(told), *(paragraph(name) for name in names)]


def _left_out(report: EmbedReport) -> list[Html]:
    return left_out(report, report.corpus, f"{report.output}/rejected")


def _cost(report: EmbedReport) -> list[tuple[str, str]]:
    per_device = report.tokens_per_s / report.devices if report.devices else 0.0
    speed = (
        f"{report.tokens_per_s:,.0f} tokens/s and {report.rows_per_s:,.1f} rows/s while encoding, "
        f"{per_device:,.0f} tokens/s a {device_name(report)}"
    )
    return [*cost_rows(report), ("Speed", speed)]


def _time(report: EmbedReport) -> list[Html]:
    encoders = report.workers.get("encoders", 0)
    encoder_s = report.steady_s * encoders
    if not encoder_s:
        return [phase_bars(report)]
    busy, waiting = report.utilisation * encoder_s, report.waiting * encoder_s
    other = max(0.0, encoder_s - busy - waiting)
    told = [
        ("computing", busy, duration(busy)),
        ("waiting", waiting, f"{duration(waiting)} for a unit to be read and tokenised"),
        ("other", other, f"{duration(other)}: handing units over, and idle at the beginning and the end"),
    ]
    readers, writers = report.workers.get("readers", 0), report.workers.get("writers", 0)
    slots = {"encode": encoders, "write": writers}
    stages = [
        (stage, report.stage_s[stage], f" by up to {slots.get(stage, readers)} at once")
        for stage in STAGES
        if stage in report.stage_s
    ]
    return [
        phase_bars(report),
        paragraph(f"The {count(encoders, 'encoder')}, while encoding:"),
        bars(told),
        *stage_bars(stages, "All stages, summed over their tasks:"),
    ]


def _lengths(report: EmbedReport) -> str:
    edges, counts = report.lengths.upper_edges, report.lengths.counts
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
    cut = report.truncated / report.rows_out if report.rows_out else 0.0
    return (
        f"{report.tokens / max(1, report.rows_out):,.0f} tokens a text on average; {', '.join(limits)}."
        f" {report.truncated:,} texts ({cut:.1%}) were cut at {report.model.max_length:,} tokens. "
        f"{report.padding_waste:.1%} of the tokens computed were padding."
    )


def _drawn(report: EmbedReport) -> list[Html]:
    edges, counts = report.lengths.upper_edges, report.lengths.counts
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
    drawn.append(throughput_picture(report.throughput.tokens_per_s, report.throughput.bin_s, "tokens/s"))
    return drawn


def _identity(report: EmbedReport) -> list[tuple[str, str]]:
    model = report.model
    words = f"{model.name}, {model.dtype}, {model.pooling} pooling, {model.max_length:,} tokens"
    return [
        ("Corpus", report.corpus),
        ("Data set", f"{report.output}, plan {report.plan}"),
        ("Model", words),
        *([("Tokenizer", report.tokenizer)] if report.tokenizer else []),
        ("Data set fingerprint", report.vector_fingerprint),
    ]
