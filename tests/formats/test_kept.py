"""Metadata columns: every value comes back from a shard as the corpus has it, in its own type."""

import csv
import datetime
import decimal
import io
import json
import tempfile
import uuid
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ray.errors import CorpusError
from bge_ray.formats.corpus import check_columns
from bge_ray.formats.inference import MAX_DEPTH, MAX_EXACT_INT, MAX_NODES
from bge_ray.formats.rows import check_rows
from bge_ray.pipeline.embed.read import unit_table
from bge_ray.pipeline.embed.write import split_rows
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.plan import Unit, UnitLimits
from bge_ray.records.schemas import hash_texts
from bge_ray.storage.objects import Storage
from tests.support.reading import compress, csv_bytes, jsonl_bytes, parquet_bytes, read, resolve, scan
from tests.support.records import DIM, make_spec, make_writer

pytestmark = pytest.mark.long

STORAGE = Storage(timeout_s=5.0)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
LIMITS = UnitLimits(max_rows=4, max_bytes=10_000, vector_bytes=0)


def through_a_shard(objects: dict[str, bytes], *names: str) -> pa.Table:
    """Return the kept columns of all rows of the objects, as a reader of the shards finds them."""
    keep = {"keep_columns": names}
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for name, data in objects.items():
            (Path(folder) / name).write_bytes(data)
            found.append(scan(STORAGE, str(Path(folder) / name), LIMITS, **keep))
        spec = make_spec()
        columns = resolve([scanned for scanned, _ in found], **keep)
        spec = from_json(DatasetSpec, to_json(DatasetSpec(spec.model, columns)))
        assert spec.columns == columns, "as another process reads it in dataset.json"
        shards = []
        for number, (_, corpus_object) in enumerate(found):
            for first_row, rows in read(STORAGE, corpus_object, spec.columns).items():
                passages, rejected = check_rows(rows)
                assert not rejected
                n = len(passages.rows)
                unit = Unit(number, first_row, n)
                table = _through_ipc(unit_table(unit, passages, []))
                table = table.append_column("text_hash", hash_texts(passages.texts))
                table = table.append_column("n_tokens", pa.array(np.ones(n, np.int32)))
                table = table.append_column("truncated", pa.array(np.zeros(n, np.bool_)))
                vectors = pa.array([[0.0] * DIM] * n, pa.list_(pa.float32(), DIM))
                shard, empty = split_rows(spec, table.append_column("embedding", vectors))
                marker = make_writer(STORAGE, folder, spec).commit(unit, "f", shard, empty)
                shards.append(pq.read_table(Path(folder) / marker.embeddings.path).select(list(names)))
        table = pa.concat_tables(shards)
        assert table.schema.equals(columns.kept_schema())
        return table


def _through_ipc(table: pa.Table) -> pa.Table:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


# --- Parquet ---------------------------------------------------------------------------------------

MOMENTS = st.datetimes(datetime.datetime(1970, 1, 2), datetime.datetime(2100, 1, 1))
LEAVES: list[tuple[pa.DataType, st.SearchStrategy]] = [
    (pa.int8(), st.integers(-128, 127)),
    (pa.uint16(), st.integers(0, 65535)),
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.float32(), st.floats(width=32, allow_nan=False)),
    (pa.float64(), st.floats(allow_nan=False)),
    (pa.bool_(), st.booleans()),
    (pa.string(), TEXT),
    (pa.large_string(), TEXT),
    (pa.binary(), st.binary(max_size=4)),
    (pa.large_binary(), st.binary(max_size=4)),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.dictionary(pa.int32(), pa.string()), TEXT),
    (pa.date32(), st.dates(datetime.date(1900, 1, 1))),
    (pa.time64("us"), st.times()),
    (pa.timestamp("us"), MOMENTS),
    (pa.timestamp("us", "Europe/Berlin"), MOMENTS.map(lambda m: m.replace(tzinfo=datetime.UTC))),
    (pa.decimal128(10, 2), st.decimals(-(10**7), 10**7, places=2)),
    (pa.decimal256(50, 3), st.decimals(-(10**20), 10**20, places=3)),
]


def _or_null(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | values


def _nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    def lists(pair: tuple) -> list[tuple]:
        kind, values = pair
        field = pa.field("x", kind)
        return [
            (pa.list_(field), st.lists(_or_null(values), max_size=3)),
            (pa.large_list(field), st.lists(_or_null(values), max_size=3)),
            (pa.list_(field, 2), st.lists(_or_null(values), min_size=2, max_size=2)),
            (pa.map_(pa.string(), kind), st.lists(st.tuples(TEXT, _or_null(values)), max_size=3)),
        ]

    def struct(pairs: dict[str, tuple]) -> tuple:
        kind = pa.struct([pa.field(name, pair[0]) for name, pair in pairs.items()])
        return kind, st.fixed_dictionaries({name: _or_null(pair[1]) for name, pair in pairs.items()})

    names = st.sampled_from(["a", "b c", "é", "list"])
    return st.one_of(
        inner.flatmap(lambda pair: st.sampled_from(lists(pair))),
        st.dictionaries(names, inner, min_size=1, max_size=3).map(struct),
    )


# pyarrow 26 does not write views of strings below a list or struct.
COLUMN = st.just((pa.string_view(), TEXT)) | st.recursive(st.sampled_from(LEAVES), _nested, max_leaves=4)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), group=st.integers(1, 9), columns=st.lists(COLUMN, min_size=1, max_size=3))
def test_any_parquet_column_keeps_its_type_and_values(data, group, columns) -> None:
    n = data.draw(st.integers(1, 9))
    table = pa.table({"id": [str(i) for i in range(n)], "text": ["x"] * n})
    for i, (kind, values) in enumerate(columns):
        drawn = data.draw(st.lists(_or_null(values), min_size=n, max_size=n))
        table = table.append_column(f"k{i}", pa.array(drawn, kind))
    names = table.column_names[2:]
    kept = through_a_shard({"a.parquet": parquet_bytes(table, row_group_size=group)}, *names)
    assert kept.to_pylist() == table.select(names).to_pylist()
    for name, (kind, _) in zip(names, columns, strict=True):
        if not pa.types.is_nested(kind):
            found = str(kept.schema.field(name).type)
            stored = {"large_string": "string", "string_view": "string", "large_binary": "binary"}
            assert found == ("string" if pa.types.is_dictionary(kind) else stored.get(str(kind), str(kind)))


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.dictionary(pa.int8(), pa.string())),
        pa.map_(pa.string(), pa.dictionary(pa.int8(), pa.string())),
    ],
)
def test_a_dictionary_below_a_list_over_several_row_groups(kind: pa.DataType) -> None:
    """Written by whoever has categories in lists; pyarrow reads such a column of one row group at a time."""
    values = [[("a", "x")], None, [("b", "y"), ("c", None)], [], [("d", "x")]]
    if pa.types.is_list(kind):
        values = [None if value is None else [v for _, v in value] for value in values]
    table = pa.table({"id": [*"12345"], "text": ["x"] * 5, "k": pa.array(values, kind)})
    kept = through_a_shard({"a.parquet": parquet_bytes(table, row_group_size=2)}, "k")
    assert kept["k"].to_pylist() == values


SELECT = """
SELECT i::VARCHAR AS id, 'text ' || i AS text, ('00000000-0000-4000-8000-00000000000' || i)::UUID AS key,
  (i + 0.25)::DECIMAL(9, 2) AS price, to_timestamp(1767319445.5 + i) AS at,
  [{'name': 'é' || i, 'parts': [i, NULL]}, NULL] AS authors, MAP {'k' || i: i} AS counts,
  CASE WHEN i = 2 THEN NULL ELSE 'b'::BLOB END AS raw, DATE '2026-01-01' + i::INTEGER AS day
FROM range(5) t(i)
"""


def test_what_duckdb_writes(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    duckdb.sql(SELECT).write_parquet(str(path))
    names = ("key", "price", "at", "authors", "counts", "raw", "day")
    kept = through_a_shard({"d.parquet": path.read_bytes()}, *names)
    second = datetime.datetime.fromtimestamp(1767319445.5, datetime.UTC)
    assert kept.to_pylist() == [
        {
            "key": uuid.UUID(f"00000000-0000-4000-8000-00000000000{i}").bytes,
            "price": decimal.Decimal(f"{i}.25"),
            "at": second + datetime.timedelta(seconds=i),
            "authors": [{"name": f"é{i}", "parts": [i, None]}, None],
            "counts": [(f"k{i}", i)],
            "raw": None if i == 2 else b"b",
            "day": datetime.date(2026, 1, 1 + i),
        }
        for i in range(5)
    ]
    author = pa.struct({"name": pa.string(), "parts": pa.list_(pa.int64())})
    types = [pa.binary(16), pa.decimal128(9, 2), pa.timestamp("us", "UTC"), pa.list_(author)]
    types += [pa.map_(pa.string(), pa.int64()), pa.binary(), pa.date32()]
    assert kept.schema.equals(pa.schema(list(zip(names, types, strict=True))))
    scanned, _ = scan(STORAGE, str(path), keep_columns=("key",))
    assert scanned.columns["key"].name == "extension<arrow.uuid>"
    assert resolve(scanned, keep_columns=("key",)).kept["key"].name == "fixed_size_binary[16] (arrow.uuid)"


def test_what_pandas_and_polars_write_goes_together(tmp_path: Path) -> None:
    rows = {
        "id": ["1", "2"],
        "text": ["x", "y"],
        "price": [decimal.Decimal("1.50"), None],
        "at": [datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC), None],
        "authors": [[{"name": "é", "n": 1}], []],
        "kind": ["a", None],
    }
    types = {
        "price": polars.Decimal(9, 2),
        "at": polars.Datetime("us", "UTC"),
        "kind": polars.Categorical(),
    }
    polars.DataFrame(rows, schema_overrides=types).write_parquet(tmp_path / "polars.parquet")
    frame = pandas.DataFrame(rows)
    frame["kind"] = frame["kind"].astype("category")
    asked = {"price": pa.decimal128(9, 2), "at": pa.timestamp("us", "UTC")}
    given_types = pa.Schema.from_pandas(frame)
    schema = pa.schema([pa.field(f.name, asked.get(f.name, f.type)) for f in given_types])
    frame.to_parquet(tmp_path / "pandas.parquet", schema=schema)
    names = ("price", "at", "authors", "kind")
    objects = {name: (tmp_path / name).read_bytes() for name in ("pandas.parquet", "polars.parquet")}
    kept = through_a_shard(objects, *names)
    assert kept.to_pylist() == 2 * [{name: rows[name][i] for name in names} for i in range(2)]


@pytest.mark.parametrize("where", ["list", "struct", "map", "fixed"])
def test_nested_text_that_is_no_utf8_is_made_valid(where: str) -> None:
    values = [b"fine", b"caf\xe9"]
    binary = pa.array(values, pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 2, binary.buffers())
    raw = pa.array([b"\xff", b"\xfe"], pa.binary())
    column, truth = {
        "list": (pa.ListArray.from_arrays([0, 1, 2], bad), [["fine"], ["caf\ufffd"]]),
        "fixed": (pa.FixedSizeListArray.from_arrays(bad, 1), [["fine"], ["caf\ufffd"]]),
        "struct": (
            pa.StructArray.from_arrays([bad, raw], ["s", "raw"]),
            [{"s": "fine", "raw": b"\xff"}, {"s": "caf\ufffd", "raw": b"\xfe"}],
        ),
        "map": (
            pa.MapArray.from_arrays([0, 1, 2], bad, raw),
            [[("fine", b"\xff")], [("caf\ufffd", b"\xfe")]],
        ),
    }[where]  # fmt: skip
    table = pa.table({"id": ["1", "2"], "text": ["x", "y"], "k": column})
    kept = through_a_shard({"a.parquet": parquet_bytes(table)}, "k")
    assert kept["k"].to_pylist() == truth


# --- JSONL -----------------------------------------------------------------------------------------

JSON_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-5, 5),
    st.floats(allow_nan=False, allow_infinity=False), TEXT,
)  # fmt: skip
JSON_VALUE = st.recursive(
    JSON_SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


def says_the_same(found: Any, written: Any) -> bool:
    """Tell whether a value that was read is the one that was written; a key left out is a null."""
    if isinstance(written, dict) and isinstance(found, dict):
        keys_known = set(written) <= set(found)
        return keys_known and all(says_the_same(value, written.get(key)) for key, value in found.items())
    if isinstance(written, list) and isinstance(found, list):
        return len(found) == len(written) and all(map(says_the_same, found, written))
    return bool(found == written) and isinstance(found, bool) == isinstance(written, bool)


def _of_one_shape() -> st.SearchStrategy:
    """Values as metadata have them: of one shape, now and then null or another number."""
    scalars = st.sampled_from(
        [st.booleans(), st.integers(-(2**63), 2**63 - 1), st.integers(-9, 9) | st.floats(-9, 9), TEXT]
    ).map(_or_null)
    shapes = st.recursive(
        scalars,
        lambda inner: st.one_of(
            inner.map(lambda values: _or_null(st.lists(values, max_size=3))),
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(
                lambda fields: _or_null(st.fixed_dictionaries({}, optional=fields))
            ),
        ),
        max_leaves=4,
    )
    return shapes.flatmap(lambda values: st.lists(values, min_size=1, max_size=9))


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(JSON_VALUE, min_size=1, max_size=9) | _of_one_shape(),
    cut=st.integers(0, 9),
    ending=st.sampled_from(["", ".zstd"]),
)
def test_any_json_value_comes_back(values, cut, ending) -> None:
    """Over one object or two; where no type holds all values, the column is text with JSON in it."""
    records = [{"id": str(i), "text": "x", "k": value} for i, value in enumerate(values)]
    parts = [part for part in (records[:cut], records[cut:]) if part]
    objects = {f"{i}.jsonl{ending}": compress(jsonl_bytes(part), ending[:4]) for i, part in enumerate(parts)}
    found = through_a_shard(objects, "k")["k"]
    for value, written in zip(found.to_pylist(), values, strict=True):
        if pa.types.is_string(found.type) and written is not None and not isinstance(written, str):
            value = json.loads(value)
        assert says_the_same(value, written), (found.type, value, written)
    kinds = {type(value) for value in values} - {type(None)}
    if kinds and kinds <= {int, float} and all(abs(value) <= MAX_EXACT_INT for value in values if value):
        assert str(found.type) == ("int64" if kinds == {int} else "double")
    if kinds == {bool}:
        assert str(found.type) == "bool"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None, 1, 2**53 + 1], "int64"),
        ([0.5, 2**53 + 1], "string"),
        ([2**63], "string"),
        ([1, True], "string"),
        ([1, "1"], "string"),
        ([[], None], "list<element: string>"),
        ([[], [1], [0.5]], "list<element: double>"),
        ([[1], ["x"]], "string"),
        ([{}], "string"),
        ([{}, {"a": 1}, {"b": [{"c": None}]}], "struct<a: int64, b: list<element: struct<c: string>>>"),
        ([{"a": 1}, {"a": "x"}], "string"),
        ([{"\ud800": 1}], "string"),
        ([{str(i): 1} for i in range(MAX_NODES - 1)], None),
        ([{str(i): 1} for i in range(MAX_NODES + 1)], "string"),
        ([json.loads("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2))], "string"),
    ],
)
def test_the_type_of_json_values(tmp_path: Path, values: list, kind: str | None) -> None:
    """All rows count, however far from the first."""
    plain = [{"id": str(i), "text": "x"} for i in range(300)]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": "z", "text": "x", "k": value}).encode() for value in values]
    path.write_bytes(jsonl_bytes(plain) + b"\n".join(lines))
    scanned, _ = scan(STORAGE, str(path), keep_columns=("k",))
    found = str(resolve(scanned, keep_columns=("k",)).kept_schema().field("k").type)
    assert found == kind if kind is not None else found.startswith("struct<0: int64")


def test_a_lone_surrogate_in_a_nested_value_is_replaced(tmp_path: Path) -> None:
    line = b'{"id": "1", "text": "x", "k": [{"a": "half \\ud83d"}]}\n'
    assert through_a_shard({"a.jsonl": line}, "k")["k"].to_pylist() == [[{"a": "half ?"}]]


def test_a_value_that_the_data_set_cannot_hold_is_named(tmp_path: Path) -> None:
    """Integers of one object and doubles of another are doubles, but not at the price of a digit."""
    large = {"id": "1", "text": "x", "k": 2**53 + 1}
    for name, data in {
        "a.jsonl": jsonl_bytes([large]),
        "a.csv": csv_bytes([{key: str(value) for key, value in large.items()}]),
        "a.parquet": parquet_bytes([large]),
    }.items():
        objects = {"b.jsonl": jsonl_bytes([{"id": "2", "text": "x", "k": 0.5}]), name: data}
        with pytest.raises(CorpusError, match=rf"{name}: kept column 'k' .*(row 0|int64 here).*keep_columns"):
            through_a_shard(objects, "k")


def test_a_later_object_must_fit(tmp_path: Path) -> None:
    def scanned(name: str, value: object) -> object:
        (tmp_path / name).write_bytes(jsonl_bytes([{"id": "1", "text": "x", "k": value}]))
        return scan(STORAGE, str(tmp_path / name), keep_columns=("k",))[0]

    columns = resolve(scanned("a.jsonl", {"a": 1, "b": [0.5]}), keep_columns=("k",))
    for value in ({"b": [1]}, {"a": None}, None, {"b": []}):
        check_columns(scanned("b.jsonl", value), columns)
    for value, said in (
        ({"a": "x"}, "struct<a: string>"),
        ({"c": 1}, "struct<c: int64>"),
        ({"a": 0.5}, "struct<a: double>"),
        ("x", "string"),
    ):
        with pytest.raises(
            CorpusError, match=rf"b\.jsonl: kept column 'k' is {said}, elsewhere .*struct<a: int64"
        ):
            check_columns(scanned("b.jsonl", value), columns)  # fmt: skip


# --- CSV -------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-(2**64), 2**64).map(str),
    st.integers(-99, 99).map(str),
    st.floats(allow_nan=False).map(repr),
    st.sampled_from(
        ["", "007", "+1", "-0", "1.50", "1e5", "1_000", " 1", "nan", "inf", "٣", ".5", "5.", "0"]
    ),
)


def _rewritten(value: Any) -> list[str]:
    """Return the texts that a value of a typed column can have been."""
    if value is None:
        return [""]
    if isinstance(value, bool):
        return [str(value), str(value).lower(), str(value).upper()]
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT_INT:
        return [repr(value), str(int(value))]
    return [value if isinstance(value, str) else repr(value)]


@settings(max_examples=50, deadline=None)
@given(
    values=st.one_of(
        st.lists(NUMBERS, min_size=1, max_size=9),
        st.lists(st.integers(-(2**63), 2**63 - 1).map(str) | st.just(""), min_size=1, max_size=9),
        st.lists(st.floats(-9, 9).map(repr), min_size=1, max_size=9),
        st.lists(st.sampled_from(["true", "false", ""]), min_size=1, max_size=9),
        st.lists(TEXT | NUMBERS, min_size=1, max_size=9),
    ),
    cut=st.integers(0, 9),
)
def test_any_csv_field_comes_back(values, cut) -> None:
    records = [{"id": str(i), "text": "x", "k": value} for i, value in enumerate(values)]
    data = csv_bytes(records)
    truth = [row["k"] for row in csv.DictReader(io.StringIO(data.decode(), newline=""))]
    parts = [part for part in (records[:cut], records[cut:]) if part]
    objects = {f"{i}.csv": csv_bytes(part) for i, part in enumerate(parts)}
    try:
        found = through_a_shard(objects, "k")["k"]
    except CorpusError as error:
        assert "no double is exactly this integer" in str(error)
        assert len(parts) == 2
        return
    for value, written in zip(found.to_pylist(), truth, strict=True):
        assert written in _rewritten(value), (found.type, value, written)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "", "-20"], "int64"),
        (["9223372036854775807", "-9223372036854775808"], "int64"),
        (["9223372036854775808"], "string"),
        (["1", "0.5", "-1e-07"], "double"),
        (["9007199254740993", "0.5"], "string"),
        (["true", "false"], "bool"),
        (["True", "", "True"], "bool"),
        (["true", "False"], "string"),
        (["1", "007"], "string"),
        (["+1"], "string"),
        (["1.5", "1.50"], "string"),
        (["1", "true"], "string"),
        (["", ""], "string"),
        (["nan", "0.5"], "string"),
        (["x", ""], "string"),
    ],
)
def test_the_type_of_csv_fields(values: list[str], kind: str) -> None:
    rows = [{"id": str(i), "text": "x", "k": value} for i, value in enumerate(values)]
    found = through_a_shard({"a.csv": csv_bytes(rows)}, "k")["k"]
    assert str(found.type) == kind
    if kind == "string":
        assert found.to_pylist() == values
    else:
        assert found.to_pylist() == [None if not v else json.loads(v.lower()) for v in values]


def test_texts_that_look_like_numbers_stay_texts() -> None:
    """A search reranks by kept texts; they are what was embedded."""
    rows = [{"id": str(i), "text": str(i), "title": "2010", "year": "2010"} for i in range(3)]
    kept = through_a_shard({"a.csv": csv_bytes(rows)}, "text", "title", "year")
    assert kept.to_pylist() == [{"text": str(i), "title": "2010", "year": 2010} for i in range(3)]


def test_columns_without_metadata_are_as_before() -> None:
    columns = Columns("id", "text", None)
    assert columns.kept_schema() == pa.schema([])
    assert make_spec().decisive().keys() >= {"columns.id", "columns.text", "columns.title"}
    assert not [key for key in make_spec().decisive() if key.startswith("columns.kept")]
