"""What a device told, for people: report.md for documents and terminals, report.html with pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from bge_ray.report.page import ACCENT, ALERT, FAINT, Html, page, paragraph, picture, pictures, section, table

Found: TypeAlias = dict[str, Any]
# A shape is the same sign in every picture.
MARKS = {"base": "o", "large": "s", "small": "^", "m3": "D", "minilm": "v"}
# Of the text on both: a heading, lines of words, the head of a table and its rows.
Block: TypeAlias = tuple[str, list[str], Sequence[str], list[Sequence[str]]]


def write_page(found: Found, folder: Path) -> None:
    """Write report.md and report.html into a folder.

    Args:
        found: the content of device.json; phases may be missing.
        folder: where they go.
    """
    blocks = [block for block in _blocks(found) if block[1] or block[3]]
    (folder / "report.md").write_text("\n".join(_markdown(block) for block in blocks))
    failed = found.get("correctness", {}).get("failed")
    state = "plain" if failed is None else "bad" if failed else "good"
    lead = {
        "plain": "nothing was compared",
        "bad": f"{len(failed or [])} checks do not hold",
        "good": "every check holds",
    }[state]
    drawn = pictures(*_pictures(found))
    parts = [section(title, *map(paragraph, words), table(rows, head)) for title, words, head, rows in blocks]
    (folder / "report.html").write_bytes(page(f"Device: {_name(found)}", state, lead, [drawn, *parts]))


def _name(found: Found) -> str:
    machine = found.get("ceilings", {}).get("machine", {})
    return str(machine.get("gpu") or machine.get("cpu") or "unknown")


def _markdown(block: Block) -> str:
    title, words, head, rows = block
    lines = [f"## {title}", ""]
    for line in words:
        lines += [line, ""]
    if rows:
        lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _blocks(found: Found) -> Iterable[Block]:
    yield _ending(found)
    yield from _ceilings(found.get("ceilings", {}))
    yield _correctness(found.get("correctness", {}))
    yield _loop(found.get("loop", {}))
    yield _profiles(found.get("kernels", {}))
    yield _job(found.get("job", {}))
    yield _peers(found)
    yield _nearest(found.get("nearest", {}))
    yield _big(found.get("big", {}))


def _ending(found: Found) -> Block:
    machine = found.get("ceilings", {}).get("machine", {})
    words = [", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)]
    return (
        "Machine and phases",
        [w for w in words if w],
        ("phase", "ended"),
        [*found.get("ended", {}).items()],
    )


def _ceilings(ceilings: Found) -> Iterable[Block]:
    unit, unit_name = _unit(ceilings)
    rates = [f"{name} {rate / unit:,.1f} {unit_name}" for name, rate in ceilings.get("matrix", {}).items()]
    rates += [f"copies {name} {rate / 1e9:,.0f} GB/s" for name, rate in ceilings.get("copies", {}).items()]
    yield "Ceilings", ["; ".join(rates)] if rates else [], (), []
    shown: list[Sequence[str]] = [
        (p["shape"], f"{p['tokens']:,}", p["product"], f"{p['rate'] / unit:,.1f}")
        for p in ceilings.get("products", [])
    ]
    yield "Products of a layer", [], ("shape", "tokens", "product", unit_name), shown
    attended: list[Sequence[str]] = [
        (str(a["head_dim"]), f"{a['length']:,}", f"{a['rate'] / unit:,.1f}", f"{a['us_a_1000_tokens']:,.1f}")
        for a in ceilings.get("attention", [])
    ]
    eighths: list[Sequence[str]] = [
        (
            e["shape"],
            e["product"],
            *(f"{1e6 * second:,.0f}" for second in e["seconds"].values()),
            f"{e['error']:.3f}",
        )
        for e in ceilings.get("float8", [])
    ]
    head = ("shape", "product", "bfloat16", "float8", "float8 with the cast", "the cast", "error of float8")
    yield "Products in float8, 32,768 tokens, microseconds", [], head, eighths
    yield "Attention, 768 wide", [], ("head_dim", "tokens a row", unit_name, "µs a 1,000 tokens"), attended


def _unit(ceilings: Found) -> tuple[float, str]:
    """Return the unit that shows the rates of this device in figures that one can read."""
    fastest = max(ceilings.get("matrix", {}).values(), default=0.0)
    return (1e12, "TFLOP/s") if fastest > 1e13 else (1e9, "GFLOP/s")


def _correctness(found: Found) -> Block:
    rows: list[Sequence[str]] = []
    for name, check in found.get("checks", {}).items():
        if "left_out" in check:
            rows.append((name, "left out", check["left_out"], ""))
        elif "error" in check:
            rows.append((name, "BROKE DOWN", check["error"].replace("\n", " ")[:200], ""))
        else:
            state = "holds" if check["holds"] else "DOES NOT HOLD"
            rows.append((name, state, f"{check['worst']:.2g}", f"{check['most']:.2g}"))
    return "Correctness", [], ("check", "", "worst", "at most"), rows


def _loop(found: Found) -> Block:
    words = (
        [f"Shares are of {found['matrix'] / 1e9:,.0f} GFLOP/s, measured in the same process."]
        if found
        else []
    )
    if found.get("left_out"):
        words.append(f"Left out for want of time: {', '.join(found['left_out'])}.")
    rows: list[Sequence[str]] = [
        (
            r["shape"],
            r["lengths"],
            f"{r['budget']:,}",
            r["kernels"],
            f"{r['tokens_per_s']:,.0f}",
            f"{r['share']:.1%}",
            f"{r['ms_a_batch']:.2f}",
            f"{r['spread']:.0%}",
            f"{r['peak_bytes'] / 1e9:.1f}" if r["peak_bytes"] else "",
        )
        for r in found.get("rows", [])
    ]
    head = ("shape", "lengths", "budget", "kernels", "tokens/s", "share", "ms a batch", "spread", "peak GB")
    return "Bare loop", words, head, rows


def _profiles(found: Found) -> Block:
    rows: list[Sequence[str]] = []
    for p in found.get("profiles", []):
        parts = sorted(p["ms_by_class"].items(), key=lambda entry: -entry[1])
        rows.append(
            (
                p["shape"],
                p["lengths"],
                p["kernels"],
                f"{p['launches_a_batch']:.0f}",
                f"{p['launches_a_batch'] / p['layers']:.1f}",
                f"{p['busy']:.0%}",
                ", ".join(f"{name} {ms:.2f}" for name, ms in parts),
            )
        )
    head = ("shape", "lengths", "kernels", "launches a batch", "by layers", "busy", "ms a batch")
    return "Where a batch spends its time", [], head, rows


def _job(found: Found) -> Block:
    loop = found.get("loop", {}).get("tokens_per_s")
    words = [f"The same units without Ray: {loop:,.0f} tokens/s."] if loop else []
    rows: list[Sequence[str]] = []
    for name, run in found.get("runs", {}).items():
        if "steady_tokens_per_s" not in run:
            rows.append(
                (name, run.get("left_out") or run.get("error", "")[-200:].replace("\n", " "), "", "", "", "")
            )
            continue
        rate = run["steady_tokens_per_s"]
        rows.append(
            (
                name,
                f"{rate:,.0f}",
                f"{rate / loop:.2f}" if loop else "",
                f"{run['utilisation']:.1%}",
                f"{run['waiting']:.1%}",
                f"{run['wall_s']:.0f} s, {run['startup_s']:.0f} s of it start-up",
            )
        )
    return "The job", words, ("run", "tokens/s", "of the loop", "busy", "waiting", "wall"), rows


def _peers(found: Found) -> Block:
    loop = found.get("job", {}).get("loop", {}).get("tokens_per_s")
    rows: list[Sequence[str]] = []
    for name, way in found.get("peers", {}).get("ways", {}).items():
        if "tokens_per_s" not in way:
            rows.append((name, way["left_out"].replace("\n", " ")[:160], ""))
            continue
        times = f"{loop / way['tokens_per_s']:.2f}" if loop else ""
        rows.append((name, f"{way['tokens_per_s']:,.0f}", times))
    return "sentence-transformers", [], ("way", "tokens/s", "our loop is faster by"), rows


def _nearest(found: Found) -> Block:
    rows: list[Sequence[str]] = [
        (name, ", ".join(f"{key} {_short(value)}" for key, value in facts.items() if value is not None))
        for name, facts in found.items()
        if isinstance(facts, dict)
    ]
    return "Index: nearest centroids and k-means", [], ("", ""), rows


def _big(found: Found) -> Block:
    rows: list[Sequence[str]] = []
    for r in found.get("rows", []):
        name = (r["lengths"], f"{r['budget']:,}")
        if "left_out" in r:
            rows.append((*name, r["left_out"], "", ""))
            continue
        peak = f"{r['peak_bytes'] / 1e9:.1f}" if r["peak_bytes"] else ""
        rows.append((*name, f"{r['tokens_per_s']:,.0f}", f"{r['share']:.1%}", peak))
    words = []
    if "loaded_s" in found:
        model = found["model"]
        words.append(
            f"{model['parameters'] / 1e9:.2f} billion parameters in {model['dtype']}, loaded in "
            f"{found['loaded_s']:.1f} s."
        )
    if "shared" in found:
        s = found["shared"]
        words.append(
            f"Rows of {s['alike'] + s['others']:.0f} tokens that begin with the same {s['alike']:.0f}: "
            f"{s['rows_per_s']:,.1f} rows/s each for itself, {s['shared_rows_per_s']:,.1f} shared."
        )
    return "An LLM embedder", words, ("lengths", "budget", "tokens/s", "share", "peak GB"), rows


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.4g}"


def _pictures(found: Found) -> list[Html]:
    drawn = []
    rows = found.get("loop", {}).get("rows", [])
    for mix in sorted({r["lengths"] for r in rows}):
        part = [r for r in rows if r["lengths"] == mix]
        drawn.append(
            picture(f"Share of the matrix rate, tokens a row: {mix}", "token budget", "share", _shares(part))
        )
    profiles = found.get("kernels", {}).get("profiles", [])
    if profiles:
        drawn.append(picture("Milliseconds a batch by class", "ms", "", _classes(profiles)))
    return drawn


def _shares(rows: list[Found]) -> Any:
    def draw(axes: Any) -> None:
        for shape, mark in MARKS.items():
            for kernels, colour in (("plain", FAINT), ("fused", ACCENT)):
                line = sorted(
                    (r["budget"], r["share"]) for r in rows if (r["shape"], r["kernels"]) == (shape, kernels)
                )
                if line:
                    axes.plot(
                        *zip(*line, strict=True), marker=mark, color=colour, label=f"{shape}, {kernels}"
                    )
        axes.axhline(0.6, color=ALERT, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 0.8)
        axes.legend(frameon=False, fontsize=7)

    return draw


def _classes(profiles: list[Found]) -> Any:
    def draw(axes: Any) -> None:
        names = [f"{p['shape']} {p['lengths']} {p['kernels']}" for p in profiles]
        left = [0.0] * len(profiles)
        kinds = sorted({kind for p in profiles for kind in p["ms_by_class"]})
        for number, kind in enumerate(kinds):
            widths = [p["ms_by_class"].get(kind, 0.0) for p in profiles]
            shade = 0.25 + 0.75 * (1 - number / max(1, len(kinds)))
            axes.barh(
                names,
                widths,
                left=left,
                color=ACCENT,
                alpha=shade,
                label=kind,
                edgecolor=FAINT,
                linewidth=0.4,
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_xlim(0, 1.45 * max(left))
        axes.legend(frameon=False, fontsize=6, loc="center right")
        axes.tick_params(axis="y", labelsize=7)

    return draw
