"""Runs, qrels, queries and candidates: what is written is read, and bad input is named by its line."""

import json
import math

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ray.errors import CorpusError, StorageError
from bge_ray.formats.runs import (
    Candidates,
    encode_run_parquet,
    encode_trec,
    read_candidates,
    read_qrels,
    read_queries,
    read_run,
    run_table,
)
from bge_ray.storage.objects import Storage, join
from tests.support.reading import compress, csv_bytes, jsonl_bytes, parquet_bytes

WORD = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=5).filter(
    lambda text: text.split() == [text]
)
SCORE = st.floats(allow_nan=False) | st.sampled_from([0.5, 1.0])
RUN = st.dictionaries(WORD, st.dictionaries(WORD, SCORE, min_size=1, max_size=6), max_size=5)


def ranked(run: dict[str, dict[str, float]]) -> list[Candidates]:
    expected = []
    for query_id, scores in run.items():
        ids = sorted(scores, key=lambda p: (-scores[p], p))
        expected.append(Candidates(query_id, ids, [scores[p] for p in ids]))
    return expected


@settings(deadline=None, max_examples=30)
@given(run=RUN)
def test_a_run_comes_back_from_either_form(run, tmp_path_factory) -> None:
    storage = Storage(5.0)
    table = run_table([Candidates(q, list(s), list(s.values())) for q, s in run.items()], "bge")
    folder = tmp_path_factory.getbasetemp()
    for name, data in {"a.trec": encode_trec(table), "a.parquet": encode_run_parquet(table)}.items():
        uri = str(folder / name)
        storage.write(uri, data)
        assert list(read_run(storage, uri)) == ranked(run)
        assert list(read_candidates(storage, uri)) == ranked(run)
    ranks = {}
    for row in pq.read_table(folder / "a.parquet").to_pylist():
        ranks.setdefault(row["query_id"], []).append(row["rank"])
        assert row["tag"] == "bge"
    assert all(found == list(range(1, len(found) + 1)) for found in ranks.values())


def test_ties_go_by_passage_id(storage: Storage, root: str) -> None:
    lines = ["q Q0 b 1 0.5 t", "q Q0 a 2 0.5 t", "q Q0 c 3 0.75 t", "q Q0 d 4 -1e-3 t"]
    for order in (lines, lines[::-1]):
        storage.write(join(root, "r.run.gz"), compress("\n".join(order).encode(), ".gz"))
        (found,) = read_run(storage, join(root, "r.run.gz"))
        assert found.passage_ids == ["c", "a", "b", "d"]
    table = run_table([Candidates("q", ["b", "a"], [0.5, 0.5])], "t")
    assert encode_trec(table) == b"q Q0 a 1 0.5 t\nq Q0 b 2 0.5 t\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("q2 Q0 a 1", "line 4: expected `query_id Q0"),
        ("q2 Q0 a 1 high t", "line 4: score 'high' is not a number"),
        ("q2 Q0 a 1 nan t", "line 4: score 'nan' is not a number"),
        ("q1 Q0 a 9 0.1 t", "line 4: passage 'a' twice for query 'q1'"),
        ("q2 Q0 a 1 1 t\nq1 Q0 z 3 0 t", "line 5: query 'q1' began earlier; sort"),
        ("q2 Q0 \xff 1 1 t", "line 4: not UTF-8"),
    ],
)
def test_a_bad_run_is_named_by_line(storage: Storage, tmp_path, line: str, said: str) -> None:
    uri = str(tmp_path / "a.trec")
    text = f"q1 Q0 a 1 0.9 t\n\nq1 Q0 b 2 0.8 t\n{line}\n"
    storage.write(uri, text.encode("latin-1"))
    with pytest.raises(CorpusError, match=said) as caught:
        list(read_run(storage, uri))
    assert "a.trec" in str(caught.value)


def test_a_bad_parquet_run_is_named_by_row(storage: Storage, tmp_path) -> None:
    uri = str(tmp_path / "a.parquet")
    rows = [{"query_id": "q", "passage_id": "a", "score": 1.0}]
    for bad, said in (
        ({"query_id": None, "passage_id": "b", "score": 1.0}, "row 1: an id is null"),
        ({"query_id": "q", "passage_id": "b", "score": math.nan}, "row 1: score nan"),
        ({"query_id": "q", "passage_id": "b", "score": None}, "row 1: score None"),
    ):
        storage.write(uri, parquet_bytes([*rows, bad]))
        with pytest.raises(CorpusError, match=said):
            list(read_run(storage, uri))
    storage.write(uri, parquet_bytes([{"query_id": "q"}]))
    with pytest.raises(CorpusError, match=r"no columns \['passage_id', 'score'\]"):
        list(read_run(storage, uri))
    with pytest.raises((CorpusError, StorageError), match="no such object"):
        list(read_run(storage, str(tmp_path / "none.trec")))


@pytest.mark.parametrize("bad", ["a b", "", "a\tb", "a\u2003b"])
def test_an_id_that_breaks_the_line_is_refused(bad: str) -> None:
    with pytest.raises(CorpusError, match="cannot stand in a TREC run"):
        encode_trec(run_table([Candidates("q", [bad], [1.0])], "t"))
    with pytest.raises(CorpusError, match="have no scores"):
        run_table([Candidates("q", ["a"])], "t")


def test_qrels_of_both_kinds(storage: Storage, root: str) -> None:
    expected = {"q1": {"a": 1, "b": 0}, "q2": {"c": 2}}
    for name, text in {
        "qrels.trec": "q1 0 a 1\nq1 0 b 0\n\nq2 0 c 2\n",
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\ta\t1\nq1\tb\t0\nq2\tc\t2\nq2\tc\t2\n",
    }.items():
        storage.write(join(root, name), text.encode())
        assert read_qrels(storage, join(root, name)) == expected
    for text, said in (
        ("q1 0 a 1\nq1 0 a 2\n", "line 2: query 'q1' and passage 'a' are judged 2 here and 1 earlier"),
        ("q1 0 a 1\nq1 a\n", "line 2: expected"),
        ("q1 0 a 0.5\n", "line 1: expected .* with a whole number"),
        ("", "no judgement"),
    ):
        storage.write(join(root, "bad"), text.encode())
        with pytest.raises(CorpusError, match=said):
            read_qrels(storage, join(root, "bad"))


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


def test_candidates_with_texts(storage: Storage, tmp_path) -> None:
    uri = str(tmp_path / "a.jsonl")
    records = [
        {"query": "one", "pos": ["p0"], "neg": ["n0", "n1"]},
        {"query": "two", "query_id": 7, "pos": "p", "neg": [], "pos_id": ["x"]},
        {"query": "three", "_id": "t", "passages": [{"passage_id": 5, "text": "five"}]},
        {"query": "four", "pos": [], "neg": []},
    ]
    storage.write(uri, jsonl_bytes(records))
    assert list(read_candidates(storage, uri)) == [
        Candidates("1", ["pos-0", "neg-0", "neg-1"], None, "one", ["p0", "n0", "n1"]),
        Candidates("7", ["x"], None, "two", ["p"]),
        Candidates("t", ["5"], None, "three", ["five"]),
        Candidates("4", [], None, "four", []),
    ]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([1], "expected a JSON object with a text `query`"),
        ({"pos": ["x"]}, "expected a JSON object with a text `query`"),
        (
            {"query": "q", "positive": []},
            r"expected `passages`, or `pos` and `neg`; it has \['positive', 'query'\]",
        ),
        ({"query": "q", "pos": ["a", None]}, "a candidate without a text"),
        (
            {"query": "q", "pos": ["a", "b"], "pos_id": ["1"]},
            "`pos_id` to be a list with one id for each of 2",
        ),
        ({"query": "q", "passages": [{"passage_id": "a"}]}, "a candidate without a text"),
        ({"query": "q", "passages": "x"}, "expected `passages` to be a list"),
        ({"query": "q", "pos": ["a", "b"], "pos_id": ["1", "1"]}, "stands twice for query"),
        ({"query": "q", "query_id": "1", "pos": ["a"]}, "query id '1' stands earlier"),
    ],
)
def test_bad_candidates_are_named_by_line(storage: Storage, tmp_path, record, said: str) -> None:
    uri = str(tmp_path / "a.jsonl")
    storage.write(
        uri, json.dumps({"query": "fine", "pos": ["x"]}).encode() + b"\n" + json.dumps(record).encode()
    )
    with pytest.raises(CorpusError, match=f"line 2: .*{said}"):
        list(read_candidates(storage, uri))
    storage.write(uri, b"{")
    with pytest.raises(CorpusError, match="line 1: "):
        list(read_candidates(storage, uri))
