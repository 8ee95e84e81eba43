"""What the demo shows stands there as it was asked and written."""

import io
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from bge_ray.demo.job import demo_job
from bge_ray.demo.show import show_answers
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import parse_settings
from tests.report.samples import embed_report, index_description


def test_brackets_of_questions_and_passages_are_no_markup(tmp_path: Path) -> None:
    rows = {"id": ["a.b[c]"], "text": ["[bold]not bold[/bold] [/] [red]\nsecond line"]}
    pq.write_table(pa.table(rows), tmp_path / "part.parquet")
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    question = "what does [bold] do, and [/nothing]?"
    settings = parse_settings(None, [f"corpus.uri={tmp_path}"])
    show_answers(console, settings, [(question, [(0.5, "a.b[c]")])])
    assert console.file.getvalue().splitlines() == [
        question,
        "  0.500  a.b[c]: [bold]not bold[/bold] [/] [red]",
    ]


def test_questions_of_the_user_are_answered_without_a_search_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job takes its cluster's start and end a question, 21 s of 22."""
    pq.write_table(pa.table({"id": ["a"], "text": ["the answer"]}), tmp_path / "part.parquet")
    settings = parse_settings(None, [f"corpus.uri={tmp_path}", f"output.uri={tmp_path}/out"])

    def search(*_: object) -> None:
        raise AssertionError("a search job was run")

    reader = SimpleNamespace(
        search=lambda asked, k: [[SimpleNamespace(score=0.5, passage_id="a")] for _ in asked]
    )
    monkeypatch.setattr("bge_ray.pipeline.embed.job.embed", lambda *_: SimpleNamespace(report=embed_report()))
    monkeypatch.setattr("bge_ray.pipeline.index.job.build_index", lambda *_: index_description())
    monkeypatch.setattr("bge_ray.pipeline.search.job.search", search)
    monkeypatch.setattr("bge_ray.demo.job.show_shards", lambda *_: None)
    monkeypatch.setattr("bge_ray.retrieval.open_index_reader", lambda *_, **__: reader)
    demo_job(tmp_path, ["what is it?"]).action(settings, False, StopRequest())
    assert "what is it?\n  0.500  a: the answer" in capsys.readouterr().out
