"""Parts of units become a run: what a reranker gives beside its score goes along, row by row."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.pipeline.runs.groups import CANDIDATE_SCHEMA, GroupTask, GroupUnit, Workplace
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
