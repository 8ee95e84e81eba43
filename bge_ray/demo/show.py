"""What the demo prints."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from bge_ray.demo.known import METRIC, Values, texts_of
from bge_ray.metrics import compare, interval, mean
from bge_ray.settings.sections import Settings

if TYPE_CHECKING:
    from rich.console import Console

# A question, and the score and id of each passage that answers it, best first.
Answer: TypeAlias = tuple[str, list[tuple[float, str]]]

SHOWN_CHARS = 68
SHOWN_QUESTIONS = 4


def show_shards(console: "Console", settings: Settings) -> None:
    """Print the embedding shards and their columns."""
    import pyarrow.parquet as pq
    from rich.table import Table

    root = Path(str(settings.output.uri))
    table = Table(title=f"What landed in {root}")
    for column in ("file", "rows", "bytes"):
        table.add_column(column, justify="left" if column == "file" else "right")
    shards = sorted((root / "embeddings").glob("*.parquet"))
    for path in shards:
        table.add_row(path.name, f"{pq.read_metadata(path).num_rows:,}", f"{path.stat().st_size:,}")
    console.print(table)
    console.print(pq.read_schema(shards[0]).remove_metadata(), highlight=False)


def show_answers(console: "Console", settings: Settings, answers: Sequence[Answer]) -> None:
    """Print the best passages of each question, with the first line of their text."""
    import pyarrow.parquet as pq

    table = pq.read_table(str(settings.corpus.uri), columns=["id", "text"])
    texts = {row["id"]: row["text"] for row in table.to_pylist()}
    for question, hits in answers:
        say(console, question, "bold")
        for score, passage_id in hits:
            first_line = texts[passage_id].strip().splitlines()[0][:SHOWN_CHARS]
            say(console, f"  {score:.3f}  {passage_id}: {first_line}")


def answers_of_run(settings: Settings) -> list[Answer]:
    """Return the answers that a search of a JSONL of questions published."""
    import pyarrow.parquet as pq

    run = pq.read_table(Path(str(settings.search.output)) / "run.parquet").to_pylist()
    lines = Path(str(settings.search.queries)).read_text(encoding="utf-8").splitlines()
    return [
        (
            question["text"],
            [(row["score"], row["passage_id"]) for row in run if row["query_id"] == question["_id"]],
        )
        for question in map(json.loads, lines)
    ]


def show_reranking(console: "Console", of: str, folder: Path, found: tuple[Values, Values]) -> None:
    """Print MRR@10 without and with reranking, and the questions whose answer it lifted most.

    Args:
        console: where to.
        of: whose docstrings they are.
        folder: of passages and questions, as `write_beir` writes it.
        found: the metric by question, of the search and of the reranked run.
    """
    first, reranked = found
    passages, questions = texts_of(folder, "corpus"), texts_of(folder, "queries")
    say(console, f"\n{len(first)} questions whose answers are known, {len(passages):,} passages to search:")
    say(console, f"each question is the first sentence of a docstring of {of}, its answer the rest of it")
    for says, values in (("search", first), ("search, reranked", reranked)):
        low, high = interval(values)
        say(console, f"  {says:18}{METRIC} {mean(values):.3f}  ({low:.3f} to {high:.3f})")
    against = compare(reranked, first)
    say(console, f"  difference {against.difference:+.3f}, p {against.p_value:.4f}; what moved most:")
    for query in sorted(first, key=lambda query: (first[query] - reranked[query], query))[:SHOWN_QUESTIONS]:
        moved = f"{_place(first[query])} to {_place(reranked[query])}"
        say(console, f"  {moved}: {questions[query][:SHOWN_CHARS]}")


def _place(reciprocal: float) -> str:
    return f"place {round(1 / reciprocal)}" if reciprocal else "not in the first ten"


def show_chinese(
    console: "Console", found: Values, answers: Sequence[Answer], passages: dict[str, str]
) -> None:
    """Print the answers to some Chinese questions, and MRR@10 of all."""
    score = f"{METRIC} {mean(found):.3f}"
    say(console, f"\nin Chinese, {len(found)} questions to {len(passages)} passages: {score}")
    for question, hits in answers[:SHOWN_QUESTIONS]:
        say(console, question, "bold")
        best, passage_id = hits[0]
        say(console, f"  {best:.3f}  {passages[passage_id]}")


def say(console: "Console", text: str, style: str | None = None) -> None:
    """Print a text as it stands, brackets and numbers too; where a line ends is the terminal's affair."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
