"""The pages of real runs in a real browser: nothing is fetched, nothing runs, everything can be read."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bge_ray.errors import RejectedRowsError
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.index.job import build_index
from bge_ray.pipeline.rerank.job import rerank
from bge_ray.pipeline.search.job import search
from bge_ray.settings.sections import parse_settings
from bge_ray.storage.objects import Storage
from tests.support.browser import Browser, find_browser
from tests.support.corpora import docstrings, jsonl_bytes
from tests.support.models import make_cross_encoder
from tests.support.searches import jsonl, settings_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        find_browser() is None,
        reason="needs chromium (Debian: apt-get install --no-install-recommends chromium)",
    ),
]

STORAGE = Storage(20)
HOSTILE = "<script>document.title='run'</script><img src='http://127.0.0.1:9/x.png'>"
WIDTHS = (1200, 420)
TEXT = "h1,h2,p,li,th,td,dt,dd,b,summary,figcaption,span,.lead"
# Of each text: its colour and the nearest colour behind it, both as "rgb(r, g, b)".
COLOURS = (
    f'[...document.querySelectorAll("{TEXT}")].filter(e => e.innerText.trim())'
    """.map(e => {
  const clear = b => b && getComputedStyle(b).backgroundColor === "rgba(0, 0, 0, 0)"
  let behind = e
  while (clear(behind)) behind = behind.parentElement
  return [getComputedStyle(e).color, getComputedStyle(behind || document.body).backgroundColor]
})"""
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Report pages by name: of a good run, its index, a search, a rerank, and a run with hostile rows."""
    root = tmp_path_factory.mktemp("pages")
    good = docstrings(400)
    bad = [{"id": f"{HOSTILE}{i}", "text": " "} for i in range(8)] + [{"id": HOSTILE, "text": "a text"}] * 3
    STORAGE.write(f"{root}/good/a.jsonl", jsonl_bytes(good))
    STORAGE.write(f"{root}/bad/{HOSTILE.replace('/', '')}.jsonl", jsonl_bytes(bad + good[:20]))
    settings = {
        name: parse_settings(
            None,
            [
                f"corpus.uri={root}/{name}",
                f"output.uri={root}/out-{name}",
                f"model.name={tiny_model}",
                "batching.unit_rows=50",
                "resources.num_encoders=2",
                "report.price_per_hour=2.5",
                "index.factory=IVF8,Flat",
            ],
        )
        for name in ("good", "bad")
    }
    embed(settings["good"])
    build_index(settings["good"])
    with pytest.raises(RejectedRowsError):
        embed(settings["bad"])
    records = [{"_id": f"q{i}", "text": f"how to {p['title']}"} for i, p in enumerate(good[::8])]
    records.append({"_id": HOSTILE, "text": " "})
    STORAGE.write(f"{root}/queries.jsonl", jsonl(records))
    shared = {
        "output__uri": f"{root}/out-good",
        "search__queries": f"{root}/queries.jsonl",
        "search__max_rejected_fraction": 0.5,
        "rerank__model": str(make_cross_encoder(tmp_path_factory.mktemp("ce"), positions=128)),
        "report__price_per_hour": 2.5,
    }
    search(settings_for(**shared, search__output=f"{root}/run", search__unit_queries=10))
    reranking = {"rerank__candidates": f"{root}/run", "rerank__unit_pairs": 100, "rerank__depth": 20}
    rerank(settings_for(**shared, **reranking, rerank__output=f"{root}/reranked"))
    places = {"good": "out-good", "index": "out-good/index", "bad": "out-bad"}
    places |= {"search": "run", "rerank": "reranked"}
    return {name: root / place / "report.html" for name, place in places.items()}


PICTURES = {"good": 2, "index": 2, "bad": 2, "search": 1, "rerank": 1}


@pytest.mark.parametrize("name", PICTURES)
def test_the_page_can_be_read_and_fetches_nothing(
    browser: Browser, pages: dict[str, Path], name: str, tmp_path: Path
) -> None:
    # A folder to keep the screenshots in, for a person to look at.
    kept = Path(os.environ.get("BGE_RAY_SCREENSHOTS", tmp_path))
    for scheme in ("light", "dark"):
        for width in WIDTHS:
            browser.requests.clear()
            browser.open(pages[name], width, scheme)
            assert set(browser.requests) == {pages[name].as_uri()}
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            sizes = browser.evaluate(
                "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().toJSON())"
            )
            assert len(sizes) == PICTURES[name]
            assert all(s["width"] > 300 and s["height"] > 120 and s["right"] <= width for s in sizes)
            assert [c for c in browser.evaluate(COLOURS) if contrast(*c) < 4.5] == []
            shot = browser.screenshot(kept / f"{name}-{scheme}-{width}.png")
            assert shot.startswith(b"\x89PNG")
            assert len(shot) > 20_000


def test_the_page_of_a_run_shows_its_facts(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["good"], 1200)
    text = browser.evaluate("document.body.innerText")
    report = json.loads(pages["good"].with_name("report.json").read_text())
    assert report["rows_in"] == 400
    assert "400 in = 400 embedded + 0 rejected, in 8 of 8 planned units" in text
    for word in (
        f"{report['tokens_per_s']:,.0f} tokens/s",
        "CPU core hours",
        "a CPU core hour",
        report["run_id"],
    ):
        assert word in text
    for heading in ("What to change next", "Rows", "Cost", "Where the time went", "Texts", "The run"):
        assert f"\n{heading}\n" in text
    bars = browser.evaluate("[...document.querySelectorAll('.bars i')].map(i => i.offsetWidth)")
    assert len(bars) == 5 + 3 + 4
    assert max(bars) > 100


def test_the_pages_of_the_other_jobs_show_their_facts(browser: Browser, pages: dict[str, Path]) -> None:
    for name, words in {
        "index": ("Recall@10", "400", "IVF8,Flat", "searching exactly", "adding"),
        "search": ("Queries answered", "51 queries = 50 answered + 1 left out", "search", "encode"),
        "rerank": ("50 queries", "Pairs scored", "score"),
    }.items():
        browser.open(pages[name], 1200)
        text = browser.evaluate("document.body.innerText")
        report = json.loads(pages[name].with_name("report.json").read_text())
        # All of the time is told, the launch of Python and of Ray included.
        assert sum(report["phase_s"].values()) == pytest.approx(report["wall_s"])
        assert (
            report["rows_in"] == report["rows_planned"] == {"index": 400, "search": 50, "rerank": 1000}[name]
        )
        assert report["cost"] == pytest.approx(2.5 * report["devices"] * report["wall_s"] / 3600)
        for word in (
            *words,
            "Wall time",
            "Price",
            "launching",
            "planning",
            "starting",
            "working",
            "finishing",
        ):
            assert word in text, (name, word)


def test_text_of_the_corpus_stays_text(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["bad"], 1200)
    assert browser.evaluate("document.title") == "bge-ray: Embedding run"
    assert browser.evaluate("document.querySelectorAll('script,img,iframe,link,object').length") == 0
    text = browser.evaluate("document.body.innerText")
    assert HOSTILE in text
    assert re.search(r"empty_text\s+80%\s+8 rows: nothing but white space", text)
    assert re.search(r"duplicate_id\s+20%\s+2 rows", text)
    assert "corpus.max_rejected_fraction" in text


def test_the_browser_would_notice(browser: Browser, tmp_path: Path) -> None:
    """What the checks above rest on: a request, an overflow and pale text are seen."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<body style='background:#fff'><img src='http://127.0.0.1:9/x.png'>"
        "<p style='width:2000px;color:#ccc'>pale</p>"
    )
    browser.requests.clear()
    browser.open(page, 420)
    assert "http://127.0.0.1:9/x.png" in browser.requests
    assert browser.evaluate("document.documentElement.scrollWidth") > 420
    assert [contrast(*c) for c in browser.evaluate(COLOURS)] == [pytest.approx(1.6, abs=0.1)]


def contrast(front: str, back: str) -> float:
    """Contrast ratio of two colours as WCAG 2 defines it."""
    light, dark = sorted((luminance(front), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
