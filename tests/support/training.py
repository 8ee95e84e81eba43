"""Training examples made on the spot, and settings of a small training."""

import json
import random
from pathlib import Path

from bge_ray.settings.sections import Settings, parse_settings
from tests.support.models import SENTENCES

WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})


def example(number: int, *, negatives: int = 3, scores: bool = False) -> dict[str, object]:
    """Return a line: a query, the passage that has its words and others, and passages that do not."""
    draw = random.Random(number)
    query = draw.sample(WORDS, 4)

    def passage(words: list[str]) -> str:
        found = [*words, *draw.sample(WORDS, 6)]
        draw.shuffle(found)
        return " ".join(found)

    record: dict[str, object] = {
        "query_id": f"q{number}",
        "query": " ".join(query),
        "pos": [passage(query)],
        "neg": [passage([]) for _ in range(negatives)],
    }
    if scores:
        record |= {"pos_scores": [5.0], "neg_scores": [draw.uniform(-3, 3) for _ in range(negatives)]}
    return record


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def training_keys(folder: Path, model: Path, output: Path | str, **keys: object) -> dict[str, object]:
    """Write data of 48 examples and 12 held-out ones below a folder; return settings of four steps."""
    data = folder / "data.jsonl"
    if not data.exists():
        write_lines(data, [example(number, scores=True) for number in range(48)])
        write_lines(folder / "held_out.jsonl", [example(number) for number in range(100, 112)])
    reranker = keys.get("kind") == "reranker"
    found: dict[str, object] = {
        "rerank.model" if reranker else "model.name": str(model),
        "train.data": str(data),
        "train.held_out": str(folder / "held_out.jsonl"),
        "train.output": str(output),
        "train.group": 3,
        "train.batch_queries": 8,
        "train.steps": 4,
        "train.learning_rate": 1e-3,
        "train.checkpoint_steps": 2,
        "output.storage_timeout_s": 20,
    }
    return found | {key if "." in key else f"train.{key}": value for key, value in keys.items()}


def as_settings(keys: dict[str, object]) -> Settings:
    return parse_settings(None, [f"{key}={json.dumps(value)}" for key, value in keys.items()])
