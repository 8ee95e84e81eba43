"""Questions whose answers are known: each was a part of the passage that answers it. BEIR folders of them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings, parse_tree

MIN_CHARS = 60
SEED = 17
METRIC = "MRR@10"

# A metric by query id.
Values: TypeAlias = dict[str, float]


def draw(
    pairs: Iterable[tuple[str, str]], passages: int, queries: int
) -> tuple[dict[str, str], dict[str, str], list[tuple[str, str]]]:
    """Return passages and queries by id, and which belong together; the same for the same pairs.

    A text that stands twice counts once, and every passage that a query stands over is what it asks for.

    Args:
        pairs: (query, passage), in any number; passages under 60 characters are left out.
        passages: how many are drawn at most.
        queries: of those that ask for these passages, how many at most.
    """
    asked: dict[str, str] = {}
    for query, passage in pairs:
        if query and len(passage) >= MIN_CHARS:
            asked.setdefault(passage, query)
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(asked))[:passages]
    every = list(asked)
    drawn = {f"p{number}": every[number] for number in sorted(order.tolist())}
    wanted: dict[str, list[str]] = {}
    for passage_id, passage in drawn.items():
        wanted.setdefault(asked[passage], []).append(passage_id)
    # Of all of them: neighbours are of one module, and the first ones of few.
    asking = list(wanted)
    kept = [asking[number] for number in sorted(rng.permutation(len(asking))[:queries].tolist())]
    named = {f"q{number}": query for number, query in enumerate(kept)}
    judged = [(query_id, passage_id) for query_id, query in named.items() for passage_id in wanted[query]]
    return drawn, named, judged


def write_beir(
    folder: Path, passages: dict[str, str], queries: dict[str, str], judged: Sequence[tuple[str, str]]
) -> None:
    """Write a folder in the BEIR layout; a file that has its content already is left as it is."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, texts in (("corpus", passages), ("queries", queries)):
        lines = [json.dumps({"_id": key, "text": text}, ensure_ascii=False) for key, text in texts.items()]
        _write(folder / f"{name}.jsonl", lines)
    rows = [f"{query_id}\t{passage_id}\t1" for query_id, passage_id in judged]
    _write(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *rows])


def texts_of(folder: Path, name: str) -> dict[str, str]:
    """Return the "corpus" or the "queries" of a folder of `write_beir`, by id."""
    with (folder / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return {record["_id"]: record["text"] for record in map(json.loads, lines)}


def _write(path: Path, lines: Sequence[str]) -> None:
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def changed(settings: Settings, keys: dict[str, Any]) -> Settings:
    """Return the settings with some keys, such as "search.k", set to other values."""
    tree = settings.model_dump(exclude_unset=True)
    for key, value in keys.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return parse_tree(tree)


def keys_of(folder: Path) -> dict[str, Any]:
    """Return the settings by which jobs read a folder of `write_beir` and write below it."""
    return {
        "corpus.uri": str(folder / "corpus.jsonl"),
        "corpus.keep_columns": (),
        "output.uri": str(folder / "dataset"),
        "search.queries": str(folder / "queries.jsonl"),
        "search.output": str(folder / "run"),
    }


def mining_keys_of(folder: Path) -> dict[str, Any]:
    """Return the settings by which a folder of `write_beir` is embedded and mined, exactly, below it."""
    return {
        **keys_of(folder),
        "batching.unit_rows": 1000,
        "search.exact": True,
        "search.queries": None,
        "search.output": None,
        "mine.queries": str(folder / "queries.jsonl"),
        "mine.qrels": str(folder / "qrels" / "test.tsv"),
        "mine.output": str(folder / "mined"),
    }


def write_random(mined: Path, passages: Sequence[str], target: Path, *, beside: bool) -> None:
    """Write the examples of a file of mine with negatives at random, the same for the same file.

    Args:
        mined: negatives.jsonl.
        passages: to draw from; each example gets as many as were mined for it, none of them its positive.
        target: the file to write.
        beside: after those that were mined; else in their place.
    """
    rng = np.random.default_rng(SEED)
    lines = []
    for line in mined.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        record = json.loads(line)
        there = record["neg"]
        drawn = (passages[number] for number in rng.integers(len(passages), size=len(there) + 8))
        wrong = [text for text in drawn if text not in record["pos"]][: len(there)]
        example = {"query_id": record["query_id"], "query": record["query"], "pos": record["pos"]}
        lines.append(
            json.dumps({**example, "neg": [*there, *wrong] if beside else wrong}, ensure_ascii=False)
        )
    _write(target, lines)


def measured(settings: Settings, folder: Path, keys: dict[str, Any], stop: StopRequest) -> list[Values]:
    """Embed a folder of `write_beir`, search it exactly, rerank if that is asked, and measure.

    Args:
        settings: of the demo.
        folder: the folder; data set and runs go below it.
        keys: what else is set: model.name, rerank.model and search.rerank, search.k.
        stop: asked while the jobs work.

    Returns:
        MRR@10 by query id, of the search and, if it was asked for, of the reranked run.
    """
    from bge_ray.evaluate import evaluate
    from bge_ray.pipeline.embed.job import embed
    from bge_ray.pipeline.search.job import search

    asked = changed(settings, {**keys_of(folder), "search.exact": True, **keys})
    embed(asked, stop)
    search(asked, stop)
    run = str(asked.search.output)
    runs = (run, f"{run}/reranked") if asked.search.rerank else (run,)
    qrels = str(folder / "qrels" / "test.tsv")
    found = evaluate(changed(asked, {"evaluate.run": runs, "evaluate.qrels": qrels}))
    return [run["per_query"][METRIC] for run in found["runs"]]
