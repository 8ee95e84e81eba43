"""What an index finds among what passes a filter, and what that costs: what `index/selectors.py` goes by.

    python -m tools.selectivity --vectors docstrings > selectivity.md

Passages are the docstrings of this Python and its packages without their first sentence, queries are first
sentences, embedded with the packaged all-MiniLM-L6-v2 (cut at 64 tokens, float32); ``--vectors`` keeps them,
so that a run that was cut off goes on. Each index is tuned for its target among all passages. Then a share of
them passes a filter: drawn at random, or whole packages, whose docstrings are of one matter. For each share:
recall@10 and milliseconds a query on one core, with the effort that was tuned, with one that grows as fewer
pass, and with all that passes compared.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from bge_ray.formats.docstrings import find_docstrings
from bge_ray.index.factory import Metric, check_factory, choose_nlist
from bge_ray.index.search import search
from bge_ray.index.selectors import select
from bge_ray.index.topk import exact_topk
from bge_ray.index.tune import measure_recall, tune_effort
from bge_ray.records.ids import FloatArray, IdArray
from tools.real_vectors import MIN_CHARS, Embedder

TARGET, K = 0.95, 10
SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
QUERIES, BLOCK = 400, 500
SEED = 11


@dataclass(frozen=True)
class Passages:
    """Passages (n, dim) and queries (q, dim) of unit norm, and the (n,) number of the package of each."""

    vectors: FloatArray
    queries: FloatArray
    packages: IdArray


@dataclass(frozen=True)
class Row:
    """One index and one share of what passes; by way: tuned, wider, all."""

    factory: str
    passes: str
    share: float
    efforts: tuple[int, ...]
    recalls: tuple[float, ...]
    milliseconds: tuple[float, ...]


def docstrings(limit: int) -> tuple[list[str], list[str], list[str]]:
    """Return the first passages, with their first sentences and packages, each passage once, mixed."""
    found: dict[str, tuple[str, str]] = {}
    for module, _, text in find_docstrings():
        first, _, rest = " ".join(text.split()).partition(". ")
        if first and len(rest) >= MIN_CHARS:
            found.setdefault(rest, (first, module.partition(".")[0]))
        if len(found) == limit:
            break
    texts = list(found)
    chosen = [texts[i] for i in np.random.default_rng(SEED).permutation(len(texts)).tolist()]
    return chosen, [found[text][0] for text in chosen], [found[text][1] for text in chosen]


def embedded(folder: Path, limit: int) -> Passages:
    """Embed what a folder does not have yet, block by block, and return all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, firsts, names = docstrings(limit)
    starts = range(0, len(texts), BLOCK)
    todo = {f"passages-{start:07d}": texts[start : start + BLOCK] for start in starts}
    todo |= {"queries": firsts[:QUERIES]}
    embed = None
    for name, some in todo.items():
        if (folder / f"{name}.npy").exists():
            continue
        embed = embed or Embedder()
        np.save(folder / f"{name}.partial.npy", embed(some))
        (folder / f"{name}.partial.npy").rename(folder / f"{name}.npy")
    found = [np.load(folder / f"{name}.npy") for name in todo]
    _, packages = np.unique(names, return_inverse=True)
    return Passages(np.concatenate(found[:-1]), found[-1], packages)


def measure(passages: Passages) -> Iterator[Row]:
    """Yield the rows of the table."""
    vectors, queries = passages.vectors, passages.queries
    n, dim = vectors.shape
    ids = np.arange(n)
    _, truth = exact_topk(queries, [(vectors, ids)], K)
    for factory in (f"IVF{choose_nlist(n)},SQ8", "HNSW32"):
        index = faiss.index_factory(dim, check_factory(factory, dim, Metric.L2).factory, Metric.L2.faiss)
        index.train(vectors)
        index.add_with_ids(vectors, ids)
        largest = choose_nlist(n) if factory.startswith("IVF") else n
        smallest = 1 if factory.startswith("IVF") else K
        tuning = tune_effort(
            lambda effort, index=index: search(index, queries, K, effort=effort)[1],
            truth,
            TARGET,
            largest,
            k=K,
            smallest=smallest,
            measure_ceiling=False,
        )
        effort = tuning.chosen.effort
        for passes, marks_of in (("at random", _at_random), ("whole packages", _packages)):
            for share in SHARES:
                marks = marks_of(passages, share)
                wider = min(largest, round(effort / share))
                efforts = (effort, wider, largest)
                found = [_ask(index, queries, marks, some, passages) for some in efforts]
                yield Row(factory, passes, share, efforts, *zip(*found, strict=True))


def _at_random(passages: Passages, share: float) -> npt.NDArray[np.bool_]:
    marks = np.zeros(len(passages.vectors), np.bool_)
    marks[np.random.default_rng(SEED).permutation(len(marks))[: round(share * len(marks))]] = True
    return marks


def _packages(passages: Passages, share: float) -> npt.NDArray[np.bool_]:
    """Mark whole packages, in any order, until the share is there; of the last one a part."""
    marks = np.zeros(len(passages.vectors), np.bool_)
    places = np.random.default_rng(SEED).permutation(int(passages.packages.max()) + 1)
    marks[np.argsort(places[passages.packages], kind="stable")[: round(share * len(marks))]] = True
    return marks


def _ask(
    index: faiss.Index, queries: FloatArray, marks: npt.NDArray[np.bool_], effort: int, passages: Passages
) -> tuple[float, float]:
    """Return recall@K and milliseconds a query."""
    among = select(index, lambda ids: marks[ids])
    _, truth = exact_topk(queries, [(passages.vectors[marks], np.flatnonzero(marks))], K)
    search(index, queries[:20], K, effort=effort, among=among)
    started = time.perf_counter()
    _, found = search(index, queries, K, effort=effort, among=among)
    spent = time.perf_counter() - started
    return measure_recall(found, truth, K).value, 1000 * spent / len(queries)


def to_markdown(rows: list[Row], passages: Passages) -> str:
    """Return the table."""
    n, dim = passages.vectors.shape
    lines = [
        f"{n:,} passages of {dim} dimensions in {int(passages.packages.max()) + 1:,} packages, "
        f"{len(passages.queries):,} queries; effort tuned for recall@{K} {TARGET} among all.",
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
    parser.add_argument("--vectors", type=Path, required=True, help="folder of what is embedded")
    parser.add_argument("--limit", type=int, default=20_000, help="most passages")
    arguments = parser.parse_args()
    passages = embedded(arguments.vectors, arguments.limit)
    faiss.omp_set_num_threads(1)
    rows = []
    for row in measure(passages):
        rows.append(row)
        print(asdict(row), file=sys.stderr, flush=True)
    print(to_markdown(rows, passages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
