"""The card of a merged model: README.md, for a person and for the hub."""

from collections.abc import Sequence

import yaml

from bge_ray.model.source import base_name
from bge_ray.records.reports import MergedModel

_TEXT = """
# A mean of {count} models

Each number of its weights is the weighted mean of the numbers that these models have in its place, {how}.
Everything else (configuration, tokenizer, modules) is the first model's. Written by bge-ray.

| model | weight | sha256 of its files |
|---|---:|---|
{models}
"""


def make_card(models: Sequence[MergedModel], examples: int, *, has_modules: bool) -> bytes:
    """Return README.md.

    Args:
        models: that were merged, with their weights.
        examples: that made the weights; 0 if they were given.
        has_modules: whether the folder says how sentence-transformers makes vectors with it.
    """
    head = {
        "base_model": [base_name(model.name) for model in models],
        "base_model_relation": "merge",
        "tags": ["merge"],
    }
    if has_modules:
        head["library_name"] = "sentence-transformers"
    rows = []
    for model in models:
        loss = "" if model.loss is None else f" (loss {model.loss:.4f})"
        revision = "" if model.revision is None else f" at {model.revision}"
        rows.append(f"| `{model.name}`{revision} | {model.weight:.6f}{loss} | `{model.weights_sha256}` |")
    how = f"by their losses on {examples:,} examples" if examples else "by weights that were given"
    text = _TEXT.format(count=len(models), how=how, models="\n".join(rows))
    return f"---\n{yaml.safe_dump(head, sort_keys=True, allow_unicode=True)}---\n{text}".encode()
