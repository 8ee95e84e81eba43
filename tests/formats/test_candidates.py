"""Candidate lists of every form, and rows of embedding shards by their ids; local files, no Ray."""

import gzip
import io
import json
import time
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from bge_ray.dataset.lookup import ShardMap, find_passages, read_places
from bge_ray.errors import CorpusError, StorageError
from bge_ray.formats.candidates import Candidates, read_candidate_lists
from bge_ray.records.ids import id_range, vector_ids
from bge_ray.storage.objects import Storage
from tests.support.reading import compress, jsonl_bytes
from tests.support.vectors import clustered, make_dataset

STORAGE = Storage(5)


def read(
    path: Path, *, chunks: bool = False
) -> tuple[list[Candidates], list[tuple[str | None, str | None, str]]]:
    rejected: list[tuple[str | None, str | None, str]] = []

    def reject(query_id: str | None, passage_id: str | None, reason: str, _: str) -> None:
        rejected.append((query_id, passage_id, reason))

    return list(read_candidate_lists(STORAGE, str(path), reject, chunks=chunks)), rejected


RUN = {"b": {"p1": 0.5, "p2": 0.75, "p0": 0.5}, "a": {"p2": -1.0}}
EXPECTED = [
    Candidates("b", ["p2", "p0", "p1"], [0.75, 0.5, 0.5]),
    Candidates("a", ["p2"], [-1.0]),
]


def forms() -> dict[str, bytes]:
    rows = [
        {"query_id": q, "passage_id": p, "rank": 1, "score": s, "tag": "t"}
        for q, ps in RUN.items()
        for p, s in ps.items()
    ]
    trec = "".join(f"{r['query_id']} Q0 {r['passage_id']} 1 {r['score']} t\n" for r in rows).encode()
    lists = [
        {"qid": q, "passages": [{"passage_id": p, "score": s} for p, s in ps.items()]}
        for q, ps in RUN.items()
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return {
        "run.trec": trec,
        "run.txt.gz": gzip.compress(trec),
        "five.run": b"".join(line.rpartition(b" ")[0] + b"\n" for line in trec.splitlines()),
        "run.parquet": sink.getvalue(),
        "rows.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "lists.jsonl": "\n".join(map(json.dumps, lists)).encode(),
    }


@pytest.mark.parametrize("name", forms())
def test_every_form_of_a_run_says_the_same(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(forms()[name])
    assert read(tmp_path / name) == (EXPECTED, [])


def chunk_forms() -> dict[str, bytes]:
    """Rows of chunks, one of them twice, and one of a passage that was not cut."""
    rows = [
        {"query_id": "q", "passage_id": p, "score": s, "vector_id": v, "chunk_no": c, "start": a, "end": b}
        for p, s, v, c, a, b in (
            ("p0", 0.5, 7, 7, 70, 80),
            ("p1", 0.75, 8192, None, None, None),
            ("p0", 0.25, 1, 1, 10, 20),
            ("p0", 0.625, 2, 2, 20, 30),
            ("p0", 0.5, 7, 7, 70, 80),
        )
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return {"r.parquet": sink.getvalue(), "r.jsonl": "\n".join(map(json.dumps, rows)).encode()}


@pytest.mark.parametrize("name", chunk_forms())
def test_chunks_are_candidates_of_their_own_or_the_best_stands_for_its_passage(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(chunk_forms()[name])
    none = (None, None, None)
    best = Candidates("q", ["p1", "p0"], [0.75, 0.625], vector_ids=[8192, 2], spans=[none, (2, 20, 30)])
    every = Candidates(
        "q",
        ["p1", "p0", "p0", "p0"],
        [0.75, 0.625, 0.5, 0.25],
        vector_ids=[8192, 2, 7, 1],
        spans=[none, (2, 20, 30), (7, 70, 80), (1, 10, 20)],
    )
    rejected = [("q", "p0", "duplicate_passage")]  # the chunk that stands twice
    assert read(tmp_path / name) == ([best], rejected)
    assert read(tmp_path / name, chunks=True) == ([every], rejected)


def test_ties_go_by_passage_id(tmp_path: Path) -> None:
    lines = ["q Q0 b 1 0.5 t", "q Q0 a 2 0.5 t", "q Q0 c 3 0.75 t", "q Q0 d 4 -1e-3 t"]
    for order in (lines, lines[::-1]):
        (tmp_path / "r.run.zstd").write_bytes(compress("\n".join(order).encode(), ".zst"))
        (found,), rejected = read(tmp_path / "r.run.zstd")
        assert found == Candidates("q", ["c", "a", "b", "d"], [0.75, 0.5, 0.5, -0.001])
        assert rejected == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("q2 Q0 a 1", "line 4: expected `query_id Q0"),
        ("q2 Q0 a 1 high t", "line 4: score 'high' is not a number"),
        ("q2 Q0 a 1 nan t", "line 4: score 'nan' is not a number"),
        ("q2 Q0 \xff 1 1 t", "line 4: not UTF-8"),
    ],
)
def test_a_bad_line_of_a_run_is_named(tmp_path: Path, line: str, said: str) -> None:
    text = f"q1 Q0 a 1 0.9 t\n\nq1 Q0 b 2 0.8 t\n{line}\nq3 Q0 a 1 0.9 t\n"
    (tmp_path / "a.trec").write_bytes(text.encode("latin-1"))
    details: list[str] = []
    found = list(
        read_candidate_lists(STORAGE, str(tmp_path / "a.trec"), lambda *fault: details.append(fault[3]))
    )
    assert [f.query_id for f in found] == ["q1", "q3"]
    assert [detail.startswith(said) for detail in details] == [True]


def test_candidates_with_texts(tmp_path: Path) -> None:
    records = [
        {"query": "one", "pos": ["p0"], "neg": ["n0", "n1"]},
        {"query": "two", "query_id": 7, "pos": "p", "neg": [], "pos_id": ["x"]},
        {"query": "three", "_id": "t", "passages": [{"passage_id": 5, "text": "five"}]},
        {"query": "four", "pos": [], "neg": []},
        {"query": None, "query_id": "n", "passages": ["p"]},
    ]
    (tmp_path / "a.jsonl").write_bytes(jsonl_bytes(records))
    assert read(tmp_path / "a.jsonl") == (
        [
            Candidates("1", ["pos-0", "neg-0", "neg-1"], None, "one", ["p0", "n0", "n1"]),
            Candidates("7", ["x"], None, "two", ["p"]),
            Candidates("t", ["5"], None, "three", ["five"]),
            Candidates("4", [], None, "four"),
            Candidates("n", ["p"]),
        ],
        [],
    )


def test_of_a_folder_its_run_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run.trec").write_bytes(forms()["run.trec"])
    assert read(tmp_path)[0] == EXPECTED
    with pytest.raises(CorpusError, match=r"no folder with a run\.parquet"):
        read(tmp_path / "nothing")


def test_texts_stay_with_their_ids_when_scores_sort_them(tmp_path: Path) -> None:
    record = {
        "query": "q",
        "passages": [{"passage_id": n, "text": f"text of {n}", "score": n} for n in (1, 3, 2)],
    }
    (tmp_path / "x.jsonl").write_text("\n" + json.dumps(record))
    (found,), _ = read(tmp_path / "x.jsonl")
    assert (found.query_id, found.query) == ("2", "q")  # the number of its line
    assert found.passage_ids == ["3", "2", "1"]
    assert found.texts == ["text of 3", "text of 2", "text of 1"]


def test_of_a_passage_that_stands_twice_the_better_score_stays(tmp_path: Path) -> None:
    lines = "q Q0 p 1 0.5 t\nq Q0 r 2 0.6 t\nq Q0 p 3 0.7 t\nx Q0 p 1 1 t\nq Q0 z 1 9 t\n"
    (tmp_path / "x.trec").write_text(lines)
    found, rejected = read(tmp_path / "x.trec")
    assert found == [Candidates("q", ["p", "r"], [0.7, 0.6]), Candidates("x", ["p"], [1.0])]
    assert rejected == [("q", "p", "duplicate_passage"), ("q", None, "duplicate_query")]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "7",
        '{"query": "q"}',
        '{"query": 1, "pos": []}',
        '{"query": "q", "pos": [1]}',
        '{"query": "q", "pos": ["a"], "pos_id": ["x", "y"]}',
        '{"query": "q", "passages": "p"}',
        '{"query": "q", "passages": [{"text": "no id"}]}',
        '{"query": "q", "passages": [{"passage_id": "p", "text": 3}]}',
        '{"query": "q", "passages": [{"passage_id": "p", "score": "high"}]}',
        '{"query": "q", "passages": [{"passage_id": "p", "score": NaN}]}',
        '{"query": "q", "passages": [null]}',
    ],
)
def test_a_bad_record_is_rejected_and_the_next_is_read(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text(f'{line}\n{{"query": "fine", "pos": "one", "neg": []}}\n')
    found, rejected = read(tmp_path / "x.jsonl")
    assert found == [Candidates("2", ["pos-0"], query="fine", texts=["one"])]
    assert [reason for *_, reason in rejected] == ["malformed"]


def test_files_that_hold_no_candidates_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), tmp_path / "corpus.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "empty.trec").write_bytes(b"")
    for name in ("corpus.parquet", "bad.parquet", "empty.trec"):
        with pytest.raises(CorpusError):
            read(tmp_path / name)


def test_rows_are_found_by_their_ids_wherever_they_lie(tmp_path: Path) -> None:
    root = str(tmp_path / "data")
    made = make_dataset(root, [40, 1, 20_000])
    shards = ShardMap.of(made.dataset.read_manifest())
    asked = {0: [0, 39], 1: [0], 2: [0, 16_383, 16_384, 19_999]}  # both row groups of the last
    there = np.concatenate([vector_ids(o, np.array(rows)) for o, rows in asked.items()])
    gone = np.array([id_range(o, row, 1)[0] for o, row in ((0, 40), (1, 1), (2, 20_000), (7, 0))])
    ids = np.sort(np.concatenate([there, gone]))
    table = read_places(STORAGE, root, shards, ids, ["passage_id", "embedding"])
    assert table["vector_id"].to_pylist() == there.tolist()
    assert table["passage_id"].to_pylist() == [f"{o}-{row}" for o, rows in asked.items() for row in rows]
    last = clustered(20_000, 32, seed=2)[[0, 16_383, 16_384, 19_999]]
    np.testing.assert_array_equal(np.stack(table["embedding"].to_pylist())[-4:].astype(np.float32), last)
    assert len(read_places(STORAGE, root, shards, np.empty(0, np.int64), ["passage_id"])) == 0
    wanted = pa.array(["2-19999", "nowhere", "2-5"])
    positions, found = find_passages(STORAGE, root, shards.facts[2], wanted)
    assert dict(zip(positions.tolist(), found.tolist(), strict=True)) == {
        0: vector_ids(2, np.array([19_999]))[0],
        2: vector_ids(2, np.array([5]))[0],
    }
    fact = shards.facts[0]
    path = Path(root) / fact.path
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(StorageError, match=r"00000000-0000000000\.parquet"):
        read_places(STORAGE, root, shards, there, ["passage_id"])


def test_a_run_keeps_which_vector_each_candidate_is_and_may_come_in_any_order(tmp_path: Path) -> None:
    rows = [
        {"query_id": "q", "passage_id": "p", "score": 0.5, "vector_id": 1 << 41},
        {"query_id": "r", "passage_id": "p", "score": 0.5, "vector_id": 7},
        {"query_id": "q", "passage_id": "o", "score": 0.75, "vector_id": 0},
    ]
    path = tmp_path / "run.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    grouped, rejected = read(path)
    assert [(c.query_id, c.passage_ids, c.vector_ids) for c in grouped] == [
        ("q", ["p"], [1 << 41]),
        ("r", ["p"], [7]),
    ]
    assert rejected == [("q", None, "duplicate_query")]
    every = list(read_candidate_lists(STORAGE, str(path), lambda *_: None, scattered=True))
    assert [(c.query_id, c.passage_ids) for c in every] == [("q", ["p"]), ("r", ["p"]), ("q", ["o"])]
    pq.write_table(pa.Table.from_pylist([rows[0], rows[2]]), path)
    assert read(path)[0] == [Candidates("q", ["o", "p"], [0.75, 0.5], None, None, [0, 1 << 41])]


def test_tabs_tell_the_fields_of_a_run_apart_where_ids_hold_blanks(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    path.write_text("a query\tQ0\tthe doc\t1\t0.5\ttag\n")
    assert read(path) == ([Candidates("a query", ["the doc"], [0.5])], [])


def texts_or(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.none(), values)


COLUMNS = {
    "score": texts_or(st.sampled_from([0.0, -1.5, 2.25, 7.0, float("inf")])),
    "query": texts_or(st.sampled_from(["who", "what", ""])),
    "text": texts_or(st.sampled_from(["a", "b c", ""])),
    "vector_id": texts_or(st.sampled_from([-1, 0, 5, 1 << 40])),
    "chunk_no": texts_or(st.integers(0, 1)),
    "start": texts_or(st.integers(0, 1)),
    "end": texts_or(st.integers(1, 2)),
}


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, object]]:
    """Rows of one candidate each: most columns plain throughout, as runs are, and some with gaps."""
    names = draw(st.lists(st.sampled_from(sorted(COLUMNS)), unique=True))
    gaps = draw(st.booleans())
    rows = []
    for query in draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=12)):
        row: dict[str, object] = {"query_id": query, "passage_id": draw(st.sampled_from("xyzuvw"))}
        for name in names:
            values = COLUMNS[name] if gaps else COLUMNS[name].filter(lambda value: value is not None)
            row[name] = draw(values)
        rows.append(row)
    return rows


@hypothesis.given(rows=tables(), chunks=st.booleans(), size=st.sampled_from([1, 2, 5, 100]))
def test_a_table_by_columns_is_what_its_rows_are_one_by_one(
    rows: list[dict[str, object]], chunks: bool, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    (folder / "rows.jsonl").write_bytes(jsonl_bytes(rows))
    types = {"score": pa.float64(), "vector_id": pa.int64(), "chunk_no": pa.int32()}
    types |= {"start": pa.int32(), "end": pa.int32()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "rows.parquet", row_group_size=size)
    lines, table = read(folder / "rows.jsonl", chunks=chunks), read(folder / "rows.parquet", chunks=chunks)
    assert table == lines


def test_a_run_is_read_by_columns_and_not_by_its_rows(tmp_path: Path) -> None:
    n, depth = 60_000, 100
    run = {
        "query_id": [f"q{i // depth}" for i in range(n)],
        "passage_id": [f"doc{i * 7919 % n}" for i in range(n)],
        "score": [float(-(i % depth)) for i in range(n)],
        "vector_id": list(range(n)),
    }
    pq.write_table(pa.table(run), tmp_path / "run.parquet")
    # One value that has to be looked at makes each row be looked at.
    pq.write_table(pa.table(run | {"vector_id": [None, *range(1, n)]}), tmp_path / "gap.parquet")

    def cost(name: str) -> float:
        began = time.process_time()
        found, rejected = read(tmp_path / name)
        assert sum(len(one.passage_ids) for one in found) == n
        assert not rejected
        return time.process_time() - began

    assert min(cost("run.parquet") for _ in range(3)) < min(cost("gap.parquet") for _ in range(2)) / 4
