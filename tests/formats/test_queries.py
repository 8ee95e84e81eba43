"""Queries of every format: each row is a query or a rejected row."""

import json

import pyarrow as pa
import pytest

from bge_ray.errors import CorpusError
from bge_ray.formats.queries import read_queries
from bge_ray.storage.objects import Storage, join
from tests.support.reading import compress, csv_bytes, jsonl_bytes, parquet_bytes

QUERIES = [{"_id": str(i), "text": f"query {i}"} for i in range(10)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_queries_of_every_format(storage: Storage, root: str, name: str) -> None:
    rows = [*QUERIES, {"_id": "3", "text": "again"}, {"_id": "e", "text": " "}]
    data = {"a.csv": csv_bytes(rows), "a.parquet": parquet_bytes(rows)}.get(name, jsonl_bytes(rows))
    storage.write(join(root, name), compress(data, ".gz" if name.endswith("gz") else ""))
    (batch,) = read_queries(storage, join(root, name))
    assert dict(zip(batch.query_ids, batch.texts, strict=True)) == {r["_id"]: r["text"] for r in QUERIES}
    assert [(r.row, r.passage_id, r.reason) for r in batch.rejected] == [
        (10, "3", "duplicate_id"),
        (11, "e", "empty_text"),
    ]


def test_queries_over_many_objects_are_distinct(storage: Storage, root: str) -> None:
    storage.write(join(root, "a.jsonl"), jsonl_bytes(QUERIES[:6]))
    storage.write(
        join(root, "b.csv"), csv_bytes([{"qid": q["_id"], "question": q["text"]} for q in QUERIES[4:]])
    )
    batches = list(read_queries(storage, root))
    assert [q for b in batches for q in b.query_ids] == [q["_id"] for q in QUERIES]
    assert [(b.uri.rpartition("/")[2], r.row, r.passage_id) for b in batches for r in b.rejected] == [
        ("b.csv", 0, "4"),
        ("b.csv", 1, "5"),
    ]
    storage.write(join(root, "c.csv"), b"x,y\n1,2\n")
    with pytest.raises(CorpusError, match=r"c\.csv: none of .* name the column"):
        list(read_queries(storage, root))
    with pytest.raises(CorpusError, match="no such file"):
        list(read_queries(storage, join(root, "none")))


def test_queries_of_a_beir_folder(storage: Storage, root: str) -> None:
    storage.write(join(root, "queries.jsonl"), jsonl_bytes([q | {"metadata": {}} for q in QUERIES]))
    storage.write(join(root, "corpus.jsonl"), jsonl_bytes([{"_id": "doc", "title": "", "text": "x"}]))
    storage.write(join(root, "qrels/test.tsv"), b"query-id\tcorpus-id\tscore\n")
    (batch,) = read_queries(storage, root)
    assert batch.texts == [q["text"] for q in QUERIES]


def test_a_query_without_a_text_is_one_rejected_row(storage: Storage, tmp_path) -> None:
    records = [
        {"_id": "null", "text": None},
        {"_id": "fine", "text": "what is it"},
        {"_id": "none"},
        {"text": "whose"},
        {"_id": "list", "text": ["a"]},
    ]
    uri = str(tmp_path / "a.jsonl")
    for some in (records, records[:1]):
        storage.write(uri, jsonl_bytes(some))
        (batch,) = read_queries(storage, uri)
        assert batch.query_ids == [r["_id"] for r in some if r.get("_id") == "fine"]
        assert [(r.row, r.reason) for r in batch.rejected] == [
            (row, reason)
            for row, reason in [(0, "null_text"), (2, "null_text"), (3, "null_id"), (4, "non_string_text")]
            if row < len(some)
        ]
    nulls = pa.table({"qid": ["1", "2"], "query": pa.nulls(2)})
    storage.write(str(tmp_path / "a.parquet"), parquet_bytes(nulls))
    (batch,) = read_queries(storage, str(tmp_path / "a.parquet"))
    assert [r.reason for r in batch.rejected] == ["null_text"] * 2


def test_the_columns_of_late_queries_are_found(storage: Storage, tmp_path) -> None:
    """The first hundred records are broken, or have no text."""
    lines = [b"broken"] * 150 + [json.dumps({"qid": "a", "ques\u0074ion": "what"}).encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (batch,) = read_queries(storage, str(tmp_path / "a.jsonl"))
    assert (batch.query_ids, batch.texts, len(batch.rejected)) == (["a"], ["what"], 150)


def test_columns_of_queries_are_named_and_checked(storage: Storage, tmp_path) -> None:
    rows = pa.table({"key": pa.array([1, 2]), "q": ["one", "two"], "n": [1.5, 2.5]})
    uri = str(tmp_path / "a.parquet")
    storage.write(uri, parquet_bytes(rows))
    (batch,) = read_queries(storage, uri, "key", "q")
    assert (batch.query_ids, batch.texts) == (["1", "2"], ["one", "two"])
    for columns, said in (
        (("id", "q"), r"none of id among its columns \['key', 'n', 'q'\]"),
        (("key", "n"), "column 'n' is double, expected text"),
        (("n", "q"), "id column 'n' is double"),
    ):
        with pytest.raises(CorpusError, match=rf"a\.parquet: {said}"):
            list(read_queries(storage, uri, *columns))
    storage.write(str(tmp_path / "a.txt"), b"x")
    with pytest.raises(CorpusError, match=r"a\.txt: unknown ending; queries are"):
        list(read_queries(storage, str(tmp_path / "a.txt")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_filters_of_queries_stand_in_a_column(storage: Storage, root: str, name: str) -> None:
    """One a query, none where it is null or missing; what is no text comes as it is written."""
    told = ["year > 3", None, "lang = 'de'"]
    rows = [q | {"only": own} for q, own in zip(QUERIES, told, strict=False)]
    if name == "a.jsonl":
        rows += [{"_id": "n", "text": "x", "only": 7}, {"_id": "m", "text": "x"}]
        told += ["7", None]
    written = {"a.csv": csv_bytes, "a.parquet": parquet_bytes}.get(name, jsonl_bytes)
    storage.write(join(root, name), written(rows))
    (batch,) = read_queries(storage, join(root, name), filter_column="only")
    assert [own or None for own in batch.filters] == told
    (batch,) = read_queries(storage, join(root, name))
    assert batch.filters == [None] * len(rows)
    with pytest.raises(CorpusError, match=rf"{name}: none of other among its columns .*only"):
        list(read_queries(storage, join(root, name), filter_column="other"))


def test_a_column_of_filters_of_another_type_is_refused(storage: Storage, root: str) -> None:
    storage.write(join(root, "a.parquet"), parquet_bytes([q | {"only": [1]} for q in QUERIES]))
    with pytest.raises(CorpusError, match=r"a\.parquet: column 'only' of filters is list.*, expected text"):
        list(read_queries(storage, join(root, "a.parquet"), filter_column="only"))
