"""What inverted lists cost: how long they take to make, and a query by BM25 and by the weights as they are.

    python tools/lists.py [--passages 200000]

Passages and queries are synthetic: tokens of a vocabulary of 30,000, few of them frequent, as words are.
"""

import argparse
import time

import numpy as np

from bge_ray.index.bm25 import TermStats
from bge_ray.index.lists import blocks_of, on_disk, search_lists
from bge_ray.records.arrays import SparseRows
from bge_ray.records.ids import CHUNK_BITS, IdArray

VOCABULARY = 30_000
PASSAGE_TOKENS, QUERY_TOKENS, QUERIES = 60, 8, 200
PART_ROWS = 16_384


def texts(rng: np.random.Generator, rows: int, tokens: int) -> SparseRows:
    """Return counts of so many tokens a row."""
    ids = np.minimum((rng.pareto(0.9, rows * tokens) * 20).astype(np.int64), VOCABULARY - 1)
    keys, counts = np.unique(np.repeat(np.arange(rows), tokens) * VOCABULARY + ids, return_counts=True)
    lengths = np.bincount(keys // VOCABULARY, minlength=rows)
    return SparseRows(
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        (keys % VOCABULARY).astype(np.int32),
        counts.astype(np.float16),
    )


def parts(rng: np.random.Generator, passages: int) -> list[tuple[SparseRows, IdArray]]:
    """Return passages as row groups of shards hold them."""
    edges = range(0, passages, PART_ROWS)
    sizes = [min(PART_ROWS, passages - start) for start in edges]
    return [
        (texts(rng, size, PASSAGE_TOKENS), (start + np.arange(size, dtype=np.int64)) << CHUNK_BITS)
        for start, size in zip(edges, sizes, strict=True)
    ]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=200_000)
    passages = parser.parse_args().passages
    rng = np.random.default_rng(0)
    rows, queries = parts(rng, passages), texts(rng, QUERIES, QUERY_TOKENS)
    started = time.process_time()
    blocks = [on_disk(block) for block in blocks_of(rows)]
    entries = sum(len(block.vectors) for block in blocks)
    spent = time.process_time() - started
    print(f"{passages:,} passages, {entries:,} entries, inverted in {spent:.1f} s of CPU")
    stats = TermStats.merged(block.terms() for block in blocks)
    for name, asked, saturation in (
        ("BM25", stats.weigh(queries), stats.saturation(1.2, 0.75)),
        ("weights", queries, None),
    ):
        started = time.process_time()
        search_lists(asked, blocks, 100, saturation=saturation)
        spent = (time.process_time() - started) / QUERIES
        print(f"100 results by {name}: {1000 * spent:.1f} ms of CPU a query")


if __name__ == "__main__":
    main()
