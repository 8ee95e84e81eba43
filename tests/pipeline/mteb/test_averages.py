"""Means over tasks: those that were published follow from their kinds by the code that averages."""

import pytest

from bge_ray.pipeline.mteb.averages import Average, average_of, mean_of_kinds, means_of, published
from bge_ray.pipeline.mteb.tasks import find_benchmark

pytestmark = pytest.mark.long

# What is published is rounded to a hundredth, and so are the means of kinds that it is made of.
ROUNDED = 0.011
# Rows of the Chinese table whose mean is not that of their kinds: models older than version 1.5, and those
# of others.
ASTRAY = {
    "BAAI/bge-large-zh",
    "BAAI/bge-large-zh-noinstruct",
    "BAAI/bge-base-zh",
    "BAAI/bge-small-zh",
    "intfloat/multilingual-e5-large",
    "intfloat/multilingual-e5-base",
    "intfloat/multilingual-e5-small",
}


@pytest.mark.parametrize(
    ("name", "known", "n_tasks"),
    [
        ("MTEB(eng, v1)", "MTEB(eng, v1)", 56),
        ("MTEB", "MTEB(eng, v1)", 56),
        ("MTEB(eng, v2)", "MTEB(eng, v2)", 41),
        ("MTEB(cmn, v1)", "MTEB(cmn, v1)", 31),
        ("C-MTEB of BAAI", "C-MTEB of BAAI", 35),
    ],
)
def test_a_benchmark_has_its_number_of_tasks_under_its_right_name(
    name: str, known: str, n_tasks: int
) -> None:
    tasks, average = find_benchmark(name)
    assert len(tasks) == n_tasks
    assert average.full_name == f"{known}, {n_tasks} tasks"
    assert sum(average.counts.values()) == n_tasks


@pytest.mark.parametrize("table", ["MTEB(eng, v1)", "C-MTEB of BAAI"])
def test_published_means_follow_from_their_kinds(table: str) -> None:
    counts = find_benchmark(table)[1].counts
    for model, figures in published()[table].items():
        kinds = {kind: value for kind, value in figures.items() if kind != "mean"}
        assert kinds.keys() == counts.keys()
        follows = mean_of_kinds(kinds, counts) == pytest.approx(figures["mean"], abs=ROUNDED)
        assert follows == (model not in ASTRAY), model


def test_the_31_tasks_do_not_give_the_published_mean() -> None:
    counts = find_benchmark("MTEB(cmn, v1)")[1].counts
    figures = published()["C-MTEB of BAAI"]["BAAI/bge-large-zh-v1.5"]
    assert abs(mean_of_kinds(figures, counts) - figures["mean"]) > 0.1


def test_tasks_come_to_the_mean_that_their_kinds_come_to() -> None:
    """Every task of a kind has the published mean of the kind: then all means are the published ones."""
    average = find_benchmark("C-MTEB of BAAI")[1]
    figures = published()[average.name]["BAAI/bge-base-zh-v1.5"]
    scores = {task: figures[kind] / 100 for kind, tasks in average.tasks.items() for task in tasks}
    total, *kinds = means_of(average, "ours", scores, "BAAI/bge-base-zh-v1.5")
    assert (total.type, total.tasks, total.done) == (None, 35, 35)
    assert total.score == pytest.approx(63.13, abs=ROUNDED)
    assert total.published == 63.13
    for mean in kinds:
        assert mean.score == pytest.approx(figures[mean.type])
        assert mean.published == figures[mean.type]


def test_a_mean_that_lacks_a_task_is_none() -> None:
    average = average_of("own", [("STS", "a"), ("STS", "b"), ("Retrieval", "c")])
    assert average == Average("own", {"Retrieval": ("c",), "STS": ("a", "b")})
    total, retrieval, sts = means_of(average, "m", {"a": 0.5, "c": 0.25, "other": 1.0}, None)
    assert (total.score, total.done, total.tasks) == (None, 2, 3)
    assert (retrieval.score, retrieval.published) == (25.0, None)
    assert (sts.score, sts.done) == (None, 1)
    total, _, _ = means_of(average, "m", {"a": 0.5, "b": 0.7, "c": 0.3}, None)
    assert total.score == pytest.approx(100 * (0.5 + 0.7 + 0.3) / 3)
