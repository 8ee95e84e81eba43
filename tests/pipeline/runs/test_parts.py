"""Parts of units become a run: what a reranker gives beside its score goes along, row by row."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.formats.candidates import read_candidate_lists
from bge_ray.pipeline.runs.groups import CANDIDATE_SCHEMA, SPAN_SCHEMA, GroupTask, GroupUnit, Workplace
from bge_ray.pipeline.runs.intake import Rejections
from bge_ray.pipeline.runs.parts import RUN_FILES, RunOutput, part_stage, publish
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import OwnedFolder

STORAGE = Storage(20)
LAYERS = ("layer_8", "layer_16")


def scored(first_row: int, scores: list[float | None]) -> pa.Table:
    """A unit as it comes from a layer-wise reranker; a row without a score has a reason."""
    columns = {name: [None] * len(scores) for name in CANDIDATE_SCHEMA.names} | {
        "row_no": list(range(first_row, first_row + len(scores))),
        "query_id": [f"q{first_row}"] * len(scores),
        "passage_id": [f"p{i}" for i in range(len(scores))],
        "score": scores,
        "reason": [None if score is not None else "non_finite" for score in scores],
    }
    table = pa.table([columns[name] for name in CANDIDATE_SCHEMA.names], schema=CANDIDATE_SCHEMA)
    table = table.append_column("layer_16", pa.array(scores, pa.float32()))
    halves = [None if score is None else score / 2 for score in scores]
    return table.append_column("layer_8", pa.array(halves, pa.float32()))


def test_scores_of_layers_stand_beside_the_score_that_orders_the_run(tmp_path: Path) -> None:
    place = Workplace(STORAGE, str(tmp_path / "work"), 3, None)
    units = [GroupUnit(0, 3, "a" * 64), GroupUnit(3, 2, "b" * 64)]
    tables = [scored(0, [0.5, None, 2.0]), scored(3, [-1.0, 4.0])]
    for unit, table in zip(units, tables, strict=True):
        parcel = GroupTask(0, "", (unit,)).parcel().filled(table)
        part_stage(parcel.to_batch(), place, LAYERS)
    folder = OwnedFolder(STORAGE, str(tmp_path / "run"), "reranked", "rerank.output", RUN_FILES)
    output = RunOutput(folder, "tag", "score", LAYERS)
    totals = publish(STORAGE, str(tmp_path / "work"), units, [output], Rejections(), lambda totals: None)
    run = pq.read_table(tmp_path / "run" / "run.parquet")
    assert run.column_names[-3:] == ["probability", *LAYERS]
    assert run["passage_id"].to_pylist() == ["p2", "p0", "p1", "p0"]
    np.testing.assert_array_equal(run["layer_16"].to_numpy(), run["score"].to_numpy())
    np.testing.assert_array_equal(run["layer_8"].to_numpy(), run["score"].to_numpy() / 2)
    np.testing.assert_allclose(run["probability"].to_numpy(), 1 / (1 + np.exp(-run["score"].to_numpy())))
    assert (totals.pairs_rejected, totals.results["score"]) == (1, 4)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_first_stage_has_its_share_in_a_reranked_run(tmp_path: Path, share: float) -> None:
    """Two queries in one unit, their rows mixed; one pair was not scored, one query has one candidate."""
    rng = np.random.default_rng(3)
    names = ["a"] * 6 + ["b"] * 5 + ["c"]
    mixed = rng.permutation(len(names)).tolist()
    rows = [
        {
            "row_no": place,
            "query_id": names[number],
            "passage_id": f"p{number}",
            "vector_id": number,
            "first_score": float(rng.normal(0.7, 0.1)),
            "score": None if number == 3 else float(rng.normal(0, 5)),
            "reason": "no_text" if number == 3 else None,
        }
        for place, number in enumerate(mixed)
    ]
    table = pa.Table.from_pylist(rows, schema=CANDIDATE_SCHEMA)
    unit = GroupUnit(0, len(rows), "a" * 64)
    place = Workplace(STORAGE, str(tmp_path / "work"), 3, None)
    part_stage(GroupTask(0, "", (unit,)).parcel().filled(table).to_batch(), place)
    folder = OwnedFolder(STORAGE, str(tmp_path / "run"), "reranked", "rerank.output", RUN_FILES)
    output = RunOutput(folder, "tag", "score", first_stage_share=share)
    publish(STORAGE, str(tmp_path / "work"), [unit], [output], Rejections(), lambda totals: None)
    run = pq.read_table(tmp_path / "run" / "run.parquet").to_pylist()

    def shares(values: dict[str, float]) -> dict[str, float]:
        low, high = min(values.values()), max(values.values())
        return {key: (value - low) / (high - low) if high > low else 1.0 for key, value in values.items()}

    for query in "abc":
        mine = [row for row in table.to_pylist() if row["query_id"] == query and row["score"] is not None]
        first = shares({row["passage_id"]: row["first_score"] for row in mine})
        again = shares({row["passage_id"]: row["score"] for row in mine})
        truth = {key: share * first[key] + (1 - share) * again[key] for key in first}
        found = [row for row in run if row["query_id"] == query]
        assert [row["passage_id"] for row in found] == sorted(truth, key=lambda key: -truth[key])
        assert [row["rank"] for row in found] == list(range(1, len(truth) + 1))
        given = {row["passage_id"]: row for row in mine}
        for row in found:
            assert row["score"] == pytest.approx(truth[row["passage_id"]], abs=1e-12)
            assert row["first_score"] == given[row["passage_id"]]["first_score"]
            assert row["reranker_score"] == given[row["passage_id"]]["score"]
            assert row["probability"] == pytest.approx(1 / (1 + np.exp(-row["reranker_score"])), abs=1e-6)


def test_runs_over_chunks_name_them_and_a_trec_run_has_each_passage_once(tmp_path: Path) -> None:
    """Two chunks of p1 and one of p0, read back by DuckDB and as candidate lists."""
    place = Workplace(STORAGE, str(tmp_path / "work"), 3, None)
    spans = [(0, 0, 40), (3, 120, 160), (1, 35, 80)]
    found = zip(["p1", "p1", "p0"], [0.9, 0.5, 0.7], spans, strict=True)
    rows = [
        {"row_no": 0, "query_id": "q", "passage_id": name, "vector_id": number, "first_score": score}
        | dict(zip(SPAN_SCHEMA.names, span, strict=True))
        for number, (name, score, span) in enumerate(found)
    ]
    table = pa.Table.from_pylist(rows, schema=pa.schema([*CANDIDATE_SCHEMA, *SPAN_SCHEMA]))
    unit = GroupUnit(0, 1, "a" * 64)
    part_stage(GroupTask(0, "", (unit,)).parcel().filled(table).to_batch(), place, SPAN_SCHEMA.names)
    folder = OwnedFolder(STORAGE, str(tmp_path / "run"), "run", "search.output", RUN_FILES)
    output = RunOutput(folder, "tag", "first_score", spans=True)
    totals = publish(STORAGE, str(tmp_path / "work"), [unit], [output], Rejections(), lambda totals: None)
    assert totals.results["first_score"] == 3
    columns = 'rank, passage_id, vector_id, chunk_no, start, "end"'
    stored = duckdb.sql(f"select {columns} from '{tmp_path}/run/run.parquet'").fetchall()
    assert stored == [(1, "p1", 0, 0, 0, 40), (2, "p0", 2, 1, 35, 80), (3, "p1", 1, 3, 120, 160)]
    trec = (tmp_path / "run" / "run.trec").read_text()
    assert trec == "q Q0 p1 1 0.9 tag\nq Q0 p0 2 0.7 tag\n"
    rejected: list[tuple[object, ...]] = []

    def lists(path: str, *, chunks: bool) -> list[tuple[list[str], object]]:
        uri = f"{tmp_path}/run/{path}"
        read = read_candidate_lists(STORAGE, uri, lambda *why: rejected.append(why), chunks=chunks)
        return [(one.passage_ids, one.spans) for one in read]

    assert lists("run.parquet", chunks=True) == [(["p1", "p0", "p1"], [spans[0], spans[2], spans[1]])]
    assert lists("run.parquet", chunks=False) == [(["p1", "p0"], [spans[0], spans[2]])]
    assert lists("run.trec", chunks=True) == [(["p1", "p0"], None)]
    assert rejected == []
