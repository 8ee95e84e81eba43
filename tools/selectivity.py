"""What an index finds among what passes a filter, and what that costs: what `index/selectors.py` goes by.

    python -m tools.selectivity --vectors vectors > selectivity.md

Takes the passages and queries of `tools/real_vectors.py`. Each index is tuned for its target among all
passages. Then a share of them passes a filter: drawn at random, or of like matter (the cells of 300
centroids, in any order). For each share: recall@10 and milliseconds of CPU a query, with the effort that was
tuned, with one that grows as fewer pass, and with all that passes compared.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from bge_ray.index.factory import Metric, check_factory, choose_nlist
from bge_ray.index.search import search
from bge_ray.index.selectors import select
from bge_ray.index.topk import exact_topk
from bge_ray.index.tune import measure_recall, tune_effort
from bge_ray.records.ids import FloatArray, IdArray
from tools.kept_vectors import read_vectors

TARGET, K = 0.95, 10
SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
MATTERS = 300
SEED = 11


@dataclass(frozen=True)
class Row:
    """One index and one share of what passes; by way: tuned, wider, all."""

    factory: str
    passes: str
    share: float
    efforts: tuple[int, ...]
    recalls: tuple[float, ...]
    milliseconds: tuple[float, ...]


def measure(vectors: FloatArray, queries: FloatArray) -> Iterator[Row]:
    """Yield the rows of the table for (n, dim) passages and (q, dim) queries of unit norm."""
    n, dim = vectors.shape
    ids = np.arange(n)
    _, truth = exact_topk(queries, [(vectors, ids)], K)
    orders = {"at random": np.random.default_rng(SEED).permutation(n), "of like matter": _by_matter(vectors)}
    for factory in (f"IVF{choose_nlist(n)},SQ8", "HNSW32"):
        spec = check_factory(factory, dim, Metric.L2)
        index = faiss.index_factory(dim, spec.factory, Metric.L2.faiss)
        index.train(vectors[: spec.training_rows])
        index.add_with_ids(vectors, ids)
        lists = factory.startswith("IVF")
        largest = spec.nlist if lists else n
        tuning = tune_effort(
            partial(_found, index, queries),
            truth,
            TARGET,
            largest,
            k=K,
            smallest=1 if lists else K,
            measure_ceiling=False,
        )
        effort = tuning.chosen.effort
        for passes, order in orders.items():
            for share in SHARES:
                marks = np.zeros(n, np.bool_)
                marks[order[: round(share * n)]] = True
                efforts = (effort, min(largest, round(effort / share)), largest)
                found = [_ask(index, vectors, queries, marks, some) for some in efforts]
                recalls, milliseconds = zip(*found, strict=True)
                yield Row(factory, passes, share, efforts, recalls, milliseconds)


def _by_matter(vectors: FloatArray) -> IdArray:
    """Return the numbers of all passages, those of one cell together, the cells in any order."""
    kmeans = faiss.Kmeans(vectors.shape[1], MATTERS, niter=8, seed=SEED)
    kmeans.train(vectors)
    _, cells = kmeans.index.search(vectors, 1)
    places = np.random.default_rng(SEED).permutation(MATTERS)
    order: IdArray = np.argsort(places[cells[:, 0]], kind="stable")
    return order


def _ask(
    index: faiss.Index,
    vectors: FloatArray,
    queries: FloatArray,
    marks: npt.NDArray[np.bool_],
    effort: int,
) -> tuple[float, float]:
    """Return recall@K and milliseconds a query."""
    among = select(index, lambda ids: marks[ids])
    _, truth = exact_topk(queries, [(vectors[marks], np.flatnonzero(marks))], K)
    search(index, queries[:20], K, effort=effort, among=among)
    started = time.process_time()
    _, found = search(index, queries, K, effort=effort, among=among)
    spent = time.process_time() - started
    return measure_recall(found, truth, K).value, 1000 * spent / len(queries)


def _found(index: faiss.Index, queries: FloatArray, effort: int) -> IdArray:
    """Return what is found among all passages."""
    return search(index, queries, K, effort=effort)[1]


def to_markdown(rows: list[Row], n: int, dim: int, queries: int) -> str:
    """Return the table."""
    lines = [
        f"{n:,} passages of {dim} dimensions, {queries:,} queries; effort tuned for recall@{K} {TARGET} "
        "among all.",
        "",
        "| index | passes | share | effort tuned: recall, ms | effort / share: recall, ms | "
        "all compared: recall, ms |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        ways = zip(row.efforts, row.recalls, row.milliseconds, strict=True)
        told = " | ".join(f"{effort:,}: {recall:.3f}, {ms:.2f}" for effort, recall, ms in ways)
        lines.append(f"| {row.factory} | {row.passes} | {row.share:g} | {told} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=Path, required=True, help="what tools/real_vectors.py wrote")
    parser.add_argument("--queries", type=int, default=400)
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
