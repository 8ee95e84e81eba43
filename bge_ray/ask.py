"""Questions asked at a terminal: a data set is opened once, and each question answered as it comes."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bge_ray.formats.rows import is_blank, refuse_no_query

if TYPE_CHECKING:
    from bge_ray.retrieval import Hit, IndexReader

PROMPT = "? "
SHOWN_CHARS = 90


@dataclass(frozen=True)
class Asked:
    """What is asked: ``k`` passages a question, with columns, of ``rescored`` candidates scored again.

    ``rescored`` and ``nprobe`` are as the index was tuned where they are None. ``filter`` is what passages
    must pass; None: nothing.
    """

    k: int
    columns: tuple[str, ...]
    rescored: int | None
    nprobe: int | None
    filter: str | None
    as_json: bool
    stale_index: bool


def ask(uri: str, questions: Sequence[str], asked: Asked, *, model: str | None, device: str) -> None:
    """Answer questions, and print each answer when it is there.

    Args:
        uri: folder of the data set, as `bge_ray.open_index` takes it.
        questions: in their order; if there are none, lines of standard input until it ends.
        asked: what of each.
        model: where the model lies, if not where it lay for the embed job.
        device: on which questions are encoded.

    Raises:
        ModelError: a question is empty, or is not UTF-8.
        BgeRayError: what `bge_ray.open_index` and its ``search`` raise.
    """
    from bge_ray import open_index

    for question in questions:
        refuse_no_query(question)  # before minutes are spent on opening
    index = open_index(uri, model=model, device=device, stale_index=asked.stale_index)
    for question in questions or _lines():
        started = time.monotonic()
        (hits,) = index.search(
            question,
            asked.k,
            columns=asked.columns,
            rescored=asked.rescored,
            nprobe=asked.nprobe,
            filter=asked.filter,
        )
        shown = _as_json(question, hits) if asked.as_json else _as_text(question, hits)
        for line in shown:
            print(line)  # noqa: T201 - the answer of the command
        if not asked.as_json:
            print(f"  {_searched(index)}, {time.monotonic() - started:.2f} s")  # noqa: T201
        sys.stdout.flush()


def _lines() -> Iterator[str]:
    """Yield what is typed, or what a program writes, line by line."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print(PROMPT, end="", file=sys.stderr, flush=True)  # noqa: T201
        data = sys.stdin.buffer.readline()
        if not data:
            return
        try:
            line = data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            print(f"this line is not UTF-8 and is not asked: {error}", file=sys.stderr)  # noqa: T201
            continue
        if not is_blank(line):
            yield line


def _searched(index: "IndexReader") -> str:
    found = index.description
    return "exact" if found is None else f"{found.factory}, {found.ntotal:,} vectors"


def _as_json(question: str, hits: "Iterable[Hit]") -> Iterator[str]:
    for rank, hit in enumerate(hits, 1):
        told = {"question": question, "rank": rank, "score": hit.score, "passage_id": hit.passage_id}
        yield json.dumps(told | hit.columns, ensure_ascii=False, default=str)


def _as_text(question: str, hits: "Sequence[Hit]") -> Iterator[str]:
    yield question
    for hit in hits:
        yield f"  {hit.score:.3f}  {hit.passage_id}{''.join(map(_shown, hit.columns.values()))}"
    if not hits:
        yield "  nothing was found"


def _shown(value: Any) -> str:
    text = " ".join(str(value).split()) if value is not None else ""
    return f"  {text[:SHOWN_CHARS]}" if text else ""
