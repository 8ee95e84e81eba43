"""How every report page looks: its frame, its tables and its pictures, all in one file without a script.

Everything that is given as text is escaped here; only what these functions return is taken as HTML.
"""

import html
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NewType, TypeAlias

Html = NewType("Html", str)
Row: TypeAlias = Sequence[str]

# Pictures are drawn in these colours, which then give way to the page's own, light or dark.
INK, ACCENT, ALERT, FAINT = "#010101", "#020202", "#030303", "#040404"
_THEME = {INK: "var(--ink)", ACCENT: "var(--accent)", ALERT: "var(--bad)", FAINT: "var(--muted)"}
PICTURE_INCHES = (5.2, 2.5)


def page(title: str, state: str, lead: str, parts: Iterable[Html]) -> bytes:
    """Return a whole page that needs no other file.

    Args:
        title: its heading.
        state: good, bad or plain; the colour of the lead.
        lead: one sentence, what it came to.
        parts: sections, as the functions here make them.
    """
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        # Nothing may be fetched and nothing may run, whatever text of the corpus ends up in the page.
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none';style-src 'unsafe-inline'\">"
        f"<title>bge-ray: {html.escape(title)}</title><style>{_STYLE}</style></head>"
    )
    top = (
        f"<h1>{html.escape(title)}</h1><p class='lead {state}'>{html.escape(lead[:1].upper() + lead[1:])}</p>"
    )
    return f"{head}<body>{top}{''.join(parts)}</body></html>\n".encode()


def section(title: str, *parts: Html) -> Html:
    """Return parts under a heading; nothing if all of them are empty."""
    body = "".join(parts)
    return Html(f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else "")


def paragraph(text: str) -> Html:
    """Return a paragraph."""
    return Html(f"<p>{html.escape(text)}</p>")


def bullets(lines: Iterable[str]) -> Html:
    """Return a list; nothing if it has no line."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return Html(f"<ul>{items}</ul>" if items else "")


def tiles(figures: Iterable[tuple[str, str, str]]) -> Html:
    """Return the figures that matter most, each as (name, value, remark)."""
    cards = "".join(
        f"<div class='tile'><span>{html.escape(name)}</span><b>{html.escape(value)}</b>"
        f"<span>{html.escape(remark)}</span></div>"
        for name, value, remark in figures
    )
    return Html(f"<div class='tiles'>{cards}</div>")


def table(rows: Iterable[Row], header: Row = ()) -> Html:
    """Return a table whose first column names the rows; nothing if it has no row."""
    body = "".join(
        f"<tr><th scope='row'>{html.escape(first)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return Html(f"<div class='wide'><table>{head}<tbody>{body}</tbody></table></div>" if body else "")


def bars(rows: Iterable[tuple[str, float, str]]) -> Html:
    """Return amounts of one kind, each as (name, amount, remark), with a bar for its share of their sum."""
    rows = list(rows)
    total = sum(amount for _, amount, _ in rows)
    if total <= 0:
        return Html("")
    lines = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd class='bar'><i style='width:{amount / total:.2%}'></i></dd>"
        f"<dd>{amount / total:.0%}</dd><dd class='remark'>{html.escape(remark)}</dd></div>"
        for name, amount, remark in rows
    )
    return Html(f"<dl class='bars'>{lines}</dl>")


def folded(summary: str, *parts: Html) -> Html:
    """Return parts that are hidden until their summary is clicked."""
    return Html(f"<details><summary>{html.escape(summary)}</summary>{''.join(parts)}</details>")


def pictures(*drawn: Html) -> Html:
    """Return pictures side by side where there is room."""
    return Html(f"<div class='pictures'>{''.join(drawn)}</div>" if any(drawn) else "")


def picture(title: str, xlabel: str, ylabel: str, draw: Callable[[Any], None]) -> Html:
    """Return a picture; ``draw`` is given its matplotlib axes and uses the colours of this module."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    # The title makes the names of its clip paths differ from those of the next picture on the page.
    style = dict.fromkeys(inks, INK) | {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}
    with mpl.rc_context(style):
        figure = Figure(figsize=PICTURE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, themed in _THEME.items():
        svg = svg.replace(drawn, themed)
    caption = html.escape(title)
    svg = svg.replace("<svg", f"<svg role='img' aria-label='{caption}'", 1)
    return Html(f"<figure><figcaption>{caption}</figcaption>{svg}</figure>")


_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--muted:#5b6472;--line:#d8dde5;--paper:#fff;--card:#f4f6f9;
--accent:#2f6db3;--good:#1a7a4a;--bad:#b3362c}
@media(prefers-color-scheme:dark){:root{--ink:#e3e7ee;--muted:#9aa5b5;--line:#38414e;--paper:#14181f;
--card:#1e242d;--accent:#6aa6ea;--good:#5cc690;--bad:#f08b80}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:64rem;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0 0 .5rem}h2{font-size:1.15rem;margin:0 0 .6rem}section{margin:2.2rem 0}
p,ul{margin:.5rem 0;max-width:46rem}li{margin:.35rem 0}p,li,th,td{overflow-wrap:anywhere}
.lead{font-size:1.1rem;padding:.6rem .9rem;background:var(--card);border-left:.3rem solid var(--muted)}
.lead.good{border-color:var(--good)}.lead.bad{border-color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:.7rem;margin:1.2rem 0}
.tile{background:var(--card);padding:.6rem .8rem;border-radius:.3rem}
.tile b{display:block;font-size:1.3rem;line-height:1.3}.tile span{color:var(--muted);font-size:.85rem}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.5rem 0}
th,td{text-align:left;vertical-align:top;padding:.3rem 1.1rem .3rem 0;min-width:6rem;
border-bottom:1px solid var(--line)}
th{font-weight:600}tbody th{overflow-wrap:normal}td:nth-child(n+3){min-width:9rem}
thead th{color:var(--muted);font-weight:400}
.bars div{display:grid;grid-template-columns:9rem minmax(4rem,18rem) 3rem 1fr;gap:0 .9rem;padding:.3rem 0;
border-bottom:1px solid var(--line)}
.bars dt{font-weight:600}.bars dd{margin:0;overflow-wrap:anywhere}.bars .bar+dd{text-align:right}
.bars i{display:block;height:.9rem;margin-top:.25rem;min-width:1px;background:var(--accent)}
@media(max-width:40rem){.bars div{grid-template-columns:9rem 1fr 3rem}
.remark{grid-column:1/-1;color:var(--muted)}}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1rem}
figure{margin:0}figcaption{font-weight:600;margin:.4rem 0}svg{display:block;width:100%;height:auto}
svg text{font-family:inherit!important}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--accent)}
"""
