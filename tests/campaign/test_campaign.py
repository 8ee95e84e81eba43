"""The fault campaign: its trials can be repeated, its summary adds up, and a short one ends well."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.campaign.__main__ import main
from tests.campaign.corpus import BAD_QUERIES, CHANGES, QUERIES, QUERY_LINES, queries
from tests.campaign.foreign import APART, IN_THE_WAY, OUR_CARD, OUR_SHARD, OUTSIDE
from tests.campaign.jobs import Models, run_settings
from tests.campaign.moments import JOBS, RERANK, SEARCH, STEPS
from tests.campaign.schedule import Trial, draw
from tests.campaign.summary import as_markdown, summarise


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return [draw(1, number) for number in range(400)]


def test_a_trial_is_drawn_again_from_seed_and_number(trials: list[Trial]) -> None:
    assert trials == [draw(1, number) for number in range(400)]
    assert trials[7] != draw(2, 7)


def test_every_blow_falls_on_every_job_that_it_can_hit(trials: list[Trial]) -> None:
    struck = {(life.job, blow.what) for trial in trials for life in trial.lives() for blow in life.blows}
    everywhere = {"driver", "sigterm", "worker", "store", "raylet", "node", "requester"}
    assert {(job, what) for job in JOBS for what in everywhere} <= struck
    assert {job for job, what in struck if what == "model"} == {"embed", "search", "rerank"}
    assert {job for job, what in struck if what == "searcher"} == {"index", "search"}
    steps = {
        (life.job, blow.when.step)
        for trial in trials
        for life in trial.lives()
        for blow in life.blows
        if blow.when.step
    }
    assert len(steps) > 0.9 * sum(len(STEPS[job]) for job in JOBS)


def test_every_change_comes_with_and_without_chunks_and_with_each_reuse(trials: list[Trial]) -> None:
    drawn = {(trial.change, trial.chunked) for trial in trials}
    assert drawn == {(change, chunked) for change in (None, *CHANGES) for chunked in (True, False)}
    drawn = {(trial.change, trial.reuse) for trial in trials}
    assert drawn == {(change, reuse) for change in (None, *CHANGES) for reuse in ("object", "corpus")}


def test_trials_hold_every_kind_of_run(trials: list[Trial]) -> None:
    titles = {title for trial in trials for title in trial.jobs()}
    assert titles == {
        "embed",
        "index",
        "search (exact)",
        "search (index)",
        "search (reranked)",
        "rerank",
    }
    asked = [[leg.asked for leg in trial.legs] for trial in trials]
    for legs in asked:
        for before, after in pairwise(legs):
            assert before.content != after.content  # a run of its own, in the folders of the other
    for changed in ("k", "depth", "tag", "max_length"):
        assert any(getattr(a, changed) != getattr(b, changed) for legs in asked for a, b in pairwise(legs))
    assert {leg.outside for legs in asked for leg in legs if leg.job == RERANK or leg.reranks} == {
        True,
        False,
    }
    assert all(trial.indexes or all(leg.asked.exact for leg in trial.legs) for trial in trials)


def test_every_foreign_file_is_laid_in_some_trial(trials: list[Trial]) -> None:
    laid = {foreign.path for trial in trials for foreign in trial.foreign}
    known = {path for table in (APART, IN_THE_WAY) for paths in table.values() for path in paths}
    assert laid == {*known, *OUTSIDE, OUR_CARD, OUR_SHARD}
    assert any(foreign.run > 0 for trial in trials for foreign in trial.foreign)
    # What lies at a name of ours must be there first: later it would be laid over nothing, or over our file.
    named = {OUR_CARD, OUR_SHARD, *(path for paths in IN_THE_WAY.values() for path in paths)}
    assert all(f.run == 0 for trial in trials for f in trial.foreign if f.path in named)


def test_folders_and_settings_agree(trials: list[Trial]) -> None:
    models = Models(Path("encoder"), Path("reranker"))
    for asked in {leg.asked for trial in trials for leg in trial.legs}:
        folders = asked.folders("out/trial")
        settings = run_settings(asked, "out/trial", models)
        first = settings["search.output"] if asked.job == SEARCH else settings["rerank.output"]
        assert first == f"s3://{folders[0]}"
        if asked.outside:
            assert settings["rerank.output"] == f"s3://{folders[-1]}" == "s3://out/trial/reranked"


def test_queries_are_texts_of_the_corpus_and_some_bad_lines() -> None:
    lines = queries().splitlines(keepends=True)
    assert len(lines) == QUERY_LINES == QUERIES + 3
    bad = BAD_QUERIES.splitlines(keepends=True)
    good = [json.loads(line) for line in lines if line not in bad]
    assert len({line["_id"] for line in good}) == QUERIES
    assert all(line["text"].strip() for line in good)


def test_the_summary_adds_up() -> None:
    line = {
        "trial": 0,
        "jobs": ["embed", "index", "search (exact)"],
        "cluster": True,
        "change": None,
        "chunked": True,
        "reuse": "corpus",
        "grace_s": 5,
        "blows": [["driver @ request 3", "store @ 1.0 s"], [], []],
        "noise": {"503": 2},
        "runs": 3,
        "exit_codes": [-9, 0, 0],
        "foreign": {"laid": 7, "touched": [], "refused": 1},
        "reports": 3,
        "run_files": {"compared": 2, "same_bytes": 1},
        "rows": 725,
        "lost": 0,
        "doubled": 0,
        "outcome": "ok",
        "seconds": 10.0,
    }
    touched = {"laid": 5, "touched": ["run/notes.md"], "refused": 0}
    bad = line | {"trial": 1, "lost": 3, "outcome": "3 rows lost, 0 doubled", "foreign": touched}
    summary = summarise([line, bad])
    assert (summary["trials"], summary["ok"], summary["broken"]) == (2, 1, [1])
    assert (summary["kills"], summary["injected"]) == ({"driver": 2, "store": 2}, {"503": 4})
    assert (summary["rows_checked"], summary["rows_lost"], summary["rows_doubled"]) == (1450, 3, 0)
    assert summary["exit_codes"] == {"0": 4, "-9": 2}
    table = as_markdown(summary)
    for row in (
        "| rows lost | 3 |",
        "| foreign files laid | 12 |",
        "| foreign files touched | 1 |",
        "| runs refused for a foreign file in the way | 1 |",
        "| reports that said complete, each file of theirs checked | 6 |",
        "| lives that were struck at | 6 (embed 2, index 2, search (exact) 2) |",
        "of them byte for byte the clean run's | 4, 2 |",
    ):
        assert row in table


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_trials_end_well(tmp_path: Path) -> None:
    assert main(["--trials", "3", "--seed", "3", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["trials"], summary["ok"], summary["broken"]) == (3, 3, [])
    assert (summary["rows_lost"], summary["rows_doubled"]) == (0, 0)
    assert summary["rows_checked"] >= 3 * 600
    assert sum(summary["kills"].values()) >= 3
    assert (summary["foreign_touched"], summary["foreign_laid"] > 0) == (0, True)
    assert "| rows lost | 0 |" in (tmp_path / "summary.md").read_text()
