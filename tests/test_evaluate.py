"""Metrics against pytrec_eval and against their definitions; the evaluate job on real files."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bge_ray.dataset.folder import Dataset
from bge_ray.errors import CorpusError, OutputCollisionError, SettingsError
from bge_ray.evaluate import evaluate, plan_evaluate, short_names
from bge_ray.metrics import best, compare, corrected, mean, measure, metric_names, overlap
from bge_ray.records.canonical import to_json
from bge_ray.records.plan import Plan
from bge_ray.report.metrics_page import to_markdown
from bge_ray.settings.sections import Settings, parse_settings
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import open_folder
from tests.report.samples import search_report

pytestmark = pytest.mark.long

CUTS = (1, 3, 10)
PASSAGE = st.sampled_from([f"p{i}" for i in range(25)])
QUERY = st.sampled_from([f"q{i}" for i in range(6)])
SCORES = st.dictionaries(PASSAGE, st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=20)
QRELS = st.dictionaries(
    QUERY, st.dictionaries(PASSAGE, st.integers(0, 3), min_size=1, max_size=8), min_size=1
)


@hypothesis_settings(deadline=None, max_examples=60)
@given(run=st.dictionaries(QUERY, SCORES, max_size=6), qrels=QRELS)
def test_metrics_equal_pytrec_evals(run: dict, qrels: dict) -> None:
    ours = measure(run, qrels, CUTS)
    measures = {"ndcg_cut.1,3,10", "recall.1,3,10", "success.1,3,10", "map", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    names = {f"nDCG@{k}": f"ndcg_cut_{k}" for k in CUTS} | {f"recall@{k}": f"recall_{k}" for k in CUTS}
    names |= {f"success@{k}": f"success_{k}" for k in CUTS} | {"MAP": "map"}
    for query_id in qrels:
        for name, their_name in names.items():
            expected = theirs.get(query_id, {}).get(their_name, 0.0)  # unanswered counts as 0
            assert ours[name][query_id] == expected
        # The reciprocal rank by definition, in trec_eval's order: ties by falling passage id.
        ranked = sorted(run.get(query_id, {}), key=lambda p: (run[query_id][p], p), reverse=True)
        rank = next((i for i, p in enumerate(ranked, 1) if qrels[query_id].get(p, 0) > 0), math.inf)
        for k in CUTS:
            assert ours[f"MRR@{k}"][query_id] == pytest.approx(1 / rank if rank <= k else 0.0)
    assert set(ours) == set(metric_names(CUTS))


def test_the_comparison_finds_a_difference_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    values = {f"q{i}": float(v) for i, v in enumerate(rng.random(200))}
    same = compare(values, values)
    assert (same.difference, same.p_value, same.ties) == (0.0, 1.0, 200)
    better = {q: v + 0.05 + 0.01 * float(rng.normal()) for q, v in values.items()}
    found = compare(better, values)
    assert found.difference == pytest.approx(0.05, abs=0.005)
    assert found.p_value < 0.001
    assert compare(values, better).difference == -found.difference
    assert compare(values, better).p_value == found.p_value
    # One query of two cannot be significant, however large its difference.
    assert compare({"a": 1.0, "b": 0.5}, {"a": 0.0, "b": 0.5}).p_value == 1.0


@hypothesis_settings(max_examples=200)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.999))
def test_corrected_p_values_reject_what_holms_steps_reject(p_values: list[float], level: float) -> None:
    rejected = set()
    for step, (value, number) in enumerate(sorted((value, number) for number, value in enumerate(p_values))):
        if value * (len(p_values) - step) > level:
            break
        rejected.add(number)
    assert {number for number, value in enumerate(corrected(p_values)) if value <= level} == rejected


@given(run=SCORES, k=st.integers(1, 25))
def test_the_best_are_trec_evals_best(run: dict, k: int) -> None:
    """A judgement of one passage alone is found at k exactly if that passage is among the k best."""
    for passage in run:
        evaluator = pytrec_eval.RelevanceEvaluator({"q": {passage: 1}}, {f"recall.{k}"})
        found = evaluator.evaluate({"q": run})["q"][f"recall_{k}"] == 1.0
        assert (passage in best(run, k)) == found


def test_overlap_is_the_mean_share_of_what_two_runs_have_in_common() -> None:
    ours = {"a": ("1", "2", "3", "4"), "b": ("1",), "c": ("9",)}
    theirs = {"a": ("4", "5", "1", "0"), "b": ("2", "1", "3"), "d": ("9",), "e": ()}
    # a: 1 of 3 at 3 (1), b: 1 of 3, c and d: nothing; nobody answers e.
    assert overlap(ours, theirs, 3) == pytest.approx((1 / 3 + 1 / 3 + 0 + 0) / 4)
    assert overlap(ours, theirs, 4) == pytest.approx((2 / 4 + 1 / 3 + 0 + 0) / 4)
    assert overlap(ours, ours, 2) == 1.0
    assert overlap({}, {}, 2) is None


def test_p_values_are_uniform_where_the_runs_are_equally_good() -> None:
    rng = np.random.default_rng(3)
    values = [
        compare(
            {str(i): float(a) for i, a in enumerate(x)}, {str(i): float(b) for i, b in enumerate(y)}
        ).p_value
        for x, y in rng.random((60, 2, 40))
    ]
    assert 0.35 < np.mean(values) < 0.65
    assert np.mean(np.array(values) < 0.05) <= 0.15


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def trec(run: dict[str, dict[str, float]]) -> str:
    return "".join(f"{q} Q0 {p} 1 {s!r} t\n" for q, ps in run.items() for p, s in ps.items())


def settings_for(**keys: object) -> Settings:
    return parse_settings(None, [f"evaluate.{name}={json.dumps(value)}" for name, value in keys.items()])


def test_the_job_writes_json_markdown_and_a_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    qrels = {f"q{i}": f"p{i}" for i in range(30)}
    good = {q: {p: 2.0, "other": 1.0} for q, p in qrels.items()}
    bad = {q: {p: float(rng.random()), "other": 0.5, "more": 0.7} for q, p in list(qrels.items())[:-2]}
    bad["unjudged"] = {"p1": 1.0}
    first, second = write(tmp_path, "a/run.trec", trec(good)), write(tmp_path, "b/run.trec", trec(bad))
    beir = write(
        tmp_path,
        "qrels.tsv",
        "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{p}\t1\n" for q, p in qrels.items()),
    )
    classic = write(tmp_path, "qrels.txt", "".join(f"{q} 0 {p} 1\n" for q, p in qrels.items()))
    out = tmp_path / "out"
    metrics = evaluate(settings_for(run=[str(tmp_path / "a"), second], qrels=beir, output=str(out), k=[1, 3]))
    assert metrics == json.loads((out / "metrics.json").read_text())
    one, two = metrics["runs"]
    assert (one["name"], two["name"]) == ("a", "b")
    assert one["mean"]["MRR@3"] == 1.0
    assert (two["unanswered"], two["unjudged"], two["queries"]) == (2, 1, 29)
    assert two["per_query"]["MAP"]["q29"] == 0.0
    assert two["mean"]["MAP"] == pytest.approx(mean(two["per_query"]["MAP"]))
    against = two["against_baseline"]["MRR@3"]
    assert against["difference"] == pytest.approx(two["mean"]["MRR@3"] - 1.0)
    assert against["p_value"] < 0.01
    text = (out / "metrics.md").read_text()
    assert text == to_markdown(metrics)
    assert "| MRR@3 | 1.0000 |" in text
    assert "2 judged queries without an answer" in text
    picture = (out / "metrics.svg").read_bytes()
    assert picture.lstrip().startswith(b"<?xml")
    assert b"<svg" in picture
    evaluate(settings_for(run=[first, second], qrels=classic, output=str(out), k=[1, 3]))
    assert (out / "metrics.svg").read_bytes() == picture  # the same input gives the same picture
    alone = evaluate(settings_for(run=first, qrels=classic))
    assert alone["runs"][0]["against_baseline"] == {}


def test_what_is_no_run_is_refused_and_a_bad_line_is_counted(tmp_path: Path) -> None:
    qrels = write(tmp_path, "qrels.txt", "q 0 p 1\n")
    good = write(tmp_path, "good.trec", "q Q0 p 1 0.5 t\n")
    with pytest.raises(SettingsError, match=r"evaluate\.run"):
        evaluate(settings_for(qrels=qrels))
    with pytest.raises(SettingsError, match="named once"):
        evaluate(settings_for(run=[good, good], qrels=qrels))
    with pytest.raises(CorpusError, match="none of its 1 queries is judged"):
        evaluate(settings_for(run=write(tmp_path, "x.trec", "other Q0 p 1 0.5 t\n"), qrels=qrels))
    with pytest.raises(CorpusError, match="without scores"):
        records = json.dumps({"query_id": "q", "passages": ["p"]})
        evaluate(settings_for(run=write(tmp_path, "x.jsonl", records), qrels=qrels))
    bad = write(tmp_path, "bad.trec", "q Q0 p 1 0.5 t\nq Q0 p 2 0.4 t\nq Q0 r 3 many t\nfew fields\n")
    (run,) = evaluate(settings_for(run=bad, qrels=qrels))["runs"]
    assert run["left_out"] == {"duplicate_passage": 1, "malformed": 2}
    assert run["mean"]["MRR@1"] == 1.0


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (("s3://b/x/run.trec",), ["x"]),
        (("s3://b/x/run.parquet", "s3://b/y/run.parquet"), ["x", "y"]),
        (("s3://b/x/out", "s3://b/y/out"), ["x/out", "y/out"]),
        (("run.trec", "/a/run.trec"), ["run.trec", "a"]),
    ],
)
def test_names_tell_runs_apart(uris: tuple[str, ...], names: list[str]) -> None:
    assert short_names(uris) == names


def test_metrics_lie_beside_their_run_and_replace_no_file_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = str(folder / "run.trec")
    folder.mkdir()
    (folder / "run.trec").write_text("q1 Q0 d1 1 2.0 t\n")
    (tmp_path / "qrels.tsv").write_text("q1 0 d1 1\n")
    open_folder(Storage(), str(folder), "run", "search.output").claim()
    settings = settings_for(run=run, qrels=str(tmp_path / "qrels.tsv"), output=str(folder))
    evaluate(settings)
    evaluate(settings)
    before = (folder / "metrics.json").read_bytes()
    same_size = (folder / "metrics.md").read_text().swapcase()
    for theirs in ("somebody's own notes", same_size):
        (folder / "metrics.md").write_text(theirs)
        for job in (plan_evaluate, evaluate):
            with pytest.raises(OutputCollisionError, match=r"metrics\.md: is in the way .* evaluate\.output"):
                job(settings)
        assert (folder / "metrics.json").read_bytes() == before
        assert (folder / "metrics.md").read_text() == theirs


def test_lines_in_any_order_measure_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    run = {f"q{i}": {f"p{j}": float(rng.integers(0, 6)) for j in range(12)} for i in range(9)}  # with ties
    qrels = write(tmp_path, "qrels.txt", "".join(f"q{i} 0 p{i} 1\n" for i in range(9)))
    lines = trec(run).splitlines(keepends=True)
    in_order = evaluate(settings_for(run=write(tmp_path, "a.trec", "".join(lines)), qrels=qrels))
    rng.shuffle(lines)
    shuffled = evaluate(settings_for(run=write(tmp_path, "b.trec", "".join(lines)), qrels=qrels))
    one, other = in_order["runs"][0], shuffled["runs"][0]
    assert one["mean"]["MAP"] > 0.1
    assert {**one, "name": "", "uri": ""} == {**other, "name": "", "uri": ""}
    # By trec_eval itself, which is told of ties by nothing but scores and ids.
    judged = {f"q{i}": {f"p{i}": 1} for i in range(9)}
    theirs = pytrec_eval.RelevanceEvaluator(judged, {"map"}).evaluate(run)
    assert other["per_query"]["MAP"] == {q: values["map"] for q, values in theirs.items()}


def test_judgements_may_be_a_folder_with_one_file_of_them(tmp_path: Path) -> None:
    """As the BEIR layout has them beside the corpus; the dry run says no less than the job."""
    run = write(tmp_path, "run.trec", trec({"q1": {"p1": 1.0, "p2": 0.5}}))
    beir = tmp_path / "beir"
    file = write(beir, "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\tp2\t1\n")
    write(beir, "corpus.jsonl", "{}\n")
    expected = evaluate(settings_for(run=run, qrels=file))["runs"]
    assert expected[0]["mean"]["MRR@10"] == 0.5
    for folder in (beir, beir / "qrels"):
        plan_evaluate(settings_for(run=run, qrels=str(folder)))
        assert evaluate(settings_for(run=run, qrels=str(folder)))["runs"] == expected
    write(beir, "qrels/dev.tsv", "q1\tp1\t1\n")
    for job in (plan_evaluate, evaluate):
        with pytest.raises(CorpusError, match=r"holds several files.*dev\.tsv.*test\.tsv"):
            job(settings_for(run=run, qrels=str(beir)))


def test_a_result_with_the_id_of_its_query_is_ignored_if_asked(tmp_path: Path) -> None:
    """Where queries are passages, each finds itself first: nDCG@10 is 0.63 for a run that is perfect."""
    run = write(tmp_path, "x.trec", trec({"d1": {"d1": 1.0, "d2": 0.9}, "d3": {"d4": 0.5}}))
    qrels = write(tmp_path, "qrels.txt", "d1 0 d2 1\nd3 0 d4 1\n")
    (plain,) = evaluate(settings_for(run=run, qrels=qrels))["runs"]
    assert plain["per_query"]["nDCG@10"]["d1"] == pytest.approx(1 / math.log2(3))
    metrics = evaluate(settings_for(run=run, qrels=qrels, ignore_identical_ids=True))
    assert metrics["runs"][0]["per_query"]["nDCG@10"]["d1"] == 1.0
    assert metrics["runs"][0]["identical_ids"] == 1
    assert "1 results with the id of their query, ignored" in to_markdown(metrics)


def test_several_runs_are_corrected_together_and_each_query_is_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    qrels = {f"q{i:02}": f"p{i}" for i in range(40)}
    judged = write(tmp_path, "corpus/qrels/test.tsv", "".join(f"{q}\t{p}\t1\n" for q, p in qrels.items()))
    runs = []
    for number, noise in enumerate((0.8, 0.5, 0.7, 0.8)):
        found = {
            q: {p: 0.6 + noise * rng.normal(), **{f"x{j}": noise * rng.normal() for j in range(9)}}
            for q, p in qrels.items()
        }
        runs.append(write(tmp_path, f"r{number}/run.trec", trec(found)))
    out = tmp_path / "out"
    metrics = evaluate(settings_for(run=runs, qrels=str(tmp_path / "corpus"), output=str(out), k=[1, 10]))
    assert metrics == evaluate(settings_for(run=runs, qrels=judged, k=[1, 10])) | {
        "qrels": str(tmp_path / "corpus")
    }
    for metric in metrics["metrics"]:
        against = [run["against_baseline"][metric] for run in metrics["runs"][1:]]
        assert [a["p_corrected"] for a in against] == corrected([a["p_value"] for a in against])
        assert max(a["p_corrected"] for a in against) <= 1
    table = pq.read_table(out / "per_query.parquet").to_pylist()
    assert len(table) == 4 * 40
    for run in metrics["runs"]:
        rows = {row["query_id"]: row["nDCG@10"] for row in table if row["run"] == run["name"]}
        assert rows == run["per_query"]["nDCG@10"]
    text = (out / "metrics.md").read_text()
    against = metrics["runs"][1]["against_baseline"]["nDCG@10"]
    assert f"{against['wins']} queries better, {against['losses']} worse" in text
    assert b"<svg" in (out / "wins.svg").read_bytes()


def test_without_judgements_runs_are_compared_with_each_other(tmp_path: Path) -> None:
    first = write(tmp_path, "a/run.trec", trec({"q1": {"p1": 2.0, "p2": 1.0}, "q2": {"p3": 1.0}}))
    second = write(tmp_path, "b/run.trec", trec({"q1": {"p1": 2.0, "p9": 1.0}, "q2": {"p3": 1.0}}))
    (tmp_path / "b" / "report.json").write_bytes(to_json(search_report(wall_s=75.0, cost=0.5)))
    out = tmp_path / "out"
    with pytest.raises(SettingsError, match=r"evaluate\.qrels: is not set"):
        evaluate(settings_for(run=first))
    judged = write(tmp_path, "qrels.txt", "q1 0 p1 1\n")
    evaluate(settings_for(run=[first, second], qrels=judged, output=str(out)))
    metrics = evaluate(settings_for(run=[first, second], output=str(out), k=[1, 2]))
    assert metrics["runs"][1]["overlap"] == {"overlap@1": 1.0, "overlap@2": 0.75}
    text = (out / "metrics.md").read_text()
    assert "| overlap@2 with a |  | 0.7500 |" in text
    assert "b: 2 queries; made by search in 75.0 s on" in text
    # Pictures and tables of judgements that are not there any more are not left beside it.
    assert {p.name for p in out.iterdir()} == {"metrics.json", "metrics.md", "_bge_ray_metrics.json"}


def test_a_run_may_be_a_bare_name_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.trec", trec({"q1": {"p1": 2.0, "p2": 1.0}}))
    write(tmp_path, "b.trec", trec({"q1": {"p1": 2.0, "p9": 1.0}}))
    monkeypatch.chdir(tmp_path)
    metrics = evaluate(settings_for(run=["a.trec", "b.trec"], k=[2]))
    assert metrics["runs"][1]["overlap"] == {"overlap@2": 0.5}


def test_compare_is_evaluate_in_words(tmp_path: Path) -> None:
    first = write(tmp_path, "a/run.trec", trec({"q1": {"p1": 2.0, "p2": 1.0}}))
    second = write(tmp_path, "b/run.trec", trec({"q1": {"p2": 2.0, "p1": 1.0}}))
    judged = write(tmp_path, "qrels.txt", "q1 0 p1 1\n")
    words = [first, second, "--qrels", judged, "-k", "1", "-k", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "bge_ray", "compare", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (
        to_markdown(evaluate(settings_for(run=[first, second], qrels=judged, k=[1, 2]))).strip()
        in done.stdout
    )


def test_metrics_are_not_written_into_a_corpus(tmp_path: Path) -> None:
    """That of the settings, and that which a run is of; a data set that is gone says nothing."""
    runs = [write(tmp_path, f"{name}/run.trec", "q1 Q0 p1 1 1.0 t\n") for name in "ab"]
    data = Dataset(Storage(5), str(tmp_path / "data"))
    corpus = tmp_path / "corpus"
    data.create_plan(1, Plan((), 0, str(corpus)))
    (tmp_path / "b" / "report.json").write_bytes(to_json(search_report(dataset=data.root, complete=True)))
    asked = settings_for(run=runs, output=str(corpus), k=[1])
    for check in (plan_evaluate, evaluate):
        with pytest.raises(OutputCollisionError, match=r"evaluate\.output and the corpus of .*b/run"):
            check(asked)
    assert not corpus.exists()
    inside = settings_for(run=runs, output=str(corpus / "deep"), k=[1])
    with pytest.raises(OutputCollisionError, match=r"lies inside the corpus of .*b/run"):
        evaluate(inside)
    set_by_key = asked.model_copy(update={"corpus": asked.corpus.model_copy(update={"uri": str(corpus)})})
    with pytest.raises(OutputCollisionError, match=r"evaluate\.output and corpus\.uri"):
        evaluate(set_by_key)
    shutil.rmtree(data.root)
    evaluate(settings_for(run=runs, output=str(tmp_path / "c"), k=[1]))
