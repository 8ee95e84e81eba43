"""What each code of an index recalls, weighs and costs, on real vectors: what `index.factory: auto` knows.

    python tools/codes.py --vectors vectors > codes.md

Takes the passages and queries of `tools/real_vectors.py`; a query's text is not a part of the passage that it
came with. For each code: its recall with all lists probed, alone and after the best 2, 4, 10 and 20
candidates a result were scored again exactly; then the fewest lists with which it reaches the target,
and what such a query scans.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from bge_ray.index.choice import CODES, DEPTHS, FACTORS
from bge_ray.index.factory import ID_BYTES, Metric, check_factory, choose_nlist
from bge_ray.index.search import search
from bge_ray.index.topk import exact_topk
from bge_ray.index.train import KMEANS_ITERATIONS
from bge_ray.index.tune import measure_recall, rescored, tune_effort
from bge_ray.records.ids import FloatArray, IdArray
from tools.kept_vectors import read_vectors

TARGET = 0.95
SEED = 5


@dataclass(frozen=True)
class Row:
    """One code, rescored with so many candidates a result (1: not at all)."""

    code: str
    bytes: int
    factor: int
    ceilings: tuple[float, ...]  # by DEPTHS
    nprobe: int
    scanned: float


def measure(vectors: FloatArray, queries: FloatArray) -> Iterator[Row]:
    """Yield the rows of the table for (n, dim) passages and (q, dim) queries."""
    n, dim = vectors.shape
    ids = np.arange(n)
    _, truth = exact_topk(queries, [(vectors, ids)], max(DEPTHS))
    nlist = choose_nlist(n)
    for code in CODES:
        spec = check_factory(code.factory(nlist, dim), dim, Metric.L2)
        index = faiss.index_factory(dim, spec.factory, Metric.L2.faiss)
        faiss.extract_index_ivf(index).cp.niter = KMEANS_ITERATIONS
        rng = np.random.default_rng(SEED)
        index.train(vectors[rng.choice(n, min(n, spec.training_rows), replace=False)])
        index.add_with_ids(vectors, ids)
        sizes = np.array(list(_list_sizes(index)))
        deepest = max(FACTORS) * max(DEPTHS)
        _, everything = search(index, queries, deepest, effort=nlist)
        for factor in FACTORS:
            ceilings = tuple(_recall(everything[:, : factor * k], truth, k, factor) for k in DEPTHS)
            at = partial(_found, index, queries, truth[:, : DEPTHS[0]], factor)
            tuning = tune_effort(at, truth[:, : DEPTHS[0]], TARGET, nlist, k=DEPTHS[0])
            nprobe = tuning.chosen.effort
            _, probed = faiss.extract_index_ivf(index).quantizer.search(_seen(index, queries), nprobe)
            scanned = float(sizes[probed].sum(axis=1).mean()) / n
            yield Row(code.name, spec.code_size + ID_BYTES, factor, ceilings, nprobe, scanned)


def _found(index: faiss.Index, queries: FloatArray, truth: IdArray, factor: int, nprobe: int) -> IdArray:
    _, found = search(index, queries, factor * truth.shape[1], effort=nprobe)
    return found if factor == 1 else rescored(found, truth)


def _seen(index: faiss.Index, rows: FloatArray) -> FloatArray:
    outer = faiss.downcast_index(index)
    if not isinstance(outer, faiss.IndexPreTransform):
        return rows
    chain: Any = outer.chain
    turned: FloatArray = chain.at(0).apply(rows)
    return turned


def _list_sizes(index: faiss.Index) -> Iterator[int]:
    lists: Any = faiss.extract_index_ivf(index).invlists
    for number in range(lists.nlist):
        yield lists.list_size(number)


def _recall(candidates: IdArray, truth: IdArray, k: int, factor: int) -> float:
    found = candidates if factor == 1 else rescored(candidates, truth[:, :k])
    return measure_recall(found, truth[:, :k], k).value


def to_markdown(rows: list[Row], n: int, dim: int, queries: int) -> str:
    """Return the table."""
    lines = [
        f"{n:,} passages of {dim} dimensions, {queries:,} queries, {choose_nlist(n):,} lists; target recall@"
        f"{DEPTHS[0]} {TARGET}.",
        "",
        "| code | bytes a vector | candidates a result, rescored | "
        + " | ".join(f"recall@{k}, all lists" for k in DEPTHS)
        + " | lists probed for the target | kB scanned a query |",
        "|---|---:|---:|" + "---:|" * len(DEPTHS) + "---:|---:|",
    ]
    for row in rows:
        reached = f"{row.nprobe:,}" if row.nprobe < choose_nlist(n) else "not reached"
        ceilings = " | ".join(f"{value:.4f}" for value in row.ceilings)
        scanned = f"{row.scanned * n * row.bytes / 1000:,.0f}"
        lines.append(
            f"| {row.code} | {row.bytes} | {row.factor if row.factor > 1 else 'none'} | {ceilings} | "
            f"{reached} | {scanned} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=Path, required=True, help="what tools/real_vectors.py wrote")
    parser.add_argument("--queries", type=int, default=1000)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    vectors, queries = read_vectors(arguments.vectors, arguments.queries)
    rows = []
    for row in measure(vectors, queries):
        rows.append(row)
        print(asdict(row), file=sys.stderr, flush=True)
    n, dim = vectors.shape
    print(to_markdown(rows, n, dim, len(queries)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
