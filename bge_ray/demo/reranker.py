"""A small cross-encoder out of all-MiniLM-L6-v2: embed, mine and train by the jobs, offline, within an hour.

What it learns from are the docstrings of the installed packages: the first sentence asks for the rest, beside
hard negatives. Those of the standard library and of a fifth of the packages, by which the demo measures it,
are none of them: a text that both have is left out. A run that was stopped is gone on with; a finished one is
found so.
"""

import zlib
from pathlib import Path
from typing import Any

from bge_ray.demo.known import changed, draw, mining_keys_of, write_beir, write_random
from bge_ray.formats.docstrings import PACKAGES, STANDARD_LIBRARY, known_items, known_items_of
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings

EXAMPLES = 10_000
QUERY_CHARS = range(20, 200)
# What is longer is cut at TOKENS, and with it, at times, what the question asks for.
PASSAGE_CHARS = 300
# One package of so many is not learned from.
HELD_OUT_OF = 5
TOKENS = 96
NEGATIVES = 4
STEPS = 1000
# Of the search's own score in the order of the reranked list: so small a reranker knows less than what it was
# made of. Chosen by questions of packages, those of `unseen_folder` among them (docs/training.md).
FIRST_STAGE_SHARE = 0.5
RECIPE: dict[str, Any] = {
    "train.kind": "reranker",
    "train.group": 1 + NEGATIVES,
    "train.batch_queries": 8,
    "train.steps": STEPS,
    "train.learning_rate": 2e-4,
    "train.workers": 2,
    "train.checkpoint_steps": 100,
    "rerank.max_length": TOKENS,
}


def reranker_folder(work: Path) -> Path:
    """Return the folder of the trained reranker below that of the demo."""
    return work / "reranker"


def unseen_folder(work: Path) -> Path:
    """Return the folder, of `write_beir`, of questions to packages that were not learned from."""
    return work / "unseen"


def is_trained(work: Path) -> bool:
    """Tell whether a whole reranker is there: its config.json is what the train job writes last."""
    return (reranker_folder(work) / "config.json").exists()


def train_reranker(settings: Settings, work: Path, asked_of: tuple[int, int], stop: StopRequest) -> str:
    """Make training data below the demo's folder and train; return what came of it, in a line.

    Args:
        settings: of the demo; model.name is what candidates are found with, and what is trained on.
        work: the demo's folder.
        asked_of: passages and questions of the packages that are not learned from, at most.
        stop: asked while the jobs work.
    """
    from bge_ray.pipeline.embed.job import embed
    from bge_ray.pipeline.mine.job import mine
    from bge_ray.pipeline.train.job import train

    folder = work / "training"
    learned, held_out = _pairs()
    write_beir(unseen_folder(work), *draw(held_out, *asked_of))
    passages, questions, judged = draw(learned, EXAMPLES, EXAMPLES)
    write_beir(folder, passages, questions, judged)
    mined, mixed = folder / "mined" / "negatives.jsonl", folder / "mixed.jsonl"
    asked = changed(
        settings,
        {
            **mining_keys_of(folder),
            "model.max_length": TOKENS,
            # Of all that it will order, also above the answer: that is what it is to put right.
            "mine.depth": 60,
            "mine.sampling": "random",
            "mine.relative_margin": None,
            "mine.negatives": NEGATIVES,
            "train.data": str(mixed),
            "train.output": str(reranker_folder(work)),
            "rerank.model": settings.model.name,
            "train.dtype": training_dtype(),
            **RECIPE,
        },
    )
    embed(asked, stop)
    mine(asked, stop)
    # As many again at random, or what separates texts at all is learned too late.
    write_random(mined, list(passages.values()), mixed, beside=True)
    report = train(asked, stop)
    return f"reranker: {report.outcome}; {reranker_folder(work)}/report.html"


def training_dtype() -> str:
    """Return what a training computes in: bfloat16 where the processor has products of it."""
    import torch

    has = torch.cpu.get_capabilities()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def _pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return what packages say of themselves to learn from, and to be asked of afterwards.

    No text of the one is in the other, and none of either is one of the standard library's.
    """
    known = {text for pair in known_items(STANDARD_LIBRARY) for text in pair}
    held_out: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    for package, query, passage in known_items_of(PACKAGES):
        if len(query) in QUERY_CHARS and len(passage) <= PASSAGE_CHARS and known.isdisjoint((query, passage)):
            (others if zlib.crc32(package.encode()) % HELD_OUT_OF else held_out).append((query, passage))
    asked = {text for pair in held_out for text in pair}
    return [pair for pair in others if asked.isdisjoint(pair)], held_out
