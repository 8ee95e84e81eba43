"""Searches among some of the vectors of an index, against brute force over those; masks at random."""

import dataclasses
from functools import cache

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ray.index.bm25 import TermStats
from bge_ray.index.factory import Metric, check_factory
from bge_ray.index.lists import blocks_of, search_lists
from bge_ray.index.search import load_index, search
from bge_ray.index.selectors import WALKED, effort_among, rescored_of_all, select
from bge_ray.index.topk import NO_RESULT, exact_topk
from bge_ray.records.arrays import SparseRows
from tests.report.samples import index_description
from tests.support.vectors import clustered

DIM, ROWS = 24, 1500
# As ids are: of three objects, and most of them 8,192 apart.
IDS = np.concatenate([(number << 41) + (np.arange(500) << 13) for number in (0, 3, 7)]) + (
    np.arange(ROWS) % 5
)
VECTORS = clustered(ROWS, DIM, seed=1)
QUERIES = clustered(8, DIM, seed=2)
FACTORIES = (
    "Flat",
    "SQ8",
    "IVF16,Flat",
    "IVF16,SQ8",
    "RR,IVF16,RaBitQ4",
    "IVF16,PQ12x4",
    "HNSW16",
    "HNSW16,SQ8",
)


@cache
def index_of(factory: str, metric: Metric = Metric.L2) -> faiss.Index:
    """As it is after it was written and mapped again."""
    made = faiss.index_factory(DIM, check_factory(factory, DIM, metric).factory, metric.faiss)
    made.train(VECTORS)
    made.add_with_ids(VECTORS, IDS)
    return load_index(faiss.serialize_index(made).tobytes())


def mask(seed: int, share: float) -> np.ndarray:
    return np.random.default_rng(seed).random(ROWS) < share


def found_among(factory: str, marks: np.ndarray, k: int, effort: int, metric: Metric = Metric.L2) -> tuple:
    wanted = IDS[marks]
    index = index_of(factory, metric)
    among = select(index, lambda ids: np.isin(ids, wanted))
    assert among.count == len(wanted)
    return search(index, QUERIES, k, effort=effort, among=among)


def recall(found: np.ndarray, marks: np.ndarray, k: int) -> float:
    _, truth = exact_topk(QUERIES, [(VECTORS[marks], IDS[marks])], k)
    real = truth != NO_RESULT
    hits = [np.isin(some[there], ours).sum() for some, there, ours in zip(truth, real, found, strict=True)]
    return float(sum(hits) / max(1, real.sum()))


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "HNSW16"])
@given(
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.002, 0.03, 0.4, 0.97, 1.0]),
    k=st.sampled_from([1, 10, 100]),
)
@settings(max_examples=12)
def test_codes_that_lose_nothing_find_the_best_of_any_some(
    factory: str, metric: Metric, seed: int, share: float, k: int
) -> None:
    """With the largest effort: all lists, or for a graph each vector that counts."""
    marks = mask(seed, share)
    scores, ids = found_among(factory, marks, k, ROWS, metric)
    true_scores, truth = exact_topk(QUERIES, [(VECTORS[marks], IDS[marks])], k)
    assert ids.shape[1] == min(k, max(1, marks.sum()))
    if not marks.any():
        assert (ids == NO_RESULT).all() and np.isneginf(scores).all()
        return
    assert set(ids.ravel().tolist()) <= set(IDS[marks].tolist())
    np.testing.assert_allclose(scores, true_scores, atol=3e-6)
    assert (ids == truth).mean() > 0.99  # neighbours closer than rounding may swap


@pytest.mark.parametrize("k", [10, 100])
@pytest.mark.parametrize("factory", FACTORIES)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.01, 0.1, 0.5, 0.9]))
@settings(max_examples=6)
def test_nothing_else_is_found_and_no_place_stays_empty(
    factory: str, k: int, seed: int, share: float
) -> None:
    marks = mask(seed, share)
    _, ids = found_among(factory, marks, k, ROWS)
    assert ids.shape[1] == min(k, marks.sum())
    assert (ids != NO_RESULT).all()
    assert all(len(set(row)) == ids.shape[1] and set(row) <= set(IDS[marks].tolist()) for row in ids.tolist())
    floor = {"RR,IVF16,RaBitQ4": 0.85, "IVF16,PQ12x4": 0.3}.get(factory, 0.95)
    assert recall(ids, marks, k) >= floor


@pytest.mark.parametrize("share", [0.9, 0.3, 0.05])
@pytest.mark.parametrize(("factory", "effort"), [("IVF16,SQ8", 4), ("HNSW16", 40), ("HNSW16,SQ8", 40)])
def test_an_effort_that_grows_as_fewer_count_finds_as_much_as_among_all(
    factory: str, effort: int, share: float
) -> None:
    everything = np.ones(ROWS, np.bool_)
    _, ids = search(index_of(factory), QUERIES, 10, effort=effort)
    before = recall(ids, everything, 10)
    parameter = "nprobe" if factory.startswith("IVF") else "efSearch"
    described = index_description(
        parameter=parameter, nlist=16 if parameter == "nprobe" else 1, ntotal=ROWS, effort=effort
    )
    marks = mask(3, share)
    wider = effort_among(described, effort, int(marks.sum()))
    assert wider > effort or share == 0.9
    _, ids = found_among(factory, marks, 10, wider)
    assert recall(ids, marks, 10) >= before - 0.03


def test_the_effort_grows_with_what_does_not_pass_up_to_all_of_it() -> None:
    lists = index_description(parameter="nprobe", nlist=256, ntotal=100_000, effort=16)
    assert [effort_among(lists, 16, n) for n in (100_000, 200_000, 50_000, 12_500, 6_250, 1)] == [
        *(16, 16, 32, 128, 256, 256)
    ]
    graph = index_description(parameter="efSearch", nlist=1, ntotal=1_000_000, effort=64)
    few = len(graph.files)
    assert effort_among(graph, 64, 500_000) == 128
    # Where a walk would compare more than there is to compare, all that passes is compared.
    border = int((64 * 1_000_000 * WALKED * few) ** 0.5)
    assert effort_among(graph, 64, border - 1) == 1_000_000
    assert effort_among(graph, 64, border + 1000) < 1_000_000
    flat = index_description(parameter=None, nlist=1, ntotal=1000, effort=1)
    assert effort_among(flat, 1, 10) == 1


def test_only_codes_that_lose_something_are_scored_again() -> None:
    described = index_description()
    factories = {"IDMap2,Flat": 0, "IVF64,Flat": 0, "IDMap2,HNSW32": 0, "IDMap2,HNSW32,Flat": 0}
    factories |= {"IVF64,SQ8": 40, "RR32,IVF64,RaBitQ": 40, "IDMap2,HNSW32,SQ8": 40, "IDMap2,SQ8": 40}
    for factory, candidates in factories.items():
        assert rescored_of_all(dataclasses.replace(described, factory=factory), 10) == candidates


def test_a_selector_holds_the_fewer_ids_and_gives_what_ties_by_id() -> None:
    index = index_of("IVF16,Flat")
    for share in (0.2, 0.8):
        marks = mask(5, share)
        among = select(index, lambda ids, marks=marks: np.isin(ids, IDS[marks]))
        assert among.held == min(marks.sum(), (~marks).sum())
    equal = faiss.index_factory(DIM, "IDMap2,Flat", faiss.METRIC_L2)
    equal.add_with_ids(np.repeat(VECTORS[:1], 400, axis=0), np.arange(400)[::-1].copy())
    among = select(equal, lambda ids: ids % 3 == 0)
    _, ids = search(equal, VECTORS[:1], 5, among=among)
    assert ids.tolist() == [[0, 3, 6, 9, 12]]


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.05, 0.5, 1.0]), k=st.sampled_from([3, 40]))
@settings(max_examples=10)
def test_lists_find_the_best_of_any_some(
    per_row: bool, weighed: bool, seed: int, share: float, k: int
) -> None:
    """As a search among all for all there is, with the others taken out; what words are worth stays."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(300, 120, replace=False)).astype(np.int64)
    ids = (ids // 3 << 13) + ids % 3
    rows, queries = random_rows(rng, len(ids)), random_rows(rng, 4)
    blocks = [*blocks_of([(rows, ids)])]
    stats = TermStats.merged(block.terms() for block in blocks)
    saturation = stats.saturation(1.2, 0.75) if weighed else None
    queries = stats.weigh(queries) if weighed else queries
    # Of chunks of one row all pass, or none.
    wanted = ids[(rng.random(200) < share)[ids >> 13]]

    def passes(asked: np.ndarray) -> np.ndarray:
        return np.isin(asked, wanted)

    scores, found = search_lists(queries, blocks, k, saturation=saturation, per_row=per_row, passes=passes)
    true_scores, truth = search_lists(queries, blocks, 1000, saturation=saturation, per_row=per_row)
    for number in range(4):
        there = found[number][found[number] != NO_RESULT]
        keep = passes(truth[number])
        assert there.tolist() == truth[number][keep][:k].tolist()
        assert scores[number][: len(there)].tolist() == true_scores[number][keep][:k].tolist()


def random_rows(rng: np.random.Generator, n: int) -> SparseRows:
    lengths = rng.integers(0, 6, n)
    indices = np.concatenate([np.sort(rng.choice(30, size, replace=False)) for size in lengths])
    values = rng.integers(1, 5, len(indices)).astype(np.float32)
    return SparseRows(np.concatenate([[0], np.cumsum(lengths)]), indices.astype(np.int32), values)
