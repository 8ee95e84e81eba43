"""Known-item search in Chinese with multilingual-e5-small as `tests.support.e5` makes it.

    apt-get update -o Dir::State::lists=$PWD/lists -o Acquire::Languages=zh_CN
    /usr/lib/apt/apt-helper cat-file lists/*main_i18n_Translation-zh*.lz4 > Translation-zh_CN
    python -m tests.support.chinese --descriptions Translation-zh_CN --work DIR [--jobs]

A passage is the long description of a Debian package, each text once; a query the short description of it,
each once, and every passage that has it is what it asks for. The vectors are searched exactly. Prints the
metrics: of the jobs embed, search and evaluate, which go on with the same command where they were stopped;
or, without a Ray, of the same model, feeder and metrics in this process.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from bge_ray import metrics
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
from bge_ray.records.model import EMBEDDING
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import ModelSettings, ResourcesSettings
from tests.support.e5 import make_e5
from tests.support.searches import jsonl, settings_for
from tools.real_vectors import descriptions

CUTS = [1, 10, 100]


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
    passages: dict[str, str], queries: dict[str, str], qrels: dict[str, dict[str, int]], model: Path
) -> dict[str, float]:
    """Encode both sides by the model that the jobs run, and rank by inner product."""
    spec = resolve_encoder(ModelSettings(name=str(model)), on_gpu=False)
    feeder, loaded = text_feeder(spec), Model(spec, model_folder(spec), Place("cpu", 2))

    def encode(tokens: PackedTokens) -> np.ndarray:
        result = loaded.empty_result(len(tokens))
        loaded.run(tokens, loaded.cut(tokens.lengths, loaded.settle_budget("auto")), result)
        return result.array(EMBEDDING)

    scores = (
        encode(feeder.queries(list(queries.values()))) @ encode(feeder.passages(list(passages.values()))).T
    )
    ids = list(passages)
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
    asked = parser.parse_args()
    work = asked.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    passages, queries, qrels = known_items(asked.descriptions)
    model = work / "e5-small-4-bits"
    if not (model / "config_sentence_transformers.json").is_file():  # what `make_e5` writes last
        make_e5(model)
    if asked.jobs:
        found = by_the_jobs(passages, queries, qrels, model, work)
    else:
        found = in_this_process(passages, queries, qrels, model)
    print(json.dumps({"passages": len(passages), "queries": len(queries)} | found))


if __name__ == "__main__":
    main()
