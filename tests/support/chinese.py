"""Known-item search in Chinese with multilingual-e5-small as `bge_ray.demo.e5` makes it.

    apt-get update -o Dir::State::lists=$PWD/lists -o Acquire::Languages=zh_CN
    /usr/lib/apt/apt-helper cat-file lists/*main_i18n_Translation-zh*.lz4 > Translation-zh_CN
    python -m tests.support.chinese --descriptions Translation-zh_CN --work DIR [--jobs]

A passage is the long description of a Debian package, each text once; a query the short description of it,
each once, and every passage that has it is what it asks for. The vectors are searched exactly. Prints the
metrics: of the jobs embed, search and evaluate; or, without a Ray, of the same model, feeder and metrics in
this process, for `--seconds` at most (exit code 75: there is more to do). Both go on where they were stopped.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

from bge_ray import metrics
from bge_ray.demo.e5 import make_e5
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
from bge_ray.records.model import EMBEDDING
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import ModelSettings, ResourcesSettings
from tests.support.searches import jsonl, settings_for
from tools.beir_sets import descriptions
from tools.real_vectors import MORE_TO_DO

CUTS = [1, 10, 100]
BLOCK = 12


def known_items(translations: Path) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Return passages and queries by id, and the judgements."""
    shorts: dict[str, str] = {}
    for short, long in descriptions(translations):
        shorts.setdefault(long, short)
    passages = {f"p{number}": text for number, text in enumerate(shorts)}
    wanted: dict[str, dict[str, int]] = {}
    for passage_id, text in passages.items():
        wanted.setdefault(shorts[text], {})[passage_id] = 1
    queries = {f"q{number}": text for number, text in enumerate(wanted)}
    return passages, queries, dict(zip(queries, wanted.values(), strict=True))


def by_the_jobs(
    passages: dict[str, str],
    queries: dict[str, str],
    qrels: dict[str, dict[str, int]],
    model: Path,
    work: Path,
) -> dict[str, float]:
    """Embed, search exactly and evaluate below a folder."""
    (work / "corpus.jsonl").write_bytes(jsonl([{"_id": i, "text": text} for i, text in passages.items()]))
    (work / "queries.jsonl").write_bytes(jsonl([{"_id": i, "text": text} for i, text in queries.items()]))
    judged = [f"{query}\t{passage}\t1\n" for query, found in qrels.items() for passage in found]
    (work / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    keys = {
        "corpus__uri": str(work / "corpus.jsonl"),
        "output__uri": str(work / "data"),
        "model__name": str(model),
        "resources__num_encoders": None,
        "search__queries": str(work / "queries.jsonl"),
        "search__output": str(work / "run"),
        "search__exact": True,
        "search__k": CUTS[-1],
        "evaluate__run": str(work / "run"),
        "evaluate__qrels": str(work / "qrels.tsv"),
        "evaluate__k": CUTS,
    }
    settings = settings_for(**keys)
    from bge_ray.pipeline.engine.cluster import disconnect, prepare_environment

    prepare_environment(ResourcesSettings())
    from bge_ray.evaluate import evaluate
    from bge_ray.pipeline.embed.job import embed
    from bge_ray.pipeline.search.job import search

    embed(settings)
    search(settings)
    disconnect()
    (run,) = evaluate(settings)["runs"]
    found: dict[str, float] = run["mean"]
    return found


def in_this_process(
    passages: dict[str, str],
    queries: dict[str, str],
    qrels: dict[str, dict[str, int]],
    model: Path,
    work: Path,
    seconds: float,
) -> dict[str, float] | None:
    """Encode both sides by the model that the jobs run, and rank by inner product; None if time was short."""
    spec = resolve_encoder(ModelSettings(name=str(model)), on_gpu=False)
    feeder, loaded = text_feeder(spec), Model(spec, model_folder(spec), Place("cpu", torch.get_num_threads()))
    deadline = psutil.Process().create_time() + seconds

    def encode(
        side: str, tokens_of: Callable[[list[str]], PackedTokens], texts: list[str]
    ) -> np.ndarray | None:
        parts = []
        for start in range(0, len(texts), BLOCK):
            path = work / f"{side}-{start}.npy"
            if not path.is_file():
                if time.time() > deadline:
                    return None
                tokens = tokens_of(texts[start : start + BLOCK])
                result = loaded.empty_result(len(tokens))
                loaded.run(tokens, loaded.cut(tokens, loaded.settle_budget("auto")), result)
                with path.with_suffix(".part").open("wb") as file:
                    np.save(file, result.array(EMBEDDING))
                path.with_suffix(".part").rename(path)
            parts.append(np.load(path))
        return np.concatenate(parts)

    there = encode("passages", feeder.passages, list(passages.values()))
    asked = encode("queries", feeder.queries, list(queries.values()))
    if there is None or asked is None:
        return None
    ids, scores = list(passages), asked @ there.T
    run = {
        query: {ids[place]: float(row[place]) for place in np.argsort(-row)[: CUTS[-1]]}
        for query, row in zip(queries, scores, strict=True)
    }
    return {name: metrics.mean(values) for name, values in metrics.measure(run, qrels, CUTS).items()}


def main() -> None:
    """Make the model if it is not there, search, and print what it comes to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--descriptions", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", action="store_true")
    parser.add_argument("--seconds", type=float, default=math.inf)
    asked = parser.parse_args()
    work = asked.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    passages, queries, qrels = known_items(asked.descriptions)
    model = work / "e5-small-4-bits"
    if not (model / "config_sentence_transformers.json").is_file():  # what `make_e5` writes last
        make_e5(model)
    found: dict[str, float] | None
    if asked.jobs:
        found = by_the_jobs(passages, queries, qrels, model, work)
    else:
        found = in_this_process(passages, queries, qrels, model, work, asked.seconds)
    if found is None:
        sys.exit(MORE_TO_DO)
    print(json.dumps({"passages": len(passages), "queries": len(queries)} | found))


if __name__ == "__main__":
    main()
