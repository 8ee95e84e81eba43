"""The rules of mining by hand: margins of negative scores, the order of the rules, reproducible draws."""

from collections import Counter

import numpy as np
import pytest

from bge_ray.pipeline.mine.rules import DROPPED, VERDICTS, Results, draw, highest_allowed, judge
from bge_ray.report.mine_page import MEANINGS
from bge_ray.settings.sections import MineSettings

NO_RULES = {"copy_cosine": None, "copy_overlap": None, "relative_margin": None}


@pytest.mark.parametrize(
    ("positives", "relative", "absolute", "highest"),
    [
        ([0.8], 0.05, None, 0.76),
        ([0.9, 0.8], 0.05, None, 0.76),  # the lowest positive
        ([-4.0], 0.05, None, -4.2),  # further below, not above
        ([-4.0, 3.0], 0.25, None, -5.0),
        ([0.0], 0.5, None, 0.0),
        ([-4.0], None, 1.5, -5.5),
        ([-4.0], 0.05, 1.5, -5.5),  # the stricter of both
        ([-4.0], 0.5, 1.5, -6.0),
        ([2.0], None, None, np.inf),
    ],
)
def test_margins_are_below_the_lowest_positive_whatever_its_sign(
    positives: list[float], relative: float | None, absolute: float | None, highest: float
) -> None:
    assert highest_allowed(np.array(positives), relative, absolute) == pytest.approx(highest)


def results(**columns: list[object]) -> Results:
    n = len(next(iter(columns.values())))
    plain = {
        "same_text": [False] * n,
        "cosines": [0.0] * n,
        "overlaps": [0.0] * n,
        "scores": [0.0] * n,
        "ranks": list(range(1, n + 1)),
        "positive_scores": [1.0],
    }
    return Results(**{name: np.array(values) for name, values in (plain | columns).items()})


def test_each_rule_drops_at_its_bound_and_not_before() -> None:
    rules = MineSettings(copy_cosine=0.9, copy_overlap=0.5, relative_margin=0.5, max_score=0.4, skip=1)
    found = results(
        same_text=[False, True, False, False, False, False, False, False, False],
        cosines=[0, 0.99, 0.9, 0.89, 0, 0, 0, 0, 0],
        overlaps=[0, 0.99, 0.99, 0.5, 0.49, 0, 0, 0, 0],
        scores=[0, 9, 9, 9, 0.41, 0.4, -2, 0, 0],
    )
    verdicts = ["skipped", "same_text", "copy_by_vector", "copy_by_words", "max_score", *[None] * 4]
    assert judge(found, rules) == verdicts
    assert judge(results(scores=[0.51, 0.5]), MineSettings(relative_margin=0.5)) == ["margin", None]
    below = results(scores=[-4.19, -4.21], positive_scores=[-4.0])
    assert judge(below, MineSettings(relative_margin=0.05)) == ["margin", None]


def test_a_rule_that_is_null_drops_nothing() -> None:
    found = results(cosines=[1.0], overlaps=[1.0], scores=[5.0])
    assert judge(found, MineSettings(**NO_RULES)) == [None]


def test_a_draw_depends_on_seed_and_ids_alone() -> None:
    ids = [f"p{i}" for i in range(50)]
    scores = np.linspace(1, 0, 50)
    rules = MineSettings(sampling="random", negatives=5, seed=3)
    chosen = [ids[i] for i in draw("q", ids, scores, rules)]
    assert chosen == sorted(chosen, key=ids.index)  # best first
    assert len(set(chosen)) == 5
    shuffled = np.random.default_rng(0).permutation(50)
    again = draw("q", [ids[i] for i in shuffled], scores[shuffled], rules)
    assert [ids[shuffled[i]] for i in again] == chosen
    others = {
        tuple(draw(query, ids, scores, rules.model_copy(update={"seed": seed})))
        for query in ("q", "r")
        for seed in (3, 4)
    }
    assert len(others) == 4


def test_every_result_is_drawn_as_often() -> None:
    ids = [f"p{i}" for i in range(20)]
    rules = MineSettings(sampling="random", negatives=5)
    drawn = Counter(i for q in range(2000) for i in draw(f"q{q}", ids, np.zeros(20), rules))
    # 500 each is expected, with a deviation of 19.
    assert min(drawn.values()) > 400
    assert max(drawn.values()) < 600


def test_the_top_is_the_best_by_score_ties_by_id() -> None:
    rules = MineSettings(negatives=3)
    assert draw("q", ["c", "b", "a", "d"], np.array([1.0, 2.0, 2.0, 0.0]), rules) == [2, 1, 0]
    assert draw("q", ["c"], np.array([1.0]), rules) == [0]
    assert draw("q", [], np.array([]), rules) == []


def test_the_report_explains_every_verdict() -> None:
    assert set(MEANINGS) == set(VERDICTS)
    assert set(DROPPED) < set(VERDICTS)
