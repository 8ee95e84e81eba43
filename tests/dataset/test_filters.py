"""Filters: what is refused and where, and what passes, against DuckDB itself, pandas and plain Python."""

import contextlib
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ray.dataset.filters import AT_ONCE, Filter, FilterReader, compute, connect
from bge_ray.dataset.lookup import ShardMap
from bge_ray.dataset.passing import Passing, ShardPasses, mark_all, mark_shards, put_together
from bge_ray.errors import SettingsError, StorageError
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import vector_ids
from bge_ray.storage.objects import Storage
from tests.support.vectors import CHUNKING, VectorDataset, clustered

STORAGE = Storage(5)
TABLE = pa.table(
    {
        "year": pa.array([1999, None, 2020, 2024, 0], pa.int32()),
        "lang": ["de", "en", None, "de", "Größe"],
        "ok": [True, None, False, True, False],
        "day": pa.array([0, 1, None, 3, 4], pa.date32()),
        "seen": pa.array([0, 10**12, None, 3, 4], pa.timestamp("us", "Europe/Berlin")),
        "tags": [["x"], None, [], ["x", "y"], [None]],
        "meta": [{"a": 1}, None, {"a": 3}, {"a": None}, {"a": 5}],
        "price": pa.array([1, 2, None, 4, 5], pa.int32()).cast(pa.decimal128(12, 2)),
        "raw": pa.array([b"a", None, b"b", b"a", b""]),
        "my col": [1, 2, 3, 4, 5],
        "order": ["a", "b", "c", "d", "e"],
        "half": pa.array(np.zeros(5, np.float16)),
        "Case": [1, 2, 3, 4, 5],
        "case": [5, 4, 3, 2, 1],
    }
)
READABLE = TABLE.drop_columns("half").append_column("vector_id", pa.array(range(5), pa.int64()))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> VectorDataset:
    root = str(tmp_path_factory.mktemp("kept"))
    return VectorDataset(root, kept={field.name: field.type for field in TABLE.schema})


@pytest.fixture(scope="module")
def reader(kept: VectorDataset) -> FilterReader:
    return FilterReader(kept.spec, "s3://here")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("yeer = 1", r"column 'yeer' at character 1: s3://here keeps none of that name, only year, lang, ok"),
        ("lang = 'ä' AND yeer = 1", "column 'yeer' at character 16"),
        ("passage_id = 'p1'", "column 'passage_id' at character 1"),
        ("vector_id > 3", "column 'vector_id' at character 1"),
        ("year = = 3", r'syntax error at or near "=" at character 8'),
        ("lang = 'ä' and = 3", r'syntax error at or near "=" at character 16'),
        ("", "is empty"),
        (" \n", "is empty"),
        ("-- nothing", "syntax error|not a condition"),
        ("year >", "syntax error"),
        ("year", "is of type INTEGER, not a condition"),
        ("lang", "is of type VARCHAR, not a condition"),
        ("NULL", "is of type NULL, not a condition"),
        ("tags", r"is of type VARCHAR\[\], not a condition"),
        ("lang > 3", "Cannot compare values of type VARCHAR"),
        ("year > 'x'", "Could not convert string 'x'"),
        ("meta.b = 1", 'Could not find key "b"'),
        ("nope(year) = 1", "nope at character 1: is no function"),
        ("sum(year) > 1", "sum at character 1: is no function of one passage"),
        ("count(*) > 1", "is no function of one passage"),
        ("row_number() OVER () = 1", "a window over rows at character 1"),
        ("(SELECT true)", "a query within it at character 1"),
        ("year IN (SELECT 1)", "a query within it"),
        ("EXISTS (SELECT * FROM read_text('/etc/passwd'))", "a query within it at character 1"),
        ("lang = (SELECT content FROM read_text('/etc/passwd'))", "a query within it at character 8"),
        ("year > ?", "a parameter at character 8"),
        ("*", "a star, or COLUMNS"),
        ("COLUMNS('y.*') > 1", "a star, or COLUMNS"),
        ("unnest(tags) = 'x'", "unnest at character 1"),
        ("random() > 0.5", "random at character 1: gives another answer at another time"),
        ("day < current_date", "column 'current_date' at character 7"),
        ("day < today()", "today at character 7: gives another answer"),
        ("seen < now()", "now at character 8"),
        ("age(seen) > INTERVAL 1 DAY", "age at character 1"),
        ("current_setting('threads') = '1'", "current_setting at character 1"),
        ("getvariable('x') = 1", "getvariable at character 1"),
        ("nextval('x') = 1", "nextval at character 1"),
        ("getenv('HOME') = 'x'", "getenv at character 1"),
        ("true) , (true", "is more than one expression"),
        ("true) FROM (SELECT 1", "is more than one expression"),
        ("true) WHERE (true", "is more than one expression"),
        ("true; DROP TABLE passages", "syntax error"),
        ("true); SELECT (true", "more than one expression|Only SELECT|syntax error"),
        ("half > 0", "column 'half' is halffloat, which no filter can read"),
        ("CASE_ = 1", "column 'CASE_'"),
        ('"cASE" > 1', "column 'cASE' at character 1"),
        ('"case" > 1 AND "Case" > 1', "Case, case: differ in case alone"),
        ("(" * 400 + "true" + ")" * 400 + " AND year > 1" * 2, ""),
        ("NOT " * 1000 + "true", ""),
    ],
)
def test_what_is_no_filter_is_refused_by_name_and_place(reader: FilterReader, text: str, why: str) -> None:
    if not why:  # deep ones: read or refused, but never a crash
        with contextlib.suppress(SettingsError):
            reader.read(text)
        return
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(SettingsError, match=why):
            reader.read(text)


GOOD = {
    "year >= 2000": [False, False, True, True, False],
    "NOT (year >= 2000)": [True, False, False, False, True],
    "lang = 'de' OR year = 2020": [True, False, True, True, False],
    "YEAR BETWEEN 1 AND 2020": [True, False, True, False, False],
    "year IN (1999, NULL)": [True, False, False, False, False],
    "year IS NULL": [False, True, False, False, False],
    "lang IS DISTINCT FROM 'de'": [False, True, True, False, True],
    "lang LIKE 'd%'": [True, False, False, True, False],
    "lang ILIKE 'größe'": [False, False, False, False, True],
    "ok": [True, False, False, True, False],
    "ok IS NOT TRUE": [False, True, True, False, True],
    "day > '1970-01-02'": [False, False, False, True, True],
    "seen > TIMESTAMPTZ '1970-01-05'": [False, True, False, False, False],
    "list_contains(tags, 'x')": [True, False, False, True, False],
    "len(list_filter(tags, lambda tag: tag = 'y')) > 0": [False, False, False, True, False],
    "meta.a > 2": [False, False, True, False, True],
    "price > 1.5": [False, True, False, True, True],
    "raw = 'a'::BLOB": [True, False, False, True, False],
    '"my col" > 3 -- a comment': [False, False, False, True, True],
    "\"order\" >= 'd'": [False, False, False, True, True],
    "coalesce(year, 2030) > 2021": [False, True, False, True, False],
    "nullif(lang, 'de') IS NULL": [True, False, True, True, False],
    "CASE WHEN ok THEN year < 2000 ELSE year = 0 END": [True, False, False, False, True],
    "TRY_CAST(lang AS INTEGER) IS NULL": [True] * 5,
    "true": [True] * 5,
    "NULL::BOOLEAN": [False] * 5,
    '"Case" > 3': [False, False, False, True, True],
    '"case" > 3': [True, True, False, False, False],
}


@pytest.mark.parametrize("text", list(GOOD))
def test_what_passes_is_what_is_true(reader: FilterReader, text: str) -> None:
    found = reader.read(text)
    (marks,) = compute(connect(), READABLE, [found])
    assert not isinstance(marks, str)
    assert marks.tolist() == GOOD[text]


def test_many_at_once_are_as_each_alone_and_one_that_fails_fails_alone(reader: FilterReader) -> None:
    filters = [reader.read(text) for text in GOOD]
    filters.insert(3, reader.read("lang::INTEGER > 3"))
    assert len(filters) <= AT_ONCE
    marks = compute(connect(), READABLE, filters)
    told = marks.pop(3)
    assert isinstance(told, str) and "Could not convert string 'de'" in told and "SELECT" not in told
    assert [some.tolist() for some in marks if not isinstance(some, str)] == list(GOOD.values())


def test_the_same_filter_in_other_words_is_one(reader: FilterReader) -> None:
    assert reader.read("year>2000").sql == reader.read(" ( year  > 2000 ) -- since then\n").sql
    both = reader.read("year > 2000").both(reader.read("lang = 'de' OR ok"))
    (marks,) = compute(connect(), READABLE, [both])
    assert both.columns == ("year", "lang", "ok")
    assert np.asarray(marks).tolist() == [False, False, False, True, False]


def test_a_data_set_without_kept_columns_has_nothing_to_filter_by(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"s3://x keeps no columns of its corpus.* corpus\.keep_columns"):
        FilterReader(VectorDataset(str(tmp_path)).spec, "s3://x")


class Kept:
    """Rows with a year and a language, each of one or several chunks, in three objects."""

    def __init__(self, root: str, *, chunks: bool) -> None:
        rng = np.random.default_rng(7)
        made = VectorDataset(
            root, 8, chunking=CHUNKING if chunks else None, kept={"year": pa.int32(), "lang": pa.string()}
        )
        frames, self.ids = [], []
        for number in range(3):
            sizes = rng.integers(1, 5, 200).tolist() if chunks else [1] * 200
            years = [None if rng.random() < 0.1 else int(rng.integers(1990, 2030)) for _ in sizes]
            langs = [str(rng.choice(["de", "en"])) if number < 2 else None for _ in sizes]
            kept = {"year": pa.array(years, pa.int32()), "lang": pa.array(langs, pa.string())}
            made.put(number, clustered(sum(sizes), 8, seed=number), sizes=sizes, kept=kept)
            for row, size in enumerate(sizes):
                self.ids += vector_ids(number, np.full(size, row), np.arange(size)).tolist()
                frames += [(number, row, years[row], langs[row])] * size
        self.frame = pd.DataFrame(frames, columns=["object", "row", "year", "lang"])
        self.manifest = made.publish()
        self.shards = ShardMap.of(self.manifest)
        self.reader = FilterReader(made.spec, root)
        self.root = root


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "chunks"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(str(tmp_path_factory.mktemp("data")), chunks=request.param)


def test_the_rows_of_shards_that_pass_are_those_that_duckdb_and_pandas_find(data: Kept) -> None:
    frame, ids = data.frame, np.array(data.ids)
    expected = {
        "year >= 2010 AND lang = 'de'": (frame["year"] >= 2010) & (frame["lang"] == "de"),
        "lang IS NULL": frame["lang"].isna(),
        "year IS NULL OR year < 1995": frame["year"].isna() | (frame["year"] < 1995),
        "lang = 'fr'": frame["lang"] == "fr",
        "true": frame["object"] >= 0,
    }
    filters = [data.reader.read(text) for text in expected]
    settled = mark_all(STORAGE, data.root, data.shards, filters)
    for text, one in zip(expected, filters, strict=True):
        passing = settled[one.sql]
        assert isinstance(passing, Passing)
        truth = expected[text].to_numpy(bool)
        direct = duckdb.sql(f"SELECT coalesce({text}, false) FROM frame").fetchnumpy()
        assert (next(iter(direct.values())) == truth).all()
        assert (passing.has(ids) == truth).all()
        assert (passing.has(ids[:500].reshape(2, -1)).ravel() == truth[:500]).all()
        assert passing.passes.vectors == truth.sum()
        assert passing.passes.rows == len(frame[truth].drop_duplicates(["object", "row"]))
        for number, fact in enumerate(data.shards.facts):
            assert passing.some_of(fact.path) == truth[frame["object"] == number].any()
    assert not settled[filters[-1].sql].has(np.array([-1, 7 << 41, (2 << 41) + (200 << 13)])).any()


def test_what_cannot_be_told_of_one_shard_is_told_of_the_filter_with_the_shard(data: Kept) -> None:
    bad, good = data.reader.read("lang::INTEGER = 3"), data.reader.read("lang IS NULL")
    settled = mark_all(STORAGE, data.root, data.shards, [bad, good])
    assert isinstance(settled[good.sql], Passing)
    assert "Could not convert string" in settled[bad.sql]
    assert data.shards.facts[0].path in settled[bad.sql]


def test_more_filters_than_are_computed_at_once(data: Kept) -> None:
    filters = [data.reader.read(f"year > {1960 + number}") for number in range(AT_ONCE + 9)]
    found = put_together(data.shards, filters, mark_shards(STORAGE, data.root, data.shards, filters))
    for number, one in enumerate(filters):
        assert found[one.sql].passes.vectors == (data.frame["year"] > 1960 + number).sum()


def test_a_shard_that_lacks_a_column_is_named(data: Kept) -> None:
    with pytest.raises(StorageError, match=r"embeddings/.*: lacks the columns nope; run bge-ray embed again"):
        mark_shards(STORAGE, data.root, data.shards, [Filter("(nope > 1)", ("nope",))])


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
@settings(max_examples=30)
def test_bits_say_of_any_rows_which_pass(seed: int, share: float) -> None:
    """Shards of random sizes, with gaps between them, and rows at random."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 40, 5)
    starts = np.array([(number * 2) << 41 for number in range(5)], np.int64)
    stops = starts + (sizes << 13)
    shards = ShardMap(starts, stops, tuple(FileFact(f"{n}", 0, "", 0) for n in range(5)))
    marks = [rng.random(size) < share for size in sizes]
    parts = [
        ShardPasses(
            np.packbits(some, bitorder="little") if some.any() else np.empty(0, np.uint8), 0, int(some.sum())
        )
        for some in marks
    ]
    passing = Passing.of(shards, parts)
    for number, some in enumerate(marks):
        ids = starts[number] + (np.arange(len(some) + 3) << 13) + rng.integers(0, 1 << 13, len(some) + 3)
        assert passing.has(ids).tolist() == [*some.tolist(), False, False, False]
    assert passing.passes.rows == sum(map(np.count_nonzero, marks))
