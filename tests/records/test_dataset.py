"""Plans, fingerprints and markers: pure facts."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.errors import DatasetMismatchError
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.columns import Columns, ColumnType
from bge_ray.records.dataset import DatasetSpec, FileFact, Manifest, Marker, make_manifest
from bge_ray.records.ids import (
    MAX_CHUNKS_PER_ROW,
    MAX_OBJECTS,
    MAX_ROWS_PER_OBJECT,
    id_range,
    split_vector_ids,
    vector_ids,
)
from bge_ray.records.model import Example, ModelSpec
from bge_ray.records.outputs import Output
from bge_ray.records.plan import (
    NO_VERSION,
    Coding,
    CorpusObject,
    Plan,
    Span,
    Unit,
    find_removal,
    unit_fingerprint,
)

TEXT = ColumnType.of(pa.string())
OUTPUT = Output("embedding", "dense", 4, "float32")
MODEL = ModelSpec("m", None, "w", "dense", (OUTPUT,), "cls", 16, True, "float32", "q: ", "")
SPEC = DatasetSpec(MODEL, Columns("id", "text", None, {"lang": TEXT}))
OBJECT = CorpusObject(3, "s3://b/x", 10, "e", Coding("jsonl"), (Span(0, 9, 0, (4, 3)), Span(9, 10, 7, (2,))))


ROW = st.integers(0, MAX_ROWS_PER_OBJECT - 1)
CHUNK = st.integers(0, MAX_CHUNKS_PER_ROW - 1)


@given(st.integers(0, MAX_OBJECTS - 1), st.lists(st.tuples(ROW, CHUNK), min_size=1))
def test_vector_ids_lead_back_to_their_places(object_no: int, places: list[tuple[int, int]]) -> None:
    rows, chunks = (np.array(numbers, dtype=np.int64) for numbers in zip(*places, strict=True))
    ids = vector_ids(object_no, rows, chunks)
    assert ids.dtype == np.int64
    assert ids.tolist() == [object_no << 41 | row << 13 | chunk for row, chunk in places]
    assert (ids >= 0).all()
    back = split_vector_ids(ids)
    assert set(back.object_no.tolist()) == {object_no}
    assert list(zip(back.row_no.tolist(), back.chunk_no.tolist(), strict=True)) == places
    assert np.argsort(ids, kind="stable").tolist() == sorted(range(len(places)), key=lambda i: places[i])


@given(st.integers(0, MAX_OBJECTS - 1), ROW, st.integers(1, 1000), CHUNK)
def test_the_ids_of_a_range_of_rows_are_a_range(object_no: int, first: int, n_rows: int, chunk: int) -> None:
    start, stop = id_range(object_no, first, n_rows)
    inside = vector_ids(object_no, np.array([first, min(first + n_rows, MAX_ROWS_PER_OBJECT) - 1]), chunk)
    assert (start <= inside).all()
    assert (inside < stop).all()
    assert start == vector_ids(object_no, np.array([first]), 0)[0]
    if first:
        assert vector_ids(object_no, np.array([first - 1]), MAX_CHUNKS_PER_ROW - 1)[0] == start - 1


def test_units_cover_their_object_without_gap() -> None:
    units = OBJECT.units()
    assert units == [Unit(3, 0, 4), Unit(3, 4, 3), Unit(3, 7, 2)]
    assert OBJECT.n_rows == 9
    assert sorted(u.name for u in units) == [u.name for u in units]


def test_a_fingerprint_changes_with_everything_that_decides_vectors() -> None:
    unit = Unit(3, 0, 4)
    base = unit_fingerprint(SPEC.rows_fingerprint, OBJECT, unit)
    others = [
        unit_fingerprint(SPEC.rows_fingerprint, dataclasses.replace(OBJECT, **{name: value}), unit)
        for name, value in {"uri": "s3://b/y", "size": 11, "etag": "f"}.items()
    ]
    others += [
        unit_fingerprint(SPEC.rows_fingerprint, OBJECT, Unit(3, 0, 5)),
        unit_fingerprint(SPEC.rows_fingerprint, OBJECT, Unit(3, 1, 4)),
    ]
    changes = {
        "weights_sha256": "v",
        "pooling": "mean",
        "max_length": 17,
        "normalize": False,
        "dtype": "float16",
    }
    changes |= {"passage_instruction": "p: ", "family": "m3"}
    changes |= {"outputs": (dataclasses.replace(OUTPUT, dim=5),)}
    for name, value in changes.items():
        spec = dataclasses.replace(SPEC, model=dataclasses.replace(MODEL, **{name: value}))
        others.append(unit_fingerprint(spec.rows_fingerprint, OBJECT, unit))
    for columns in (
        Columns("_id", "text", None),
        Columns("id", "body", None),
        Columns("id", "text", "title"),
    ):
        spec = dataclasses.replace(SPEC, columns=columns)
        others.append(unit_fingerprint(spec.rows_fingerprint, OBJECT, unit))
    with_head = dataclasses.replace(MODEL, outputs=(dataclasses.replace(OUTPUT, head="a"),))
    others.append(unit_fingerprint(dataclasses.replace(SPEC, model=with_head).rows_fingerprint, OBJECT, unit))
    # Data sets that were made before outputs had it keep their fingerprints.
    assert not any(key.endswith(".head") for key in SPEC.decisive())
    halves = dataclasses.replace(SPEC, model=MODEL.stored_as("float16"))
    others.append(unit_fingerprint(halves.rows_fingerprint, OBJECT, unit))
    assert len({base, *others}) == 1 + len(others)


@pytest.mark.parametrize("change", [{"name": "other"}, {"revision": "abc"}, {"query_instruction": ""}])
def test_what_decides_no_vector_changes_no_fingerprint(change: dict[str, str]) -> None:
    spec = dataclasses.replace(SPEC, model=dataclasses.replace(MODEL, **change))
    assert spec.rows_fingerprint == SPEC.rows_fingerprint
    spec.check_same(SPEC, "s3://b")


def test_a_mismatch_names_each_field_with_both_values() -> None:
    model = dataclasses.replace(MODEL, pooling="mean").stored_as("float16")
    spec = dataclasses.replace(SPEC, model=model)
    with pytest.raises(DatasetMismatchError) as caught:
        spec.check_same(SPEC, "s3://b/out")
    for part in (
        "s3://b/out",
        "model.pooling: there 'cls', now 'mean'",
        "model.outputs.embedding.dtype: there 'float32', now 'float16'",
    ):
        assert part in str(caught.value)


def test_records_survive_json() -> None:
    marker = Marker(Unit(3, 0, 4), "f", 3, 1, 5, 30, 1, {"empty_text": 1}, FileFact("e", 9, "s", 3), None)
    for record in (SPEC, Plan((OBJECT,), 4), marker, make_manifest("d", [marker])):
        assert from_json(type(record), to_json(record)) == record
    with pytest.raises(ValueError, match=r"^vector_fingerprint: Field required, and \d+ more$"):
        from_json(Manifest, b"{}")


def test_a_manifest_counts_and_sorts() -> None:
    facts = [(Unit(1, 0, 5), 5, 0), (Unit(0, 4, 3), 1, 2), (Unit(0, 0, 4), 4, 0)]
    manifest = make_manifest("d", [Marker(u, "f", o, r, 2 * o, 10, 0, {}, None, None) for u, o, r in facts])
    assert [m.unit for m in manifest.shards] == [Unit(0, 0, 4), Unit(0, 4, 3), Unit(1, 0, 5)]
    assert (manifest.rows_in, manifest.rows_out, manifest.rows_rejected, manifest.tokens) == (12, 10, 2, 30)
    assert manifest.vectors == 20


def test_columns_decide_rows_and_not_vectors() -> None:
    spec = dataclasses.replace(
        SPEC, columns=Columns("id", "text", "title", {"lang": TEXT, "n": ColumnType.of(pa.int64())})
    )
    assert spec.vector_fingerprint == SPEC.vector_fingerprint
    assert spec.rows_fingerprint != SPEC.rows_fingerprint
    other = dataclasses.replace(SPEC, model=dataclasses.replace(MODEL, max_length=17))
    assert other.vector_fingerprint != SPEC.vector_fingerprint


def test_what_a_plan_leaves_out_is_removed_and_what_has_another_content_is_not() -> None:
    other = dataclasses.replace(OBJECT, object_no=4, uri="s3://b/y")
    changed = dataclasses.replace(other, object_no=5, etag="f")
    removal = find_removal(Plan((OBJECT, other), 5), Plan((changed,), 6))
    assert (removal.uris, removal.rows, removal.rows_before) == (("s3://b/x",), 9, 18)
    assert str(removal) == "1 object with 9 rows (50%), such as s3://b/x"
    moved = dataclasses.replace(other, object_no=5, uri="s3://b/z")
    assert not find_removal(Plan((OBJECT, other), 5), Plan((OBJECT, moved), 6))
    unversioned = [dataclasses.replace(o, etag=NO_VERSION) for o in (OBJECT, other, moved)]
    assert find_removal(Plan(tuple(unversioned[:2]), 5), Plan((unversioned[0], unversioned[2]), 6)).uris
    assert not find_removal(None, Plan((OBJECT,), 4))
    # Files of equal size and time: the one that is new stands for one of those that are gone.
    alike = [dataclasses.replace(OBJECT, object_no=n, uri=f"s3://b/{n}.jsonl") for n in range(4)]
    removal = find_removal(Plan(tuple(alike[:3]), 5), Plan((alike[3],), 6))
    assert (len(removal.uris), removal.rows) == (2, 2 * OBJECT.n_rows)
    assert not find_removal(Plan((OBJECT,), 4), Plan((OBJECT, other), 5))


def test_what_stands_around_a_query() -> None:
    template = "<instruct>{instruction}\n<query>{query}\n<response>"
    spec = dataclasses.replace(MODEL, query_instruction="find {query} {it}", query_template=template)
    assert spec.around_query() == ("<instruct>find {query} {it}\n<query>", "\n<response>")
    assert dataclasses.replace(spec, query_instruction="").around_query() == ("", "\n<response>")
    assert MODEL.around_query() == ("q: ", "")


def test_kernels_decide_where_they_are_not_those_of_every_data_set_before() -> None:
    assert "model.kernels" not in SPEC.decisive()
    before = json.loads(to_json(SPEC))
    del before["model"]["kernels"]
    read = from_json(DatasetSpec, json.dumps(before))
    assert read == SPEC and read.model.kernels == "plain"
    fused = dataclasses.replace(SPEC, model=dataclasses.replace(MODEL, kernels="fused"))
    assert fused.vector_fingerprint != SPEC.vector_fingerprint
    with pytest.raises(DatasetMismatchError, match=r"model\.kernels: there 'plain', now 'fused'"):
        fused.check_same(read, "s3://b")


def test_templates_and_examples_decide_no_vector_and_the_last_token_does() -> None:
    spec = SPEC
    others = {"query_template": "{instruction}{query}", "examples": (Example("i", "q", "r"),)}
    asked = dataclasses.replace(spec, model=dataclasses.replace(MODEL, **others))
    assert asked.vector_fingerprint == spec.vector_fingerprint
    assert not {"model.first_token", "model.last_token"} & set(spec.decisive())
    ended = dataclasses.replace(spec, model=dataclasses.replace(MODEL, last_token="</s>"))
    assert ended.vector_fingerprint != spec.vector_fingerprint
    with pytest.raises(DatasetMismatchError, match=r"model\.last_token: there None, now '</s>'"):
        ended.check_same(spec, "out")
    assert from_json(DatasetSpec, to_json(asked)) == asked


def test_other_outputs_are_told_by_their_names_alone() -> None:
    outputs = (dataclasses.replace(SPEC.model.outputs[0], name="bm25", kind="sparse"),)
    other = dataclasses.replace(
        SPEC, model=dataclasses.replace(SPEC.model, outputs=outputs, family="bm25", pooling="cls")
    )
    with pytest.raises(DatasetMismatchError) as caught:
        other.check_same(SPEC, "s3://b/out")
    assert "(model.outputs: there ['embedding'], now ['bm25']);" in str(caught.value)
