"""The training files of parts made by hand: their exact content; sentence-transformers trains on them."""

import contextlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.pipeline.mine.outputs import AUDIT_SCHEMA, Mined, MinedOutput, audit_rows, tuple_schema
from bge_ray.pipeline.mine.stages import MINED_SCHEMA
from bge_ray.pipeline.runs.parts import FACTS_KEY, Totals
from bge_ray.storage.objects import Storage
from bge_ray.storage.ownership import OwnedFolder
from tests.support.models import make_cross_encoder, make_encoder

STORAGE = Storage(5)


def row(number: int, passage: str | None, verdict: str | None, score: float = 0.5, **more: object) -> dict:
    texts = {"passage_text": f"text of {passage}"} if verdict in ("positive", "negative") else {}
    texts |= {"query_text": f"query {number}"} if verdict == "positive" else {}
    base = {"row_no": number, "query_id": f"q{number}", "passage_id": passage, "verdict": verdict}
    return {**base, "score": score, "vector_id": 7, "rank": 1, **texts, **more}


def part(rows: list[dict]) -> pa.Table:
    table = pa.Table.from_pylist(rows, schema=MINED_SCHEMA)
    return table.replace_schema_metadata({FACTS_KEY: json.dumps({"mined_examples": []})})


ROWS = [
    row(0, "a", "positive", 0.9, labels='{"prompt": "Find: "}'),
    row(0, "b", "positive", 0.8),
    row(0, "c", "margin", 0.79),
    row(0, "d", "negative", 0.7),
    row(0, "e", "negative", 0.6),
    row(0, "f", "not_drawn", 0.5),
    row(1, "g", "positive", 0.9),
    row(1, "h", "negative", -0.4),
    row(1, "lost", None, None, reason="unknown_positive", detail="gone"),
    row(2, "i", "positive", 0.9),
    row(2, None, None, None, reason="no_negative", detail="none"),
]


def write(folder: Path, *parts: pa.Table, teacher: bool = False) -> tuple[Mined, Totals]:
    mined, totals = Mined(), Totals()
    owned = OwnedFolder(STORAGE, str(folder), "mined", "mine.output")
    owned.claim()
    with contextlib.ExitStack() as stack:
        writer = MinedOutput(owned, 2, teacher, mined).open(STORAGE, str(folder / "work"), stack)
        for one in parts:
            writer.write(one)
        writer.publish(totals)
    return mined, totals


def test_the_files_hold_what_the_parts_say(tmp_path: Path) -> None:
    mined, totals = write(tmp_path, part(ROWS[:6]), part(ROWS[6:]))
    lines = [json.loads(line) for line in (tmp_path / "negatives.jsonl").read_text().splitlines()]
    assert lines == [
        {
            "query_id": "q0",
            "query": "query 0",
            "pos": ["text of a", "text of b"],
            "pos_id": ["a", "b"],
            "pos_scores": [0.9, 0.8],
            "neg": ["text of d", "text of e"],
            "neg_id": ["d", "e"],
            "neg_scores": [0.7, 0.6],
            "prompt": "Find: ",
        },
        {
            "query_id": "q1",
            "query": "query 1",
            "pos": ["text of g"],
            "pos_id": ["g"],
            "pos_scores": [0.9],
            "neg": ["text of h"],
            "neg_id": ["h"],
            "neg_scores": [-0.4],
        },
    ]
    assert pq.read_table(tmp_path / "tuples.parquet").to_pylist() == [
        {
            "anchor": "query 0",
            "positive": f"text of {p}",
            "negative_1": "text of d",
            "negative_2": "text of e",
        }
        for p in ("a", "b")
    ]
    assert pq.read_table(tmp_path / "lists.parquet")["labels"].to_pylist() == [[1, 1, 0, 0], [1, 0]]
    audit = pq.read_table(tmp_path / "audit.parquet")
    assert audit.schema.equals(AUDIT_SCHEMA)
    assert [(r["passage_id"], r["kept"], r["reason"]) for r in audit.to_pylist()] == [
        ("a", False, "positive"),
        ("b", False, "positive"),
        ("c", False, "margin"),
        ("d", True, "negative"),
        ("e", True, "negative"),
        ("f", False, "not_drawn"),
        ("g", False, "positive"),
        ("h", True, "negative"),
        ("lost", False, "unknown_positive"),
        ("i", False, "positive"),
    ]
    assert (mined.queries, mined.negatives, mined.tuples) == (2, 3, 2)
    # Gaps of 0.1, 0.2 and 1.3 to the lowest positive.
    counts = dict(zip((*mined.gaps.upper_edges, "more"), mined.gaps.counts, strict=True))
    assert {edge for edge, count in counts.items() if count} == {0.15, 0.25, "more"}
    assert [fact.rows for fact in totals.files] == [2, 2, 2, 10]


def test_a_teachers_scores_stand_in_place_of_the_vectors(tmp_path: Path) -> None:
    rows = [{**one, "teacher_score": -float(number)} for number, one in enumerate(ROWS[6:8])]
    write(tmp_path, part(rows), teacher=True)
    (line,) = (tmp_path / "negatives.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["pos_scores"], record["neg_scores"]) == ([0.0], [-1.0])


def test_parts_without_a_row_make_files_without_a_row(tmp_path: Path) -> None:
    _, totals = write(tmp_path, part(ROWS[9:]))
    assert [fact.rows for fact in totals.files] == [0, 0, 0, 1]
    assert pq.read_schema(tmp_path / "tuples.parquet").equals(tuple_schema(2))
    assert len(audit_rows(part([ROWS[-1]]))) == 0


@pytest.mark.parity
def test_sentence_transformers_trains_on_the_files_as_they_are(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    from sentence_transformers import (
        CrossEncoder,
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import ListNetLoss
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    write(tmp_path / "mined", part(ROWS))
    files = {name: str(tmp_path / "mined" / f"{name}.parquet") for name in ("tuples", "lists")}
    loaded = {
        name: datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "c"))
        for name, path in files.items()
    }
    common = {"max_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    encoder = SentenceTransformer(str(make_encoder(tmp_path / "encoder")), device="cpu")
    done = SentenceTransformerTrainer(
        encoder,
        SentenceTransformerTrainingArguments(str(tmp_path / "a"), **common),
        loaded["tuples"],
        loss=MultipleNegativesRankingLoss(encoder),
    ).train()
    assert done.training_loss > 0
    reranker = CrossEncoder(str(make_cross_encoder(tmp_path / "reranker")), device="cpu")
    done = CrossEncoderTrainer(
        reranker,
        CrossEncoderTrainingArguments(str(tmp_path / "b"), **common),
        loaded["lists"],
        loss=ListNetLoss(reranker),
    ).train()
    assert done.training_loss > 0
