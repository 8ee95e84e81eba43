"""Parts of units become a run: what a reranker gives beside its score goes along, row by row."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
