"""Retrieval metrics of runs, by pytrec_eval, and how two runs compare over the same queries.

Every judged query counts: one that a run does not answer has 0, as under trec_eval's ``-c``. Scores are
compared as trec_eval compares them: ties by falling passage id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytrec_eval

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]
# Of one run: metric to query id to value.
PerQuery = dict[str, dict[str, float]]

PERMUTATIONS = 10_000
PERMUTED_AT_ONCE = 1_000_000
SEED = 20


@dataclass(frozen=True)
class Comparison:
    """A run against the first: difference of the means, and how likely one as large is by chance."""

    difference: float
    p_value: float
    wins: int
    losses: int
    ties: int


def metric_names(cuts: Sequence[int]) -> list[str]:
    """Return the metrics in the order in which they are shown."""
    names = [f"{name}@{k}" for name in ("nDCG", "MRR", "recall", "success") for k in sorted(cuts)]
    return [*names, "MAP"]


def measure(run: Run, qrels: Qrels, cuts: Sequence[int]) -> PerQuery:
    """Measure a run.

    Args:
        run: scores by query and passage.
        qrels: relevance by query and passage; more than 0 is relevant.
        cuts: the k of each metric that has one.

    Returns:
        For each of `metric_names` the value of every query in ``qrels``.
    """
    text = ",".join(str(k) for k in sorted(cuts))
    measures = {f"ndcg_cut.{text}", f"recall.{text}", f"success.{text}", "map"}
    judged = {query_id: dict(passages) for query_id, passages in qrels.items()}
    answered = {query_id: dict(run[query_id]) for query_id in qrels if run.get(query_id)}
    found = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(answered)
    first = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(answered)
    values: PerQuery = {name: {} for name in metric_names(cuts)}
    for query_id in qrels:
        scores = found.get(query_id, {})
        reciprocal = first.get(query_id, {}).get("recip_rank", 0.0)
        values["MAP"][query_id] = scores.get("map", 0.0)
        for k in cuts:
            values[f"nDCG@{k}"][query_id] = scores.get(f"ndcg_cut_{k}", 0.0)
            values[f"recall@{k}"][query_id] = scores.get(f"recall_{k}", 0.0)
            values[f"success@{k}"][query_id] = scores.get(f"success_{k}", 0.0)
            # trec_eval has no cut of its own: a first relevant passage beyond k is no success.
            values[f"MRR@{k}"][query_id] = reciprocal if reciprocal * k >= 1 - 1e-9 else 0.0
    return values


def mean(values: Mapping[str, float]) -> float:
    """Return the mean over queries; 0 without any."""
    return float(np.mean(list(values.values()))) if values else 0.0


def interval(values: Mapping[str, float]) -> tuple[float, float]:
    """Return where the mean over queries lies at 95 %, by a bootstrap; the same input gives the same.

    Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, the percentile interval.
    """
    found = np.array([values[query_id] for query_id in sorted(values)])
    if not len(found):
        return 0.0, 0.0
    random = np.random.default_rng(SEED)
    at_once = max(1, PERMUTED_AT_ONCE // len(found))
    means = np.concatenate(
        [
            found[random.integers(len(found), size=(min(at_once, PERMUTATIONS - start), len(found)))].mean(
                axis=1
            )
            for start in range(0, PERMUTATIONS, at_once)
        ]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def compare(values: Mapping[str, float], baseline: Mapping[str, float]) -> Comparison:
    """Compare two runs on one metric by a paired randomisation test, two-sided.

    Under the hypothesis that the runs are equally good, each query's difference might as well have the
    other sign; the p-value is the share of random signs that give a mean as far from 0. Its smallest
    value is 1 / (PERMUTATIONS + 1). The same input gives the same value.

    Source: Smucker, Allan, Carterette, "A comparison of statistical significance tests for information
    retrieval evaluation", CIKM 2007.
    """
    differences = np.array([values[query_id] - baseline[query_id] for query_id in sorted(baseline)])
    return Comparison(
        difference=float(differences.mean()) if len(differences) else 0.0,
        p_value=_p_value(differences),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        ties=int((differences == 0).sum()),
    )


def corrected(p_values: Sequence[float]) -> list[float]:
    """Return p-values of several comparisons, each so large that all may be read together.

    With one of them below 0.05, the chance that any of the hypotheses was rejected wrongly is below 0.05.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979.
    """
    found = [0.0] * len(p_values)
    largest = 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=lambda n: p_values[n])):
        largest = max(largest, (len(p_values) - place) * p_values[number])
        found[number] = min(1.0, largest)
    return found


def best(scores: Mapping[str, float], k: int) -> tuple[str, ...]:
    """Return the k best passages, in trec_eval's order."""
    return tuple(sorted(sorted(scores, reverse=True), key=lambda passage: -scores[passage])[:k])


def overlap(
    results: Mapping[str, Sequence[str]], baseline: Mapping[str, Sequence[str]], k: int
) -> float | None:
    """Return the mean share of the k best passages that two runs have in common.

    Args:
        results: passages by query, best first.
        baseline: the same of the other run.
        k: how many count; where both have fewer, the longer list is what is shared.

    Returns:
        The mean over the queries that either run answers, 0 to 1; None if there is none.
    """
    shares = []
    for query_id in sorted(results.keys() | baseline.keys()):
        ours, theirs = (set(found.get(query_id, ())[:k]) for found in (results, baseline))
        if ours or theirs:
            shares.append(len(ours & theirs) / max(len(ours), len(theirs)))
    return float(np.mean(shares)) if shares else None


def _p_value(differences: npt.NDArray[np.float64]) -> float:
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    rng = np.random.default_rng(SEED)
    # Sums of the same numbers differ in their last bits by the order in which they are added.
    observed = abs(differences.sum()) * (1 - 1e-12)
    step = max(1, PERMUTED_AT_ONCE // len(differences))
    as_far = 0
    for start in range(0, PERMUTATIONS, step):
        shape = (min(step, PERMUTATIONS - start), len(differences))
        signs = rng.integers(0, 2, shape, dtype=np.int8) * 2 - 1
        as_far += int((np.abs(signs @ differences) >= observed).sum())
    return (as_far + 1) / (PERMUTATIONS + 1)
