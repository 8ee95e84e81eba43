"""Folders in the BEIR layout for these tests: real texts whose best passages are far apart."""

import json
from pathlib import Path

from tests.support.corpora import docstrings


def write_set(
    folder: Path,
    corpus: list[dict[str, str]],
    queries: dict[str, str],
    judged: dict[str, dict[str, int]],
    split: str = "test",
) -> Path:
    (folder / "qrels").mkdir(parents=True)
    passages = [{"_id": p["id"], "title": p["title"], "text": p["text"]} for p in corpus]
    asked = [{"_id": query_id, "text": text} for query_id, text in queries.items()]
    for name, rows in (("corpus", passages), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{q}\t{p}\t{value}\n" for q, found in judged.items() for p, value in found.items()]
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def passages(start: int, stop: int) -> list[dict[str, str]]:
    """Docstrings of a useful length, no text twice."""
    found = {p["text"]: p for p in docstrings(1500) if 20 < len(p["text"].split()) < 120}
    return list(found.values())[start:stop]


def known_items(folder: Path) -> Path:
    """Queries are first words of passages; each has one answer."""
    corpus = passages(0, 80)
    asked = {f"q{n}": " ".join(p["text"].split()[:9]) for n, p in enumerate(corpus[::4])}
    judged = {f"q{n}": {p["id"]: 1} for n, p in enumerate(corpus[::4])}
    return write_set(folder, corpus, asked, judged)


def graded(folder: Path) -> Path:
    """Queries are titles; the passage of the title is 2, others of its module are 1. Judged for dev alone."""
    corpus = passages(80, 160)
    module = {p["id"]: p["title"].rpartition(".")[0] for p in corpus}
    asked = {f"q{n}": p["title"].replace(".", " ") for n, p in enumerate(corpus[::5])}
    judged = {}
    for n, p in enumerate(corpus[::5]):
        near = {other: 1 for other, where in module.items() if where == module[p["id"]]}
        judged[f"q{n}"] = near | {p["id"]: 2}
    return write_set(folder, corpus, asked, judged, split="dev")


def untitled(folder: Path) -> Path:
    """Last words ask; no passage has a title, one query is not judged and one judgement is of no query."""
    corpus = [{**p, "title": ""} for p in passages(160, 230)]
    asked = {f"q{n}": " ".join(p["text"].split()[-8:]) for n, p in enumerate(corpus[::3])}
    judged = {f"q{n}": {p["id"]: 1} for n, p in enumerate(corpus[::3])}
    return write_set(folder, corpus, asked | {"extra": "nobody judged this"}, judged | {"gone": {"x": 1}})
