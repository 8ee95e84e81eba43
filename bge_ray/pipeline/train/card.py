"""The card of a trained model: README.md, for a person and for the hub."""

import json

import yaml

from bge_ray.model.source import base_name
from bge_ray.records.reports import HeldOut, TrainReport

_TEXT = """
# {base}, trained on {examples:,} queries

{what} Trained by bge-ray: {steps:,} steps of {batch:,} queries, each with {group} passages.

## Figures

{figures}

## Data

| | |
|---|---|
| examples | {examples:,} of `{data}` |
| sha256 of the examples | `{sha256}` |
| left out, because their queries are held out | {left_out:,} |
| held-out queries | {held_out} |

## Settings

| | |
|---|---|
| model | `{model}`{revision} |
| sha256 of its files | `{weights}` |
{settings}
"""


def make_card(report: TrainReport) -> bytes:
    """Return README.md."""
    reranker = report.kind == "reranker"
    head = {
        "base_model": base_name(report.model.name),
        "base_model_relation": "finetune",
        "library_name": "sentence-transformers",
        "pipeline_tag": "text-ranking" if reranker else "sentence-similarity",
        "tags": ["sentence-transformers", "cross-encoder" if reranker else "feature-extraction"],
    }
    query = report.model.around_query()
    what = "A reranker: query and passage to one score."
    if not reranker:
        what = f"An embedder of {report.model.dim} numbers a text, by {report.model.pooling} pooling."
        if any(query):
            what += f" Before a query stands `{query[0]}`" + (
                f", behind it `{query[1]}`." if query[1] else "."
            )
    train = report.settings["train"]
    shown = "\n".join(
        f"| train.{name} | `{json.dumps(value, ensure_ascii=False)}` |"
        for name, value in train.items()
        if name not in ("data", "held_out", "output")
    )
    text = _TEXT.format(
        base=base_name(report.model.name),
        examples=report.examples,
        what=what,
        steps=report.steps,
        batch=report.batch_queries,
        group=train["group"],
        figures=_figures(report),
        data=report.data,
        sha256=report.data_sha256,
        left_out=report.left_out,
        held_out=f"{report.figures.queries:,} of `{report.held_out}`" if report.figures else "none",
        model=report.model.name,
        revision=f" at {report.model.revision}" if report.model.revision else "",
        weights=report.model.weights_sha256,
        settings=shown,
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=True, allow_unicode=True)}---\n{text}".encode()


def _figures(report: TrainReport) -> str:
    found = report.figures
    if found is None:
        return "None: no queries were held out (train.held_out)."
    rows = ["| MRR@10 | mean | interval (95 %) |", "|---|---:|---|"]
    for name, figure in (("before", found.before), ("after", found.after), ("difference", found.difference)):
        rows.append(f"| {name} | {_numbers(figure)} |")
    if found.p_value is not None:
        rows.append(f"\np = {found.p_value:.4f} by a paired randomisation test.")
    return "\n".join(rows)


def _numbers(figure: HeldOut | None) -> str:
    if figure is None:
        return "none: its head is new | "
    return f"{figure.mean:.4f} | {figure.low:.4f} to {figure.high:.4f}"
