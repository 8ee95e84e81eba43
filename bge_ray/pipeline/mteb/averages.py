"""Means over the tasks of a benchmark under their right names, beside what was published. Knows no mteb.

A benchmark's mean is over its tasks, not over its kinds of tasks: each kind weighs as many tasks as it has.
A mean of which a task is missing is none.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import yaml

from bge_ray.records.reports import Mean

CMTEB_31, CMTEB_35 = "MTEB(cmn, v1)", "C-MTEB of BAAI"
# The tables of BAAI count, beside the 31 tasks, the Chinese subsets of these: without them their means are
# not those of their kinds. Which four they are is known by name only, how many of each kind by the figures.
BAAI_MORE: Mapping[str, str] = {
    "MassiveIntentClassification": "zh-CN",
    "MassiveScenarioClassification": "zh-CN",
    "AmazonReviewsClassification": "zh",
    "STS22": "zh",
}
_MEAN = "mean"


@dataclass(frozen=True)
class Average:
    """A mean by its name, over the tasks of each kind; tasks go by their names."""

    name: str
    tasks: Mapping[str, tuple[str, ...]]

    @property
    def counts(self) -> dict[str, int]:
        """How many tasks of each kind it is over."""
        return {kind: len(tasks) for kind, tasks in self.tasks.items()}

    @property
    def full_name(self) -> str:
        """The name with the number of tasks."""
        return f"{self.name}, {sum(self.counts.values())} tasks"


def mean_of_kinds(means: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """Return the mean over tasks, of the mean of each kind and how many tasks it has.

    Raises:
        KeyError: a kind has no mean.
    """
    return sum(means[kind] * count for kind, count in counts.items()) / sum(counts.values())


def means_of(average: Average, model: str, scores: Mapping[str, float], card_id: str | None) -> list[Mean]:
    """Return the mean over all tasks, then that of each kind, in per cent, with what was published.

    Args:
        average: over what.
        model: whose scores these are.
        scores: main scores by task, from 0 to 1; tasks of no concern are left alone.
        card_id: under which its authors' figures are known; None if it has none.
    """
    known = published().get(average.name, {}).get(card_id or "", {})
    kinds: dict[str, float] = {}
    found: list[Mean] = []
    for kind, tasks in average.tasks.items():
        there = [scores[task] for task in tasks if task in scores]
        score = None
        if len(there) == len(tasks):
            score = kinds[kind] = 100 * sum(there) / len(there)
        found.append(Mean(average.full_name, model, kind, len(tasks), len(there), score, known.get(kind)))
    over_all = mean_of_kinds(kinds, average.counts) if kinds.keys() == average.tasks.keys() else None
    n_tasks, done = sum(mean.tasks for mean in found), sum(mean.done for mean in found)
    total = Mean(average.full_name, model, None, n_tasks, done, over_all, known.get(_MEAN))
    return [total, *found]


def average_of(name: str, tasks: Sequence[tuple[str, str]]) -> Average:
    """Return a mean over tasks, each with its kind."""
    kinds: dict[str, tuple[str, ...]] = {}
    for kind, task in tasks:
        kinds[kind] = (*kinds.get(kind, ()), task)
    return Average(name, dict(sorted(kinds.items())))


@functools.cache
def published() -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    """Return published means by benchmark, model and kind of task; that over all is ``mean``."""
    text = resources.files(__package__).joinpath("published.yaml").read_text(encoding="utf-8")
    tables: dict[str, dict[str, dict[str, float]]] = yaml.safe_load(text)
    return tables
