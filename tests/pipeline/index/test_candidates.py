"""What is measured of passages in chunks is what searches for passages find: against numpy; without Ray."""

import faiss
import numpy as np
import pytest

from bge_ray.index.refill import first_fetched
from bge_ray.index.search import search
from bge_ray.index.topk import NO_RESULT, exact_topk
from bge_ray.index.tune import measure_recall
from bge_ray.pipeline.index.candidates import (
    Asked,
    Candidates,
    HeldOut,
    drop_own,
    first_chunks,
    passages_at,
)
from bge_ray.records.ids import vector_ids
from tests.support.vectors import clustered

DIM = 32
SIZES = [400, *([1, 2, 9, 30] * 20)]  # one passage crowds out the others


@pytest.fixture(scope="module")
def made() -> tuple[np.ndarray, np.ndarray, faiss.Index]:
    vectors = clustered(sum(SIZES), DIM, seed=1)
    rows = np.repeat(np.arange(len(SIZES)), SIZES)
    numbers = np.arange(len(vectors)) - np.repeat(np.cumsum(SIZES) - SIZES, SIZES)
    ids = vector_ids(0, rows, numbers)
    index = faiss.index_factory(DIM, "IVF16,SQ4", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add_with_ids(vectors, ids)
    return vectors, ids, index


def held_out(vectors: np.ndarray, ids: np.ndarray, *, own: bool, depth: int) -> HeldOut:
    drawn = np.arange(0, len(vectors), 37)
    queries = vectors[drawn] if own else clustered(len(drawn), DIM, seed=5)
    _, truth = exact_topk(queries, [(vectors, ids)], depth + own, per_row=True)
    mine = ids[drawn] if own else None
    return HeldOut(queries, mine, truth if mine is None else drop_own(truth, mine, per_row=True), "", True)


def brute(some: HeldOut, vectors: np.ndarray, ids: np.ndarray, k: int) -> list[list[int]]:
    """First chunks of the k best passages of each query, its own passage left out."""
    scores = some.queries.astype(np.float64) @ vectors.astype(np.float64).T
    tops = np.maximum.reduceat(scores, np.cumsum(SIZES) - SIZES, axis=1)
    if some.own is not None:
        tops[np.arange(len(tops)), some.own >> 13] = -np.inf
    return [(np.argsort(-row)[:k] << 13).tolist() for row in tops]


@pytest.mark.parametrize("own", [True, False])
def test_truth_is_of_passages_and_not_of_the_own_one(made: tuple, own: bool) -> None:
    vectors, ids, _ = made
    some = held_out(vectors, ids, own=own, depth=20)
    assert first_chunks(some.truth).tolist() == brute(some, vectors, ids, 20)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("results", "width"), [(10, 10), (10, 100), (60, 60)])
def test_the_measured_search_fills_every_place(made: tuple, own: bool, results: int, width: int) -> None:
    vectors, ids, index = made
    some = held_out(vectors, ids, own=own, depth=results)
    asked = Asked(results, len(ids), len(SIZES), 16)

    first: list[int] = []

    def found_at(effort: int) -> Candidates:
        def search_some(numbers: np.ndarray, fetched: int, effort: int) -> np.ndarray:
            first.append(fetched)
            return search(index, some.queries[numbers], fetched, effort=effort)[1]

        return passages_at(search_some, effort, width, some, asked)

    for effort in (1, 16):
        first.clear()
        found = found_at(effort)
        # It asks at first as a search does, for one more where a query finds itself.
        assert first[0] == first_fetched(results + own, width + own, len(ids), len(SIZES))
        assert found.listed.shape == (len(some.queries), results)
        assert (found.listed != NO_RESULT).all()
        assert all(len(set(row)) == results for row in found.listed.tolist())
        if own:
            assert not (found.listed == (some.own & ~8191)[:, None]).any()
        # Scoring again finds no more than the truth that was fetched, at the places of the truth.
        truth = first_chunks(some.truth)
        there = found.reached != NO_RESULT
        assert (found.reached[there] == truth[there]).all()
    listed = measure_recall(found.listed, truth, results).value
    reached = measure_recall(found.reached, truth, results).value
    assert 0.5 < listed <= 1
    assert reached >= (0.99 if width > results else listed - 0.05)
