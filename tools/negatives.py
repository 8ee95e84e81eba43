"""What mined negatives are worth: the demo's reranker beside one that was trained on random negatives.

    python -m tools.negatives --work demo-out

Needs what `bge-ray demo --train` leaves below its folder. The other one is trained by the same recipe on the
same queries, positives and numbers of negatives; both rerank what one search found for questions that neither
was trained on. Prints MRR@10 of each, and how they differ.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bge_ray.demo.job import RERANKED, demo_settings, write_known
from bge_ray.demo.known import METRIC, changed, measured
from bge_ray.demo.reranker import RECIPE, TOKENS, reranker_folder
from bge_ray.metrics import compare, interval, mean
from bge_ray.pipeline.engine.cluster import disconnect, prepare_environment
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import ResourcesSettings, parse_settings

SEED = 29


def write_random(mined: Path, corpus: Path, target: Path) -> None:
    """Write the examples of a file of mine with negatives drawn from the corpus, as many as each had."""
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    rng = np.random.default_rng(SEED)
    with target.open("w", encoding="utf-8") as out:
        for line in mined.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            drawn = (texts[number] for number in rng.permutation(len(texts))[: len(record["neg"]) + 8])
            wrong = [text for text in drawn if text not in record["pos"]][: len(record["neg"])]
            example = {"query_id": record["query_id"], "query": record["query"], "pos": record["pos"]}
            out.write(json.dumps({**example, "neg": wrong}, ensure_ascii=False) + "\n")


def main() -> int:
    """Train, rerank by both, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("demo-out"), help="folder of the demo")
    work = parser.parse_args().work
    prepare_environment(ResourcesSettings())
    from bge_ray.pipeline.train.job import train

    training, folder = work / "training", work / "negatives"
    folder.mkdir(exist_ok=True)
    write_random(training / "mined" / "negatives.jsonl", training / "corpus.jsonl", folder / "random.jsonl")
    settings = parse_settings(None, demo_settings(work, 3000, ()))
    asked = {**RECIPE, "rerank.model": settings.model.name}
    made = folder / "reranker"
    train(changed(settings, {**asked, "train.data": str(folder / "random.jsonl"), "train.output": str(made)}))
    write_known(work / "known")
    values = {}
    for name, reranker in (("random", made), ("mined", reranker_folder(work))):
        keys: dict[str, Any] = {"search.k": RERANKED, "search.rerank": True, "rerank.max_length": TOKENS}
        keys |= {"rerank.model": str(reranker), "search.output": str(folder / f"run-{name}")}
        first, values[name] = measured(settings, work / "known", keys, StopRequest())
    disconnect()
    for name, by_query in (("search", first), *values.items()):
        low, high = interval(by_query)
        print(f"{name:8}{METRIC} {mean(by_query):.3f}  ({low:.3f} to {high:.3f})")
    found = compare(values["mined"], values["random"])
    print(f"mined against random: {found.difference:+.3f}, p {found.p_value:.4f}, ", end="")
    print(f"better for {found.wins}, worse for {found.losses} of {len(first)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
