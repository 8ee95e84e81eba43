"""What approximate search of sparse weights costs and finds, beside exact lists, on one core.

    python -m tools.sparse_speed [--passages 100000] [--tokens 100] [--queries 200]

Passages and queries are synthetic: tokens of the vocabulary of bge-m3, whose frequencies fall as words' do,
and the rarer a token, the more it weighs. Prints rows of a Markdown table: way (query_cut, heap_factor), k,
milliseconds of CPU a query, recall@k. Memory is what the process holds beyond mapped files.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from bge_ray.index.lists import blocks_of, on_disk, search_lists
from bge_ray.index.seismic import LADDER, SeismicIndex
from bge_ray.index.topk import best
from bge_ray.index.tune import measure_recall
from bge_ray.records.arrays import SparseRows
from bge_ray.records.ids import CHUNK_BITS, IdArray

VOCABULARY = 250_002
QUERY_TOKENS = 15
DEPTHS = (10, 100)
PART_ROWS = 16_384


def weights(rng: np.random.Generator, rows: int, tokens: int) -> SparseRows:
    """Return the weights of the distinct ones of so many tokens a row."""
    drawn = np.minimum((rng.pareto(0.9, rows * tokens) * 20).astype(np.int64), VOCABULARY - 1)
    keys = np.unique(np.repeat(np.arange(rows), tokens) * VOCABULARY + drawn)
    indices = (keys % VOCABULARY).astype(np.int32)
    values = rng.gamma(2.0, 0.06, len(indices)) * (0.2 + np.log1p(indices) / 10)
    lengths = np.bincount(keys // VOCABULARY, minlength=rows)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return SparseRows(offsets, indices, np.minimum(values, 1).astype(np.float16))


def parts(rng: np.random.Generator, passages: int, tokens: int) -> list[tuple[SparseRows, IdArray]]:
    """Return passages as row groups of shards hold them."""
    sizes = [min(PART_ROWS, passages - start) for start in range(0, passages, PART_ROWS)]
    starts = np.cumsum([0, *sizes])
    return [
        (weights(rng, size, tokens), (start + np.arange(size, dtype=np.int64)) << CHUNK_BITS)
        for start, size in zip(starts.tolist(), sizes, strict=False)
    ]


def held_mb() -> float:
    """Return the memory of this process beyond mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--queries", type=int, default=200)
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    queries = weights(rng, asked.queries, QUERY_TOKENS)
    rows = parts(rng, asked.passages, asked.tokens)
    began = time.process_time()
    blocks = [on_disk(block) for block in blocks_of(rows)]
    entries = sum(len(block.vectors) for block in blocks)
    print(
        f"{asked.passages:,} passages, {entries:,} weights, {len(queries.indices) / len(queries):.1f} a query"
    )
    del rows
    print(f"lists: {time.process_time() - began:.1f} s", flush=True)
    before, began = held_mb(), time.process_time()
    index = SeismicIndex(blocks, 1)
    spent = time.process_time() - began
    print(f"Seismic: {spent:.1f} s, {held_mb() - before:,.0f} MB more in memory", flush=True)
    truth = {}
    for k in DEPTHS:
        began = time.process_time()
        _, truth[k] = best(*search_lists(queries, blocks, k), k)
        each = 1000 * (time.process_time() - began) / len(queries)
        print(f"| exact | {k} | {each:.2f} | 1 |", flush=True)
    for pruning in LADDER:
        for k in DEPTHS:
            began = time.process_time()
            _, found = index.search(queries, k, pruning)
            each = 1000 * (time.process_time() - began) / len(queries)
            recall = measure_recall(found, truth[k], k).value
            way = f"{pruning.query_cut}, {pruning.heap_factor:g}"
            print(f"| {way} | {k} | {each:.2f} | {recall:.4f} |", flush=True)


if __name__ == "__main__":
    main()
