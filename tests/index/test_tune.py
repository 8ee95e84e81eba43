"""Recall with its interval, tuning by bisection, and the drift of list sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.errors import IndexBuildError
from bge_ray.index.drift import drift, imbalance
from bge_ray.index.tune import measure_recall, rescored, tune_effort, wilson


def simulated(recall_of, n_queries: int = 200, k: int = 10):
    """A search whose recall@k at each effort is given, and its truth."""
    truth = np.arange(n_queries * k).reshape(n_queries, k)
    calls: list[int] = []

    def search_at(effort: int) -> np.ndarray:
        calls.append(effort)
        found = np.full_like(truth, -1)
        right = round(recall_of(effort) * truth.size)
        found.ravel()[:right] = truth.ravel()[:right]
        return found

    return search_at, truth, calls


@pytest.mark.slow
@given(needed=st.integers(1, 500), largest=st.integers(1, 500))
def test_smallest_effort_is_found_in_few_searches(needed, largest):
    search_at, truth, calls = simulated(lambda effort: 0.95 if effort >= needed else 0.9)
    tuning = tune_effort(search_at, truth, 0.95, largest)
    assert tuning.reached == (needed <= largest)
    assert tuning.chosen.effort == min(needed, largest)
    assert len(calls) == len(set(calls)) <= 20
    assert [point.effort for point in tuning.curve] == sorted(calls)


def test_unreachable_target_is_a_result_with_its_ceiling():
    search_at, truth, _ = simulated(lambda effort: min(0.8, effort / 10))
    tuning = tune_effort(search_at, truth, 0.99, 1000)
    assert not tuning.reached
    assert tuning.chosen.effort == 1000
    assert tuning.ceiling is not None
    assert tuning.ceiling.at(10).value == pytest.approx(0.8)


def test_ceiling_is_measured_on_request_only():
    for wanted in (True, False):
        search_at, truth, calls = simulated(lambda effort: min(1, effort / 10))
        tuning = tune_effort(search_at, truth, 0.5, 64, measure_ceiling=wanted)
        assert tuning.chosen.effort == 5
        assert (tuning.ceiling is not None) == (64 in calls) == wanted


@pytest.mark.parametrize(
    ("target", "largest", "k"), [(0, 4, 10), (1.1, 4, 10), (0.9, 0, 10), (0.9, 4, 11), (0.9, 4, 100)]
)
def test_impossible_tuning_is_refused(target, largest, k):
    search_at, truth, _ = simulated(lambda effort: 1)
    with pytest.raises(IndexBuildError):
        tune_effort(search_at, truth, target, largest, k=k)


def test_recall_counts_by_hand():
    truth = np.array([[1, 2, 3], [4, 5, -1], [-1, -1, -1]])
    found = np.array([[3, 9, 1, 2], [-1, 5, 7, 8], [1, 2, 3, 4]])
    recall = measure_recall(found, truth, 3)
    assert recall.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert measure_recall(found, truth, 1).value == 0
    assert recall.low < recall.value < recall.high


@pytest.mark.parametrize(
    ("found", "truth"),
    [
        (np.ones((2, 3)), np.ones((3, 3))),
        (np.ones((2, 2)), np.ones((2, 3))),
        (np.ones((2, 3)), np.ones((2, 2))),
        (np.ones((2, 3)), np.full((2, 3), -1)),
        (np.ones((0, 3)), np.ones((0, 3))),
    ],
)
def test_recall_refuses_what_cannot_be_compared(found, truth):
    with pytest.raises(IndexBuildError):
        measure_recall(found.astype(np.int64), truth.astype(np.int64), 3)


def test_rescored_candidates_are_in_the_order_of_the_truth():
    """Exact scores of candidates, by hand: the recall at each depth is that of sorting them again."""
    rng = np.random.default_rng(0)
    scores = rng.random((40, 200))
    truth = np.argsort(-scores, axis=1)[:, :20]
    candidates = np.stack([rng.permutation(200)[:60] for _ in range(40)])
    found = rescored(candidates, truth)
    for k in (1, 5, 20):
        again = [sorted(row, key=lambda i, s=s: -s[i])[:k] for row, s in zip(candidates, scores, strict=True)]
        expected = np.mean([len(set(a) & set(t[:k])) / k for a, t in zip(again, truth, strict=True)])
        assert measure_recall(found, truth, k).value == pytest.approx(expected)


def test_tuning_begins_where_efforts_begin_to_differ():
    search_at, truth, calls = simulated(lambda effort: min(1, effort / 100))
    assert tune_effort(search_at, truth, 0.1, 400, smallest=20, measure_ceiling=False).chosen.effort == 20
    assert calls == [20]
    assert tune_effort(search_at, truth, 0.5, 400, smallest=20).chosen.effort == 50


def test_wilson_against_known_values():
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    low, high = wilson(1, 1000)
    assert (round(low, 3), high) == (0.996, 1.0)
    assert wilson(0, 20)[0] == 0


@pytest.mark.slow
def test_interval_covers_the_true_recall():
    rng = np.random.default_rng(0)
    truth = np.arange(10) + np.zeros((300, 1), np.int64)
    covered = 0
    for _ in range(200):
        # Queries differ in difficulty, so results of one query hang together.
        easy = rng.beta(8, 2, (300, 1))
        recall = measure_recall(np.where(rng.random((300, 10)) < easy, truth, -1), truth, 10)
        covered += recall.low <= 0.8 <= recall.high
    assert covered >= 190


def test_imbalance():
    assert imbalance(np.full(16, 5)) == pytest.approx(1)
    assert imbalance(np.eye(1, 16)[0]) == pytest.approx(16)
    assert imbalance(np.zeros(16)) == 1


def test_imbalance_is_what_faiss_reports(make_vectors, make_trained):
    index = make_trained("IVF16,Flat").open()
    index.add_with_ids(make_vectors(500), np.arange(500))
    sizes = np.array([index.invlists.list_size(number) for number in range(16)])
    assert imbalance(sizes) == pytest.approx(index.invlists.imbalance_factor())


@pytest.mark.parametrize("n_new", [100, 3_000, 1_000_000])
@pytest.mark.parametrize("moved", [0, 0.3, 1])
def test_drift_is_the_share_that_moved(n_new, moved):
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(512, 0.7))
    old, other = np.r_[shares, np.zeros(512)], np.r_[np.zeros(512), shares]
    before = rng.multinomial(50_000, old)
    new = rng.multinomial(n_new, (1 - moved) * old + moved * other)
    assert drift(before, new) == pytest.approx(moved, abs=0.12)


def test_drift_of_nothing_and_of_the_same():
    sizes = np.array([5, 0, 7])
    assert drift(sizes, np.zeros(3, np.int64)) == 0
    assert drift(np.zeros(3, np.int64), sizes) == 0
    assert drift(sizes * 1000, sizes * 1000) == 0
    with pytest.raises(IndexBuildError, match="cannot be compared"):
        drift(sizes, np.zeros(4, np.int64))
