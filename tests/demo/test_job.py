"""What the demo shows stands there as it was asked and written."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from bge_ray.demo.show import show_answers
from bge_ray.settings.sections import parse_settings


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
