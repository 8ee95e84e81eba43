"""Known-item search in Chinese over embed, search and evaluate, by the model of `tests.support.e5`.

    apt-get update -o Dir::State::lists=$PWD/lists -o Acquire::Languages=zh_CN
    /usr/lib/apt/apt-helper cat-file lists/*main_i18n_Translation-zh*.lz4 > Translation-zh_CN
    python -m tests.support.chinese --descriptions Translation-zh_CN --work DIR

A passage is the long description of a Debian package, each text once; a query the short description of it,
each once, and every passage that has it is what it asks for. The vectors are searched exactly. Prints the
metrics; a run that was stopped goes on with the same command.
"""

import argparse
import json
from pathlib import Path

from bge_ray.pipeline.engine.cluster import disconnect, prepare_environment
from bge_ray.settings.sections import ResourcesSettings
from tests.support.e5 import make_e5
from tests.support.searches import jsonl, settings_for
from tools.real_vectors import descriptions


def write_known_items(translations: Path, work: Path) -> tuple[int, int]:
    """Write corpus, queries and judgements below a folder; returns how many of the first two there are."""
    passages: dict[str, str] = {}
    for short, long in descriptions(translations):
        passages.setdefault(long, short)
    wanted: dict[str, list[str]] = {}
    corpus: list[dict[str, object]] = []
    for number, (long, short) in enumerate(passages.items()):
        corpus.append({"_id": f"p{number}", "text": long})
        wanted.setdefault(short, []).append(f"p{number}")
    queries: list[dict[str, object]] = [{"_id": f"q{n}", "text": text} for n, text in enumerate(wanted)]
    lines = ["query-id\tcorpus-id\tscore"]
    lines += [f"q{n}\t{passage}\t1" for n, found in enumerate(wanted.values()) for passage in found]
    work.mkdir(parents=True, exist_ok=True)
    (work / "corpus.jsonl").write_bytes(jsonl(corpus))
    (work / "queries.jsonl").write_bytes(jsonl(queries))
    (work / "qrels.tsv").write_text("\n".join(lines) + "\n")
    return len(corpus), len(queries)


def main() -> None:
    """Write what is searched, run the three jobs and print what they come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--descriptions", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    asked = parser.parse_args()
    work = asked.work.absolute()
    passages, queries = write_known_items(asked.descriptions, work)
    model = work / "e5-small-4-bits"
    if not (model / "config_sentence_transformers.json").is_file():  # what `make_e5` writes last
        make_e5(model)
    keys = {
        "corpus__uri": str(work / "corpus.jsonl"),
        "output__uri": str(work / "data"),
        "model__name": str(model),
        "resources__num_encoders": None,
        "search__queries": str(work / "queries.jsonl"),
        "search__output": str(work / "run"),
        "search__exact": True,
        "search__k": 100,
        "evaluate__run": str(work / "run"),
        "evaluate__qrels": str(work / "qrels.tsv"),
        "evaluate__k": [1, 10, 100],
    }
    settings = settings_for(**keys)
    prepare_environment(ResourcesSettings())
    from bge_ray.evaluate import evaluate
    from bge_ray.pipeline.embed.job import embed
    from bge_ray.pipeline.search.job import search

    embed(settings)
    search(settings)
    disconnect()
    (run,) = evaluate(settings)["runs"]
    print(json.dumps({"passages": passages, "queries": queries} | run["mean"]))


if __name__ == "__main__":
    main()
