"""What becomes of each result of a query: the rules, as functions of numbers.

The first rule that drops a result is its verdict.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from bge_ray.settings.sections import MineSettings

Numbers: TypeAlias = npt.NDArray[np.floating]

POSITIVE, NEGATIVE, LEFT_OVER = "positive", "negative", "not_drawn"
# In the order in which they are tried.
DROPPED = (
    "same_text",
    "copy_by_vector",
    "copy_by_words",
    "max_score",
    "margin",
    "skipped",
    "teacher_margin",
)
VERDICTS = (POSITIVE, *DROPPED, LEFT_OVER, NEGATIVE)


@dataclass(frozen=True)
class Results:
    """Results of one query that are no positives: (n,) each, and the scores of its (m,) positives.

    ``cosines`` and ``overlaps`` are the highest to any positive, ``ranks`` count from 1, positives included.
    """

    same_text: npt.NDArray[np.bool_]
    cosines: Numbers
    overlaps: Numbers
    scores: Numbers
    ranks: npt.NDArray[np.integer]
    positive_scores: Numbers


def judge(results: Results, rules: MineSettings) -> list[str | None]:
    """Return the verdict on each of the (n,) results of a query; None for one that may be a negative."""
    none = np.zeros(len(results.scores), np.bool_)
    bound = highest_allowed(results.positive_scores, rules.relative_margin, rules.absolute_margin)
    broken = {
        "same_text": results.same_text,
        "copy_by_vector": none if rules.copy_cosine is None else results.cosines >= rules.copy_cosine,
        "copy_by_words": none if rules.copy_overlap is None else results.overlaps >= rules.copy_overlap,
        "max_score": none if rules.max_score is None else results.scores > rules.max_score,
        "margin": results.scores > bound,
        "skipped": results.ranks <= rules.skip,
    }
    return [
        next((rule for rule in DROPPED if rule in broken and broken[rule][i]), None)
        for i in range(len(results.scores))
    ]


def highest_allowed(positives: Numbers, relative: float | None, absolute: float | None) -> float:
    """Return the highest score that keeps the margins to the lowest of some positives.

    A relative margin is a part of that score without its sign: below -4, a twentieth leads to -4.2.

    Args:
        positives: (m,) scores, m at least 1.
        relative: part of the score; None for no such margin.
        absolute: difference of scores; None for no such margin.
    """
    lowest = float(positives.min())
    bounds = [np.inf]
    if relative is not None:
        bounds.append(lowest - relative * abs(lowest))
    if absolute is not None:
        bounds.append(lowest - absolute)
    return float(min(bounds))


def draw(query_id: str, passage_ids: Sequence[str], scores: Numbers, rules: MineSettings) -> list[int]:
    """Return the positions of the negatives among (n,) results that are left, best first.

    Whether one is drawn at random depends on the seed and the ids alone, not on the order of the results.
    """
    best = sorted(range(len(passage_ids)), key=lambda i: (-scores[i], passage_ids[i]))
    if rules.sampling == "top":
        return best[: rules.negatives]
    lots = [_lot(rules.seed, query_id, passage_ids[i]) for i in best]
    chosen = sorted(range(len(best)), key=lambda place: lots[place])[: rules.negatives]
    return [best[place] for place in sorted(chosen)]


def _lot(seed: int, query_id: str, passage_id: str) -> bytes:
    return hashlib.blake2b(json.dumps([seed, query_id, passage_id]).encode(), digest_size=16).digest()
