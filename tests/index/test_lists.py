"""Inverted lists against brute force: scores, ties by id, chunks, blocks of any size, and BM25."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from bge_ray.errors import IndexBuildError
from bge_ray.index import lists
from bge_ray.index.bm25 import TermStats
from bge_ray.index.lists import Lists, blocks_of, invert, on_disk, search_lists
from bge_ray.index.scores import sparse_scores
from bge_ray.index.topk import NO_RESULT, Results
from bge_ray.records.arrays import SparseRows
from bge_ray.records.ids import CHUNK_BITS, IdArray

VOCABULARY = 60


def sparse(rng: np.random.Generator, n: int, most: int, *, counts: bool = False) -> SparseRows:
    """Rows of 0 to ``most`` tokens with few different weights, so that many scores tie."""
    lengths = rng.integers(0, most + 1, n)
    indices = [np.sort(rng.choice(VOCABULARY, m, replace=False)) for m in lengths]
    values = rng.integers(1, 5, lengths.sum()) if counts else rng.choice([0.25, 0.5, 1.0], lengths.sum())
    return SparseRows(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate(indices).astype(np.int32),
        values.astype(np.float16),
    )


def ids_of(rng: np.random.Generator, n: int, *, chunks: bool) -> IdArray:
    if not chunks:
        return np.sort(rng.choice(10_000, n, replace=False)).astype(np.int64) << CHUNK_BITS
    rows = np.sort(rng.integers(0, n // 3, n))
    first = np.searchsorted(rows, rows)
    return (rows << CHUNK_BITS) + np.arange(n) - first


def parts_of(rows: SparseRows, ids: IdArray, edges: list[int]) -> Iterator[tuple[SparseRows, IdArray]]:
    for start, stop in itertools.pairwise(edges):
        yield rows[np.arange(start, stop)], ids[start:stop]


def brute(
    scores: np.ndarray, ids: IdArray, k: int, *, per_row: bool
) -> tuple[list[list[int]], list[list[float]]]:
    """The k best of (n_queries, n) scores above 0, ties by id, of each row one."""
    found: tuple[list[list[int]], list[list[float]]] = ([], [])
    for of_query in scores:
        order = sorted(
            (-float(score), int(name)) for score, name in zip(of_query, ids, strict=True) if score > 0
        )
        if per_row:
            seen: set[int] = set()
            order = [
                pair
                for pair in order
                if not (pair[1] >> CHUNK_BITS in seen or seen.add(pair[1] >> CHUNK_BITS))
            ]
        found[0].append([name for _, name in order[:k]])
        found[1].append([-score for score, _ in order[:k]])
    return found


def as_lists(results: Results) -> tuple[list[list[int]], list[list[float]]]:
    scores, ids = results
    kept = [row != NO_RESULT for row in ids]
    assert all(sorted(row.tolist(), reverse=True) == row.tolist() for row in kept), "a hole before a result"
    return (
        [row[some].tolist() for row, some in zip(ids, kept, strict=True)],
        [row[some].tolist() for row, some in zip(scores, kept, strict=True)],
    )


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("k", [1, 7, 1000])
@pytest.mark.parametrize("entries", [1, 400, 1_000_000])
def test_the_best_are_those_of_brute_force_however_vectors_are_dealt(
    monkeypatch: pytest.MonkeyPatch, entries: int, k: int, chunks: bool
) -> None:
    monkeypatch.setattr(lists, "BLOCK_ENTRIES", entries)
    rng = np.random.default_rng(k)
    rows, queries = sparse(rng, 300, 9), sparse(rng, 25, 6)
    ids = ids_of(rng, 300, chunks=chunks)
    blocks = list(blocks_of(parts_of(rows, ids, [0, 1, 90, 91, 250, 300])))
    assert len(blocks) == {1: 5, 1_000_000: 1}.get(entries, len(blocks))
    scores = np.stack([sparse_scores(queries[np.array([i])], rows) for i in range(len(queries))])
    truth = brute(scores, ids, k, per_row=chunks)
    for some in (blocks, blocks[::-1], [on_disk(block) for block in blocks]):
        found = as_lists(search_lists(queries, some, k, per_row=chunks))
        assert found == truth  # weights are such that every sum is exact


def bm25_scores(rows: SparseRows, queries: SparseRows, k1: float, b: float) -> np.ndarray:
    """The formula, word for word, over dictionaries."""
    passages = [as_dict(rows, i) for i in range(len(rows))]
    mean = sum(sum(passage.values()) for passage in passages) / len(passages)
    scores = np.zeros((len(queries), len(rows)))
    for q in range(len(queries)):
        for token, times in as_dict(queries, q).items():
            having = sum(token in passage for passage in passages)
            idf = math.log(1 + (len(passages) - having + 0.5) / (having + 0.5))
            for p, passage in enumerate(passages):
                count = passage.get(token, 0)
                length = sum(passage.values())
                scores[q, p] += (
                    times * idf * count / (count + k1 * (1 - b + b * length / mean)) if count else 0
                )
    return scores


def as_dict(rows: SparseRows, number: int) -> dict[int, float]:
    some = slice(rows.offsets[number], rows.offsets[number + 1])
    return dict(zip(rows.indices[some].tolist(), rows.values[some].tolist(), strict=True))


def stats_of(blocks: list[Lists]) -> TermStats:
    return TermStats.merged(block.terms() for block in blocks)


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.9, 0.4), (1.5, 0.0), (0.0, 0.75)])
def test_bm25_is_its_formula_over_the_whole_data_set(
    monkeypatch: pytest.MonkeyPatch, k1: float, b: float
) -> None:
    monkeypatch.setattr(lists, "BLOCK_ENTRIES", 300)
    rng = np.random.default_rng(1)
    rows, queries = sparse(rng, 200, 9, counts=True), sparse(rng, 20, 6, counts=True)
    ids = ids_of(rng, 200, chunks=False)
    blocks = list(blocks_of(parts_of(rows, ids, [0, 60, 120, 200])))
    assert len(blocks) > 1
    stats = stats_of(blocks)
    assert (stats.vectors, stats.length) == (200, float(rows.values.astype(float).sum()))
    found = search_lists(stats.weigh(queries), blocks, 200, saturation=stats.saturation(k1, b))
    truth = bm25_scores(rows, queries, k1, b)
    for q, (scores, names) in enumerate(zip(*found, strict=True)):
        here = names != NO_RESULT
        places = np.searchsorted(ids, names[here])
        np.testing.assert_allclose(scores[here], truth[q, places], rtol=1e-6)
        assert set(places.tolist()) == set(np.flatnonzero(truth[q] > 0).tolist())


def test_bm25_is_that_of_bm25s() -> None:
    import bm25s

    rng = np.random.default_rng(2)
    rows, queries = sparse(rng, 150, 12, counts=True), sparse(rng, 10, 5, counts=True)
    texts = [as_words(as_dict(rows, i)) for i in range(len(rows))]
    theirs = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    theirs.index(texts, show_progress=False)
    block = invert(rows, np.arange(150, dtype=np.int64))
    stats = block.terms()
    scores, ids = search_lists(stats.weigh(queries), [block], 150, saturation=stats.saturation(1.2, 0.75))
    for q in range(len(queries)):
        words = [word for word in as_words(as_dict(queries, q)) if word in theirs.vocab_dict]
        truth = theirs.get_scores(words) if words else np.zeros(150)
        ours = np.zeros(150)
        ours[ids[q][ids[q] != NO_RESULT]] = scores[q][ids[q] != NO_RESULT]
        np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-6)


def as_words(counts: dict[int, float]) -> list[str]:
    return [f"t{token}" for token, times in counts.items() for _ in range(int(times))]


def test_nothing_at_all_and_what_no_vector_has() -> None:
    nothing = SparseRows(np.zeros(3, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float16))
    block = invert(nothing, np.array([5, 9]))
    assert as_lists(search_lists(nothing, [block, on_disk(block)], 4)) == ([[], []], [[], []])
    assert as_lists(search_lists(nothing, [], 4)) == ([[], []], [[], []])
    one = SparseRows(np.array([0, 1]), np.array([7], np.int32), np.array([1.0], np.float16))
    assert as_lists(search_lists(one, [block], 4)) == ([[]], [[]])
    assert block.terms().saturation(1.2, 0.75).norms(block.sums).tolist() == [0.3, 0.3]
    np.testing.assert_allclose(block.terms().weigh(one).values, math.log1p(2.5 / 0.5))


def test_what_would_give_wrong_results_is_refused() -> None:
    one = SparseRows(np.array([0, 1, 2]), np.array([7, 7], np.int32), np.array([1.0, 2.0], np.float16))
    with pytest.raises(IndexBuildError, match="not ascending"):
        invert(one, np.array([5, 5]))
    bad = SparseRows(one.offsets, one.indices, np.array([1.0, np.nan], np.float16))
    with pytest.raises(IndexBuildError, match="no finite number"):
        invert(bad, np.array([5, 6]))
    with pytest.raises(IndexBuildError, match="k is 0"):
        search_lists(one, [], 0)
