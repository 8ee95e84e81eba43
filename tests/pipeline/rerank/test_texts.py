"""Texts of candidates: the passage that was meant, wherever the corpus lies by now; on a real Ray."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bge_ray.dataset.commit import ShardWriter
from bge_ray.dataset.folder import Dataset
from bge_ray.dataset.lookup import ShardMap
from bge_ray.errors import SettingsError
from bge_ray.model.feed.chunks import Chunker, splitting_rules
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.pipeline.rerank import texts
from bge_ray.pipeline.runs.groups import CANDIDATE_SCHEMA, SPAN_SCHEMA
from bge_ray.pipeline.runs.holders import RowHolder
from bge_ray.pipeline.runs.source import open_source
from bge_ray.records.chunking import Chunking
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec, make_manifest
from bge_ray.records.ids import vector_ids
from bge_ray.records.plan import Coding, CorpusObject, Plan, Span, Unit
from bge_ray.records.schemas import REJECTED_SCHEMA, embedding_schema, hash_texts
from bge_ray.storage.objects import Storage
from tests.support.models import make_encoder
from tests.support.searches import settings_for
from tests.support.vectors import MODEL, clustered

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STORAGE = Storage(5)
TWINS = {"a/x.jsonl": {"p0": "the text in a", "p1": "one"}, "b/y.jsonl": {"p0": "the text in b", "p2": "two"}}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A corpus in which the id p0 stands in two objects, and its data set, as embed.py leaves them."""
    corpus, root = tmp_path / "corpus", str(tmp_path / "data")
    spec = DatasetSpec(
        dataclasses.replace(MODEL, passage_instruction="passage: "), Columns("id", "text", None)
    )
    dataset = Dataset(STORAGE, root)
    dataset.create_spec(spec)
    objects, markers = [], []
    for number, (name, rows) in enumerate(TWINS.items()):
        path = corpus / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in rows.items()))
        info = STORAGE.info(str(path))
        span = Span(0, info.size, 0, (len(rows),))
        objects.append(CorpusObject(number, info.uri, info.size, info.etag, Coding("jsonl", ""), (span,)))
        schema = embedding_schema(spec.model.outputs, pa.schema([]))
        vectors = pa.array(clustered(len(rows), 32, number).reshape(-1))
        table = pa.table(
            [
                pa.array(vector_ids(number, pa.array(range(len(rows))).to_numpy())),
                pa.array(list(rows)),
                hash_texts("passage: " + text for text in rows.values()),
                pa.array([5] * len(rows), pa.int32()),
                pa.array([False] * len(rows)),
                pa.FixedSizeListArray.from_arrays(vectors, type=schema.field("embedding").type),
            ],
            schema=schema,
        )
        writer = ShardWriter(STORAGE, root, spec, "zstd")
        unit = Unit(number, 0, len(rows))
        markers.append(writer.commit(unit, f"f{number}", table, REJECTED_SCHEMA.empty_table()))
    dataset.create_plan(1, Plan(tuple(objects), len(objects)))
    dataset.publish(make_manifest(spec.vector_fingerprint, markers))
    return corpus, tmp_path / "data"


def test_of_a_passage_in_chunks_the_one_that_was_found_is_read_or_all_of_it(tmp_path: Path) -> None:
    """By the spans that a chunker found, with titles, and of a corpus that was moved meanwhile."""
    rules = Chunking(
        max_tokens=40, overlap_tokens=0, boundary="sentence", language="en", titles="first", keep_text=False,
        rules=splitting_rules(),
    )  # fmt: skip
    feeder = TextFeeder(make_encoder(tmp_path / "model"), 512, passage_instruction="passage: ")
    body = "  " + "the quick brown fox jumps. a dog sleeps. " * 12
    found = Chunker(feeder, rules).cut(["fox"], [body])
    n = len(found.numbers)
    assert n > 3
    corpus, root = tmp_path / "corpus" / "x.jsonl", str(tmp_path / "data")
    corpus.parent.mkdir()
    corpus.write_text(json.dumps({"id": "p", "text": body, "title": "fox"}) + "\n")
    model = dataclasses.replace(MODEL, passage_instruction="passage: ")
    spec = DatasetSpec(model, Columns("id", "text", "title"), (), rules)
    info = STORAGE.info(str(corpus))
    dataset = Dataset(STORAGE, root)
    dataset.create_spec(spec)
    schema = embedding_schema(model.outputs, pa.schema([]), rules)
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(clustered(n, 32, 0).reshape(-1)), type=schema.field("embedding").type
    )
    ids = vector_ids(0, np.zeros(n, np.int64), found.numbers)
    starts, stops = found.spans[:, 0], found.spans[:, 1]
    columns = [ids, ["p"] * n, found.numbers, starts, stops, hash_texts(found.read)]
    columns += [[5] * n, [False] * n, vectors]
    table = pa.table([pa.array(c).cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    marker = ShardWriter(STORAGE, root, spec, "zstd").commit(
        Unit(0, 0, 1), "f", table, REJECTED_SCHEMA.empty_table()
    )
    span = Span(0, info.size, 0, (1,))
    planned = CorpusObject(0, info.uri, info.size, info.etag, Coding("jsonl", ""), (span,))
    dataset.create_plan(1, Plan((planned,), 1))
    dataset.publish(make_manifest(spec.vector_fingerprint, [marker]))
    spans = zip(found.numbers.tolist(), starts.tolist(), stops.tolist(), strict=True)
    asked = [("p", int(vector_id), span) for vector_id, span in zip(ids, spans, strict=True)]
    moved = {"corpus__uri": str(corpus.parent.rename(tmp_path / "elsewhere"))}
    read = [text.removeprefix("passage: ") for text in found.read]
    assert read[0].startswith("fox the quick")
    assert not read[1].startswith("fox")
    assert [text for text, *_ in joined(tmp_path / "data", asked, **moved)] == read
    whole = f"fox {body}".strip()
    assert [t for t, *_ in joined(tmp_path / "data", asked, **moved, rerank__reads="passage")] == [whole] * n
    # Where no chunk is named, or one that is cut otherwise here, all of the passage is read, and said to be.
    number, start, end = asked[2][2]
    others = [
        ("p", None),
        asked[1][:2],
        ("p", int(ids[2]), (number, start, end - 1)),
        ("p", 99 << 41, (0, 0, 4)),
    ]
    for text, vector_id, _, *span in joined(tmp_path / "data", others, **moved):
        assert (text, vector_id, span) == (whole, ids[0], [None] * 3)
    assert [row[3:] for row in joined(tmp_path / "data", asked, **moved)] == [span for *_, span in asked]


def joined(folder: Path, rows: list[tuple[Any, ...]], **keys: object) -> list[tuple[Any, ...]]:
    """(text, vector id, reason, and over chunks the span) of candidates by passage id, vector id, span."""
    settings = settings_for(output__uri=str(folder), **keys)
    opened = open_source(settings)
    stored = RowHolder(opened.storage, opened.root, ShardMap.of(opened.manifest))
    source = texts.open_texts(settings, opened, stored)
    chunk_columns = list(SPAN_SCHEMA) if opened.chunked else []
    table = pa.Table.from_pylist(
        [
            {"row_no": i, "query_id": "q", "query": "?", "passage_id": name, "vector_id": vector_id}
            | dict(zip(SPAN_SCHEMA.names, *span, strict=True) if span else {})
            for i, (name, vector_id, *span) in enumerate(rows)
        ],
        schema=pa.schema([*CANDIDATE_SCHEMA, *chunk_columns]),
    )
    found = texts.add_texts(table, source, depth=100)
    names = ["text", "vector_id", "reason", *(field.name for field in chunk_columns)]
    return [tuple(row[name] for name in names) for row in found.to_pylist()]


IN_A, IN_B = (int(vector_ids(number, pa.array([0]).to_numpy())[0]) for number in (0, 1))


def test_the_vector_id_says_which_of_two_passages_of_one_id_is_meant(folders: tuple[Path, Path]) -> None:
    found = joined(folders[1], [("p0", IN_B), ("p0", IN_A), ("p0", None)])
    assert found == [
        ("the text in b", IN_B, None),
        ("the text in a", IN_A, None),
        ("the text in a", IN_A, None),
    ]


def test_a_place_that_is_anothers_by_now_is_looked_up_by_its_passage_id(folders: tuple[Path, Path]) -> None:
    found = joined(folders[1], [("p2", IN_A), ("p1", 99 << 41), ("gone", IN_A)])
    assert [text for text, *_ in found] == ["two", "one", None]
    assert found[2][1:] == (None, "unknown_passage")


def test_a_moved_corpus_is_read_where_it_is_and_proven_by_its_texts(folders: tuple[Path, Path]) -> None:
    corpus, root = folders
    moved = corpus.rename(corpus.parent / "elsewhere")
    (moved / "b/y.jsonl").write_text((moved / "b/y.jsonl").read_text().replace("two", "six"))
    rows = [("p0", IN_B), ("p1", None), ("p2", None)]
    found = joined(root, rows, corpus__uri=str(moved))
    assert [text for text, *_ in found] == ["the text in b", "one", None]
    assert found[2][2] == "unreadable_text"  # of the size that was planned, and another text
    (corpus.parent / "empty").mkdir()
    with pytest.raises(SettingsError, match="has none of the 2 objects"):
        joined(root, rows, corpus__uri=str(corpus.parent / "empty"))


def test_a_changed_object_costs_its_own_candidates_and_no_others(folders: tuple[Path, Path]) -> None:
    corpus, root = folders
    (corpus / "a/x.jsonl").write_text("{}\n")
    found = joined(root, [("p0", IN_B), ("p1", None)])
    assert found[0] == ("the text in b", IN_B, None)
    assert found[1][0] is None
    assert found[1][2] == "unreadable_text"
