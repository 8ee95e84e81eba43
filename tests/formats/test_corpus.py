"""The corpus: what is found, what is read of it, and what is said about what cannot be."""

import datetime
import decimal
import gzip
import json
import logging
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import zstandard
from fsspec.spec import AbstractFileSystem

from bge_ray.errors import CorpusError, StorageError
from bge_ray.formats import lines
from bge_ray.formats.corpus import ScannedObject, check_all_columns, check_columns, list_corpus
from bge_ray.formats.queries import read_queries
from bge_ray.formats.rows import check_rows
from bge_ray.pipeline.embed.planning import unchanged_objects
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.columns import Columns
from bge_ray.records.plan import Plan, UnitLimits
from bge_ray.settings.sections import CorpusSettings
from bge_ray.storage.objects import Storage, join
from tests.support.reading import (
    LARGE,
    compress,
    csv_bytes,
    jsonl_bytes,
    parquet_bytes,
    read,
    read_all,
    resolve,
    scan,
)

pytestmark = pytest.mark.long

ROWS = [{"id": str(i), "text": f"text {i}", "title": f"title {i}"} for i in range(20)]


def put(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def reasons(rows) -> dict[int, str]:
    passages, rejected = check_rows(rows)
    assert len(passages.rows) + len(rejected) == len(rows)
    return {r.row: r.reason for r in rejected}


# --- what is found ---------------------------------------------------------------------------------


def listed(storage: Storage, uri: str, **settings) -> list[str]:
    return [info.uri.rpartition("/")[2] for info in list_corpus(storage, CorpusSettings(uri=uri, **settings))]


def test_a_folder_of_many_formats(storage: Storage, root: str, caplog: pytest.LogCaptureFixture) -> None:
    known = ["a.parquet", "b.pq", "c.jsonl", "d.ndjson.gz", "e.json.zst", "f.csv", "g.TSV.GZ", "h.jsonl.zstd"]
    for name in (*known, "README.md", "i.jsonl.bz2", "_SUCCESS"):
        storage.write(join(root, name), b"x")
    with caplog.at_level(logging.WARNING):
        assert listed(storage, root) == known
    assert "2 objects without a known ending are left out, such as" in caplog.text
    assert "README.md" in caplog.text
    assert listed(storage, join(root, "*.jsonl*")) == ["c.jsonl", "h.jsonl.zstd"]
    assert listed(storage, join(root, "README.md"), format="jsonl") == ["README.md"]


def test_nothing_is_said_plainly(storage: Storage, root: str) -> None:
    with pytest.raises(CorpusError, match=r"corpus\.uri is not set"):
        list_corpus(storage, CorpusSettings())
    for uri in (root, join(root, "none.jsonl"), join(root, "*.jsonl")):
        with pytest.raises(CorpusError, match="no such file or folder, or an empty one"):
            listed(storage, uri)
    storage.write(join(root, "notes.txt"), b"x")
    with pytest.raises(CorpusError, match=r"none of its 1 objects .*notes\.txt.*set corpus\.format"):
        listed(storage, root)


def test_a_store_that_tells_no_versions_apart_is_named(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    """There a new content of equal size would not be embedded again, which nobody must find out later."""

    class Bare(AbstractFileSystem):
        protocol = "bare"

        def ls(self, path: str, detail: bool = True, **_: object) -> list:
            assert detail
            return [{"name": f"{path}/a.jsonl", "size": 5, "type": "file"}]

    fsspec.register_implementation("bare", Bare, clobber=True)
    with caplog.at_level(logging.WARNING):
        assert listed(storage, "bare://corpus") == ["a.jsonl"]
    assert "tells neither an etag nor a time of 1 objects, such as bare://corpus/a.jsonl" in caplog.text
    assert "a new content of equal size would not be seen" in caplog.text


def test_a_missing_bucket_is_no_empty_corpus_only(storage: Storage, s3_server) -> None:
    with pytest.raises((CorpusError, StorageError), match="no-such-bucket"):
        listed(storage, "s3://no-such-bucket/corpus")


@pytest.mark.parametrize("name", ["caf\udce9.jsonl", "a::b.jsonl", "deep::er/a.jsonl"])
def test_a_name_that_means_something_else_is_said_plainly(
    storage: Storage, tmp_path: Path, name: str
) -> None:
    """A byte of Latin-1 cannot be written into a plan, and fsspec chains file systems at two colons."""
    path = Path(os.fsdecode(os.fsencode(tmp_path / name)))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(jsonl_bytes(ROWS))
    shown = re.escape(name.replace("\udce9", "\\udce9"))
    for look in (list_corpus, lambda storage, settings: list(read_queries(storage, settings.uri))):
        with pytest.raises(CorpusError, match=rf"/{shown}: its name .*; rename it") as caught:
            look(storage, CorpusSettings(uri=str(tmp_path)))
        str(caught.value).encode()


def test_colons_in_a_key_are_said_plainly(storage: Storage, s3_server, bucket: str) -> None:
    s3_server.filesystem().pipe_file(f"{bucket.removeprefix('s3://')}/a::b.jsonl", jsonl_bytes(ROWS))
    with pytest.raises(CorpusError, match=r"a::b\.jsonl: its name holds '::'"):
        listed(storage, bucket)


@pytest.mark.parametrize("chained", ["simplecache::{}", "blockcache::{}"])
def test_one_file_system_in_front_of_another_is_taken_as_such(
    storage: Storage, bucket: str, chained: str
) -> None:
    storage.write(join(bucket, "a.jsonl"), jsonl_bytes(ROWS))
    (info,) = list_corpus(storage, CorpusSettings(uri=chained.format(bucket)))
    assert read_all(storage, info.uri).ids == [row["id"] for row in ROWS]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_beir_works_as_it_is(storage: Storage, root: str, ending: str) -> None:
    beir = [{"_id": r["id"], "title": r["title"], "text": r["text"], "metadata": {}} for r in ROWS]
    storage.write(join(root, f"scifact/corpus.jsonl{ending}"), compress(jsonl_bytes(beir), ending))
    storage.write(join(root, f"scifact/queries.jsonl{ending}"), b"{}")
    storage.write(join(root, "scifact/qrels/test.tsv"), b"query-id\tcorpus-id\tscore\n")
    storage.write(join(root, "more/queries.jsonl"), b"{}")
    assert [i.uri.rpartition(f"{root}/")[2] for i in list_corpus(storage, CorpusSettings(uri=root))] == [
        "more/queries.jsonl",
        f"scifact/corpus.jsonl{ending}",
    ], "what lies beside a corpus.jsonl is known, the same name elsewhere is a corpus like any other"
    rows = read_all(storage, join(root, f"scifact/corpus.jsonl{ending}"), keep_columns=("metadata",))
    assert check_rows(rows)[0].texts == [f"{r['title']} {r['text']}" for r in ROWS]
    assert rows.kept["metadata"].to_pylist() == ["{}"] * len(ROWS)


@pytest.mark.slow
def test_thousands_of_objects_are_listed_without_opening_one(
    storage: Storage, bucket: str, faulty, s3_server
) -> None:
    fs = s3_server.filesystem()
    fs.pipe({f"{bucket.removeprefix('s3://')}/{i:05d}.jsonl": b"{}" for i in range(1100)}, batch_size=64)
    proxy = faulty()
    assert len(listed(storage, bucket)) == 1100
    assert {method for method, _ in proxy.requests} == {"GET"}
    assert all("list-type=2" in path for _, path in proxy.requests)
    assert len(proxy.requests) <= 4, "one a page of 1,000"


# --- Parquet ---------------------------------------------------------------------------------------


def test_small_row_groups_share_a_unit_and_a_giant_one_is_many(storage: Storage, tmp_path: Path) -> None:
    small = put(tmp_path, "small.parquet", parquet_bytes(ROWS, row_group_size=3))
    giant = put(tmp_path, "giant.parquet", parquet_bytes(ROWS, row_group_size=20))
    limits = UnitLimits(max_rows=6, max_bytes=10_000_000, vector_bytes=0)
    spans = scan(storage, small, limits)[1].spans
    assert [(s.start, s.stop, s.unit_rows) for s in spans] == [
        (0, 2, (6,)),
        (2, 4, (6,)),
        (4, 6, (6,)),
        (6, 7, (2,)),
    ]
    (span,) = scan(storage, giant, limits)[1].spans
    assert span.unit_rows == (5, 5, 5, 5)
    by_bytes = UnitLimits(max_rows=100, max_bytes=1200, vector_bytes=100)
    assert {sum(s.unit_rows) for s in scan(storage, small, by_bytes)[1].spans} <= {2, 3, 5, 6}
    assert scan(storage, small, by_bytes)[1].n_rows == 20


@pytest.mark.parametrize("length", [300, 10_000])  # the footer tells the smallest and largest up to 4 kB
@pytest.mark.parametrize("distinct", [3, 40])
def test_a_text_that_many_rows_share_counts_for_each(
    storage: Storage, tmp_path: Path, length: int, distinct: int
) -> None:
    texts = [f"{i % distinct:05d}" + "x" * length for i in range(2000)]
    rows = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    data = parquet_bytes(rows)
    spelled_out = sum(map(len, texts))
    assert len(data) < spelled_out / 10
    scanned, found = scan(storage, put(tmp_path, "a.parquet", data), UnitLimits(50_000, spelled_out // 10, 0))
    assert len(found.units()) >= 10
    assert [t for part in read(storage, found, resolve(scanned)).values() for t in part.texts] == texts


def test_the_title_counts_for_the_size_of_a_unit(storage: Storage, tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": "t", "title": os.urandom(500).hex()} for i in range(20)]
    uri = put(tmp_path, "a.parquet", parquet_bytes(rows, row_group_size=1))
    (first, *_) = scan(storage, uri, UnitLimits(100, 5000, 0))[1].spans
    assert first.unit_rows[0] <= 5
    nested = [{"id": str(i), "text": "t", "meta": {"long": [os.urandom(500).hex()]}} for i in range(20)]
    uri = put(tmp_path, "b.parquet", parquet_bytes(nested, row_group_size=1))
    (first, *_) = scan(storage, uri, UnitLimits(100, 5000, 0), keep_columns=("meta",))[1].spans
    assert first.unit_rows[0] <= 5


def test_parquet_column_types(storage: Storage, tmp_path: Path) -> None:
    day = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    text = ["a", "b", None]
    table = pa.table(
        {
            "id": pa.array([1, 2, 3], pa.int64()),
            "text": pa.array(text).dictionary_encode(),
            "title": pa.array(text, pa.large_string()),
            "view": pa.array(text, pa.string_view()),
            "n": pa.array([1, None, 3], pa.int32()),
            "flag": pa.array([True, False, None]),
            "when": pa.array([day, None, day], pa.timestamp("us", "UTC")),
            "price": pa.array([decimal.Decimal("1.50"), None, None]),
            "tags": pa.array([["x", "é"], [], None]),
            "meta": pa.array([{"a": 1, "b": None}, None, {"a": 2, "b": "z"}]),
            "raw": pa.array([b"\x00\xff", None, b""], pa.binary()),
            "half": pa.array(np.array([1.5, 2, 3], np.float16)),
            "nothing": pa.nulls(3),
        }
    )
    uri = put(tmp_path, "a.parquet", parquet_bytes(table))
    kept = tuple(table.column_names[3:])
    rows = read_all(storage, uri, keep_columns=kept)
    assert rows.ids == [1, 2, 3]
    assert rows.texts == rows.titles == text
    types = {name: str(column.type) for name, column in rows.kept.items()}
    assert types == {
        "view": "string", "n": "int32", "flag": "bool", "when": "timestamp[us, tz=UTC]",
        "price": "decimal128(3, 2)", "tags": "list<element: string>", "meta": "struct<a: int64, b: string>",
        "raw": "binary", "half": "halffloat", "nothing": "string",
    }  # fmt: skip
    values = {name: column.to_pylist() for name, column in rows.kept.items()}
    assert values["view"] == text
    assert values["n"] == [1, None, 3]
    for name in ("when", "price", "tags", "meta"):
        assert values[name] == table[name].to_pylist()
    assert values["raw"] == [b"\x00\xff", None, b""]
    assert values["nothing"] == [None] * 3


def _invalid_text(values: list[bytes]) -> pa.Array:
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


@pytest.mark.parametrize("dictionary", [False, True])
def test_text_that_is_no_utf8_is_one_rejected_row(storage: Storage, tmp_path: Path, dictionary: bool) -> None:
    bad = _invalid_text([b"fine", b"caf\xe9", b"also fine"])
    bad = bad.dictionary_encode() if dictionary else bad
    table = pa.table({"id": ["1", "2", "3"], "text": bad, "note": bad})
    uri = put(tmp_path, "a.parquet", parquet_bytes(table))
    rows = read_all(storage, uri, keep_columns=("note",))
    assert reasons(rows) == {1: "invalid_unicode"}
    assert rows.kept["note"].to_pylist() == ["fine", "caf\ufffd", "also fine"]


def test_an_empty_parquet_file_has_no_rows(storage: Storage, tmp_path: Path) -> None:
    empty = put(tmp_path, "a.parquet", parquet_bytes(pa.table({"other": pa.array([], pa.string())})))
    full = put(tmp_path, "b.parquet", parquet_bytes(ROWS))
    scanned = [scan(storage, uri)[0] for uri in (empty, full)]
    assert scanned[0].spans == ()
    assert resolve(scanned).id == "id", "an object without rows need not have the columns"
    with pytest.raises(CorpusError, match="1 objects, and no rows in any of them"):
        resolve(scanned[0])


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "page"])
def test_damaged_parquet_is_named(storage: Storage, tmp_path: Path, damage: str) -> None:
    good = parquet_bytes(
        [{"id": str(i), "text": os.urandom(99).hex()} for i in range(500)], compression="zstd"
    )
    bad = {
        "truncated": good[:-20],
        "garbage": b"not parquet at all" * 10,
        "empty": b"",
        "page": good[:1000] + bytes(3000) + good[4000:],
    }[damage]
    uri = put(tmp_path, "a.parquet", bad)
    with pytest.raises(CorpusError, match=r"a\.parquet: unreadable Parquet"):
        read_all(storage, uri)


def test_few_requests_for_parquet(storage: Storage, bucket: str, faulty) -> None:
    rows = [
        {"id": str(i), "text": os.urandom(200).hex(), "unused": os.urandom(200).hex()} for i in range(2000)
    ]
    uri = join(bucket, "a.parquet")
    storage.write(uri, parquet_bytes(rows, row_group_size=1000))
    proxy = faulty()
    scanned, found = scan(storage, uri)
    assert [m for m, _ in proxy.requests] == ["HEAD", "GET"], "the footer"
    del proxy.requests[:]
    read(storage, found, resolve(scanned))
    methods = [m for m, _ in proxy.requests]
    assert methods.count("HEAD") == 1, "unchanged when the bytes are here"
    assert methods.count("GET") == 3, "footer, and each row group's columns in one request"


MEMORY = """
import sys, psutil, pyarrow as pa
from bge_ray.storage.objects import Storage
from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.plan import UnitLimits
from tests.support.reading import scan, resolve
from bge_ray.formats.corpus import read_units
storage = Storage(5.0)
scanned, found = scan(storage, sys.argv[1], UnitLimits(2000, 100_000_000, 0))
columns = resolve(scanned)
(span,) = found.spans
todo, first = set(), 0
for n in span.unit_rows:
    todo.add(first); first += n
base = psutil.Process().memory_info().rss
peak = rows = 0
for unit, part in read_units(storage, found, span, columns, todo):
    rows += len(part)
    peak = max(peak, psutil.Process().memory_info().rss)
print(rows, peak - base)
"""


def _peak_reading_one_row_group(folder: Path, n_rows: int) -> int:
    rng = np.random.default_rng(0)
    table = pa.table(
        {"id": [str(i) for i in range(n_rows)], "text": [rng.bytes(3000).hex() for _ in range(n_rows)]}
    )
    uri = put(folder, f"{n_rows}.parquet", parquet_bytes(table, row_group_size=n_rows))
    done = subprocess.run([sys.executable, "-c", MEMORY, uri], capture_output=True, text=True, check=True)
    rows, peak = map(int, done.stdout.split())
    assert rows == n_rows
    return peak


@pytest.mark.slow
def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    small, large = (_peak_reading_one_row_group(tmp_path, n_rows) for n_rows in (10_000, 30_000))
    assert large - small < 70_000_000, "120 MB more are read; fetched whole they would all be held"


# --- lines -----------------------------------------------------------------------------------------


def test_bad_lines_are_one_row_each(storage: Storage, tmp_path: Path) -> None:
    good = jsonl_bytes(ROWS[:1]).strip()
    bad = {
        b'{"id": "x", "text": ': "malformed_line",
        b"[1, 2]": "malformed_line",
        b'"text"': "malformed_line",
        b"nonsense": "malformed_line",
        b"[" * 100_000: "malformed_line",
        b'{"id": ' + b"9" * 5000 + b', "text": "x"}': "malformed_line",
        b'{"id": "s", "text": "half \\ud83d"}': "invalid_unicode",
        b'{"id": "u", "text": "caf\xe9"}': "invalid_unicode",
        b'{"id": "\\udc00", "text": "x"}': "invalid_unicode",
        b'{"id": "n"}': "null_text",
        b'{"id": "n", "text": null}': "null_text",
        b'{"id": "n", "text": 5}': "non_string_text",
        b'{"id": "n", "text": "x", "title": ["y"]}': "non_string_text",
        b'{"id": "w", "text": " \\t\\u2003\\n"}': "empty_text",
        b'{"text": "x"}': "null_id",
        b'{"id": "  ", "text": "x"}': "null_id",
        b'{"id": true, "text": "x"}': "non_string_id",
        b'{"id": 1.5, "text": "x"}': "non_string_id",
        b'{"id": "0", "text": "again"}': "duplicate_id",
    }
    uri = put(
        tmp_path, "a.jsonl", b"\n".join([good, *bad, b'{"id": 7, "text": "NUL \\u0000 and \x00 stays"}'])
    )
    rows = read_all(storage, uri)
    found = reasons(rows)
    # A raw NUL is not allowed in JSON; an escaped one is a character like any other.
    assert found == dict(enumerate(bad.values(), 1)) | {len(bad) + 1: "malformed_line"}
    passages, rejected = check_rows(rows)
    assert passages.passage_ids == ["0"]
    assert all(0 < len(r.detail) <= 300 for r in rejected)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (json.dumps(ROWS, indent=1).encode(), "is a JSON array.*jq"),
        (json.dumps(ROWS).encode(), "is a JSON array.*jq"),
        (jsonl_bytes(ROWS).decode().encode("utf-16"), "is UTF-16.*UTF-8"),
        (jsonl_bytes(ROWS).decode().encode("utf-16-be"), "is UTF-16.*UTF-8"),
        (jsonl_bytes(ROWS).replace(b"\n", b"\r"), "carriage return"),
        (b"PAR1 and so on\n", "no line is a JSON object.*not JSON"),
        (b'{"id":\n"1"}\n', "no line is a JSON object.*not JSON"),
        (b"{}\n{}\n", "an object without keys"),
    ],
)
def test_what_is_no_jsonl_is_said_plainly(storage: Storage, tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(CorpusError, match=rf"a\.jsonl: .*{said}"):
        scan(storage, put(tmp_path, "a.jsonl", data))


def test_nul_and_integer_ids_are_kept(storage: Storage, tmp_path: Path) -> None:
    uri = put(tmp_path, "a.jsonl", b'{"id": 7, "text": "a\\u0000b"}')
    passages, rejected = check_rows(read_all(storage, uri))
    assert (passages.passage_ids, passages.texts, rejected) == (["7"], ["a\0b"], [])


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_line_that_is_too_long(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    rows = [*ROWS[:2], {"id": "long", "text": "x" * 5000}, *ROWS[2:4], {"id": "last", "text": "y" * 3000}]
    uri = put(tmp_path, f"a.jsonl{ending}", compress(jsonl_bytes(rows), ending))
    for limits in (LARGE, UnitLimits(2, 100_000, 0), UnitLimits(100, 500, 0)):
        found = read_all(storage, uri, limits)
        assert reasons(found) == {2: "malformed_line", 5: "malformed_line"}
        assert found.faults[2] == ("malformed_line", "the line exceeds 1000 bytes")


def test_a_giant_line_is_never_held(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JSON array in one line is a common mistake; it must not be read into memory to say so."""
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(lines, "READ_BYTES", 1 << 16)
    uri = put(tmp_path, "a.json", b"[" + b"{}, " * 5_000_000 + b"{}]")
    scanned, found = scan(storage, uri)
    sizes = []

    class Watched(Storage):
        def read_range(self, uri: str, start: int, stop: int) -> bytes:
            sizes.append(stop - start)
            return super().read_range(uri, start, stop)

    (rows,) = read(Watched(5.0), found, Columns("id", "text", None)).values()
    assert reasons(rows) == {0: "malformed_line"}
    assert max(sizes) <= 1 << 20
    assert scanned.columns == {}


def test_a_10_mb_text_is_a_row_like_any_other(storage: Storage, tmp_path: Path) -> None:
    long = "lorem ipsum " * 900_000
    rows = [ROWS[0], {"id": "long", "text": long, "title": ""}, ROWS[1]]
    limits = UnitLimits(50_000, 1_000_000, 0)
    for name, data in {
        "a.jsonl": jsonl_bytes(rows),
        "a.csv": csv_bytes(rows),
        "a.tsv.gz": compress(csv_bytes(rows, "\t"), ".gz"),
        "a.parquet": parquet_bytes(rows),
    }.items():
        uri = put(tmp_path, name, data)
        assert read_all(storage, uri, limits).texts == ["text 0", long, "text 1"]
        assert len(scan(storage, uri, limits)[1].units()) == 3


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("damage", ["cut", "cut at the end", "garbage", "plain"])
def test_broken_compression_is_named(
    storage: Storage, tmp_path: Path, ending: str, kind: str, damage: str
) -> None:
    many = [{"id": str(i), "text": os.urandom(99).hex()} for i in range(500)]
    plain = jsonl_bytes(many) if kind == "jsonl" else csv_bytes(many)
    good = compress(plain, ending)
    bad = {
        "cut": good[: len(good) // 2],
        "cut at the end": good[:-3],
        "garbage": good[:2000] + bytes(500) + good[2500:],
        "plain": plain,
    }[damage]
    uri = put(tmp_path, f"a.{kind}{ending}", bad)
    with pytest.raises(
        CorpusError, match=rf"a\.{kind}{ending}: broken {'gzip' if ending == '.gz' else 'zstd'}"
    ):
        read_all(storage, uri)


def test_compression_in_many_members_and_none(storage: Storage, tmp_path: Path) -> None:
    data = jsonl_bytes(ROWS)
    for ending in (".gz", ".zst"):
        for members in (2, 17):
            uri = put(tmp_path, f"a.jsonl{ending}", compress(data, ending, members))
            assert read_all(storage, uri).ids == [r["id"] for r in ROWS]
        assert scan(storage, put(tmp_path, f"b.jsonl{ending}", compress(b"", ending)))[1].spans == ()
    streamed = zstandard.ZstdCompressor().compressobj()  # no size in the frame header
    uri = put(tmp_path, "c.jsonl.zst", streamed.compress(data) + streamed.flush())
    assert read_all(storage, uri).ids == [r["id"] for r in ROWS]
    padded = put(tmp_path, "d.jsonl.gz", gzip.compress(data) + bytes(512))
    with pytest.raises(CorpusError, match="broken gzip"):  # refused, not read in part
        read_all(storage, padded)
    assert scan(storage, put(tmp_path, "e.jsonl", b"\n \n\n"))[1].spans == ()


def test_csv_with_newlines_in_fields(storage: Storage, tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f'line 1\nline "{i}"\r\n, end', "title": ""} for i in range(10)]
    uri = put(tmp_path, "a.csv", lines.BOM + csv_bytes(rows) + b"\r\n\r\n")
    found = read_all(storage, uri, UnitLimits(3, 10_000, 0))
    assert found.texts == [r["text"] for r in rows]
    assert found.ids == [r["id"] for r in rows]
    assert reasons(found) == {}


def test_bad_csv_rows(storage: Storage, tmp_path: Path) -> None:
    uri = put(tmp_path, "a.csv", b"id,text\n1,a\n2,b,c\n3\n4,caf\xe9\n5,\n6,a\x00b\n")
    rows = read_all(storage, uri)
    assert reasons(rows) == {1: "malformed_line", 2: "malformed_line", 3: "invalid_unicode", 4: "empty_text"}
    assert rows.faults[1][1] == "3 fields, the header has 2"


STRAY_QUOTES = b"""id\ttext
1\t"Quoted" at its beginning
2\ta screen of 27" and more
3\t"open
4\tand closed"
5\t5' 11\\"
6\tplain
"""


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_quotes_that_are_plain_characters(storage: Storage, tmp_path: Path, newline: bytes) -> None:
    data = STRAY_QUOTES.replace(b"\n", newline)
    plain = [line.split("\t") for line in STRAY_QUOTES.decode().splitlines()[1:]]
    for name, written in [("a.tsv", data), ("b.csv", data.replace(b"\t", b","))]:
        rows = read_all(storage, put(tmp_path, name, written), csv_quoting="none")
        assert [rows.ids, rows.texts] == [list(column) for column in zip(*plain, strict=True)]
        assert rows.faults == {}
    for quoting in ("auto", "csv"):
        with pytest.raises(CorpusError, match=r"a\.tsv: .*set corpus\.csv_quoting to none"):
            read_all(storage, put(tmp_path, "a.tsv", data), csv_quoting=quoting)


def test_lines_that_a_quote_would_make_one_row_of_are_refused_unless_asked_for(
    storage: Storage, tmp_path: Path
) -> None:
    data = b'id\ttext\n1\ta\n2\t"b\n3\tc"\n4\td\n'
    uri = put(tmp_path, "a.tsv", data)
    with pytest.raises(CorpusError, match=r"a quote that opens in line 3 closes in line 4.*csv_quoting"):
        read_all(storage, uri)
    assert read_all(storage, uri, csv_quoting="csv").texts == ["a", "b\n3\tc", "d"]
    assert read_all(storage, uri, csv_quoting="none").texts == ["a", '"b', 'c"', "d"]
    as_csv = put(tmp_path, "b.csv", data.replace(b"\t", b","))
    assert read_all(storage, as_csv).texts == ["a", "b\n3,c", "d"]


def test_plain_lines_hold_any_other_character(storage: Storage, tmp_path: Path) -> None:
    texts = ["a\rb", "\x0b\x0c\x1c\u2028\u0085", 'all""', "\\", "'", "é"]
    data = "id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts))
    rows = read_all(storage, put(tmp_path, "a.tsv", data.encode()), csv_quoting="none")
    assert rows.texts == texts


@pytest.mark.parametrize("quoting", ["auto", "csv", "none"])
def test_a_file_without_a_header(storage: Storage, tmp_path: Path, quoting: str) -> None:
    """As the collection.tsv of MS MARCO is."""
    uri = put(tmp_path, "collection.tsv", b"0\tThe presence of communication\n1\tThe Manhattan Project\n")
    settings = {"header": ("passage_id", "text"), "csv_quoting": quoting}
    rows = read_all(storage, uri, **settings)
    assert rows.ids == ["0", "1"]
    assert rows.texts == ["The presence of communication", "The Manhattan Project"]
    with pytest.raises(CorpusError, match=r"first record has 2 fields, corpus\.header names 3 columns"):
        read_all(storage, uri, **(settings | {"header": ("passage_id", "title", "text")}))
    with pytest.raises(CorpusError, match="a column name stands twice"):
        read_all(storage, uri, **(settings | {"header": ("text", "text")}))
    empty = put(tmp_path, "empty.tsv", b"")
    assert scan(storage, empty, **settings)[0].spans == ()


def test_an_object_that_is_read_in_another_way_is_another_object(storage: Storage, tmp_path: Path) -> None:
    uris = [
        put(tmp_path, "a.tsv", b"id\ttext\n1\ta\n"),
        put(tmp_path, "b.jsonl", b'{"id": "1", "text": "x"}'),
    ]
    before = Plan(tuple(scan(storage, uri)[1] for uri in uris), 1)
    listed = storage.list_files(str(tmp_path))
    for changes, same in [
        ({}, uris),
        ({"csv_quoting": "none"}, uris[1:]),
        ({"header": ("id", "text")}, uris[1:]),
    ]:
        found = unchanged_objects(listed, before, CorpusSettings(uri=str(tmp_path), **changes))
        assert [uri.removeprefix("file://") for uri in found] == [u.removeprefix("file://") for u in same]


def test_csv_that_cannot_be_cut_into_rows(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_quote = put(tmp_path, "a.csv", b'id,text\n1,a\n2,"b\n3,c\n4,d\n')
    with pytest.raises(
        CorpusError, match=r"a\.csv: not valid CSV in the record that begins at line 3.*quote left open"
    ):
        read_all(storage, open_quote)
    stray = put(tmp_path, "b.csv", b'id,text\n1,a\n2,"b" c\n')
    with pytest.raises(CorpusError, match=r"b\.csv: not valid CSV in the record that begins at line 3"):
        read_all(storage, stray)
    twice = put(tmp_path, "c.csv", b"id,text,id\n1,a,2\n")
    with pytest.raises(CorpusError, match=r"c\.csv: a column name stands twice"):
        read_all(storage, twice)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    long = put(tmp_path, "d.csv", b"id,text\n1,a\n2," + b"x" * 2000 + b"\n")
    with pytest.raises(
        CorpusError, match=r"d\.csv: not valid CSV in the record that begins at line 3.*limit"
    ):
        read_all(storage, long)
    for name, data in {"e.csv": b"", "f.csv": b"id,text\n"}.items():
        assert scan(storage, put(tmp_path, name, data))[1].spans == ()


def test_a_span_of_plain_lines_is_read_alone(storage: Storage, bucket: str, faulty) -> None:
    rows = [{"id": str(i), "text": os.urandom(50_000).hex()} for i in range(100)]
    uri = join(bucket, "a.jsonl")
    storage.write(uri, jsonl_bytes(rows))
    scanned, found = scan(storage, uri, UnitLimits(10, 100_000_000, 0))
    assert len(found.spans) == 10
    proxy = faulty()
    (part,) = read(storage, found, resolve(scanned), {70}).values()
    assert part.ids == [str(i) for i in range(70, 80)]
    assert [m for m, _ in proxy.requests] == ["GET", "HEAD"]


# --- columns ---------------------------------------------------------------------------------------


def scanned_of(storage: Storage, folder: Path, name: str, rows, **settings) -> object:
    data = parquet_bytes(rows) if name.endswith("parquet") else jsonl_bytes(rows)
    if name.endswith("csv"):
        data = csv_bytes(rows)
    return scan(storage, put(folder, name, data), **settings)[0]


def test_columns_are_found_by_name(storage: Storage, tmp_path: Path) -> None:
    a = scanned_of(storage, tmp_path, "a.jsonl", [{"_id": "1", "id": "2", "text": "x", "title": "t"}])
    columns = resolve(a)
    assert (columns.id, columns.text, columns.title, columns.kept) == ("_id", "text", "title", {})
    assert resolve(a, title_column=None).title is None
    assert resolve(a, text_column="title").title is None
    assert resolve(a, id_column="id").id == "id"
    for name in ("id", "passage_id"):
        assert resolve(scanned_of(storage, tmp_path, "b.csv", [{name: "1", "text": "x"}])).id == name


def test_missing_columns_are_named_with_what_is_there(storage: Storage, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        a = scanned_of(storage, tmp_path, name, [{"key": "1", "body": "x"}])
        with pytest.raises(
            CorpusError, match=rf"{name}: no id column among \['body', 'key'\].*set corpus\.id_column"
        ):
            resolve(a)
        with pytest.raises(
            CorpusError, match=rf"{name}: no column 'text' \(corpus\.text_column\).*\['body', 'key'\]"
        ):
            resolve(a, id_column="key")
        with pytest.raises(CorpusError, match=r"no column 'lang' \(corpus\.keep_columns \(lang\)\)"):
            resolve(a, id_column="key", text_column="body", keep_columns=("lang",))
    with pytest.raises(CorpusError, match=r"no column 'name' \(corpus\.title_column\)"):
        resolve(a, id_column="key", text_column="body", title_column="name")


def test_titles_are_never_dropped_in_silence(storage: Storage, tmp_path: Path) -> None:
    titled = scanned_of(storage, tmp_path, "a.parquet", ROWS)
    bare = scanned_of(storage, tmp_path, "b.parquet", [{"id": "1", "text": "x"}])
    loose = scanned_of(storage, tmp_path, "c.jsonl", [{"id": "1", "text": "x"}])
    for some in ([titled, bare], [bare, titled]):
        with pytest.raises(
            CorpusError, match=r"b\.parquet: no column 'title'.*set corpus\.title_column to null"
        ) as it:
            resolve(some)
        # Without that, the next run would refuse what this hint makes of the settings.
        assert "to null and choose another output.uri" in str(it.value)
    assert resolve([bare, titled], title_column=None).title is None
    assert resolve([loose, titled]).title == "title", "a key may be missing from lines"
    assert resolve([bare, loose]).title is None


def test_every_object_that_lacks_a_column_is_named(storage: Storage, tmp_path: Path) -> None:
    whole = pa.table({"id": ["1"], "text": ["x"], "title": ["t"]})
    found = [scanned_of(storage, tmp_path, "a.parquet", whole)]
    found += [scanned_of(storage, tmp_path, f"b{n}.parquet", whole.drop(["title"])) for n in range(12)]
    with pytest.raises(CorpusError) as caught:
        resolve(found)
    head, *lines = str(caught.value).splitlines()
    assert head == "12 corpus objects lack what others have:"
    assert [f"/b{n}.parquet: " in line for n, line in enumerate(lines[:10])] == [True] * 10
    assert lines[10:] == ["  and 2 more"]
    with pytest.raises(CorpusError, match=r"(?s)b3\.parquet.*'title'.*b11\.parquet") as caught:
        check_all_columns([found[0], found[4], found[12]], resolve(found[:1]))
    assert len(str(caught.value).splitlines()) == 3


def test_column_types_are_checked_before_any_row(storage: Storage, tmp_path: Path) -> None:
    def one(**columns) -> object:
        return scanned_of(storage, tmp_path, "a.parquet", pa.table(columns))

    text = pa.array(["x"])
    with pytest.raises(CorpusError, match=r"column 'text' is int64, expected text"):
        resolve(one(id=text, text=pa.array([1])))
    with pytest.raises(
        CorpusError, match=r"id column 'id' is double, expected text, integers, decimals or UUIDs"
    ):
        resolve(one(id=pa.array([1.0]), text=text))
    for kind in (pa.timestamp("us", "UTC"), pa.timestamp("us"), pa.date32()):
        with pytest.raises(
            CorpusError, match=r"id column 'id' is (timestamp|date).*, expected text, integers"
        ):
            resolve(
                one(
                    id=pa.array([1], pa.int32()).cast(pa.int64()).cast(pa.timestamp("us")).cast(kind),
                    text=text,
                )
            )
    with pytest.raises(CorpusError, match=r"column 'title' is binary"):
        resolve(one(id=text, text=text, title=pa.array([b"x"])))
    assert resolve(one(id=pa.array([1], pa.uint32()), text=text, title=pa.nulls(1))).title == "title"


def test_kept_types_agree_over_objects(storage: Storage, tmp_path: Path) -> None:
    def one(name: str, array: pa.Array) -> object:
        return scanned_of(storage, tmp_path, name, pa.table({"id": ["1"], "text": ["x"], "n": array}))

    keep = {"keep_columns": ("n",)}
    nulls, ints = one("0.parquet", pa.nulls(1)), one("1.parquet", pa.array([1]))
    floats, text = one("2.parquet", pa.array([1.5])), one("3.parquet", pa.array(["x"]))
    small = one("5.parquet", pa.array([1], pa.int8()))
    loose = scanned_of(storage, tmp_path, "4.jsonl", [{"id": "1", "text": "x", "n": 3}], **keep)
    words = scanned_of(storage, tmp_path, "6.jsonl", [{"id": "1", "text": "x", "n": ["three"]}], **keep)
    fields = scanned_of(storage, tmp_path, "7.csv", [{"id": "1", "text": "x", "n": "3.5"}], **keep)

    def kept(*objects: object) -> str:
        return str(resolve(list(objects), **keep).kept_schema().field("n").type)

    assert kept(nulls, ints) == kept(ints, small, loose) == "int64"
    assert kept(nulls) == "string"
    assert kept(small) == "int8"
    assert kept(ints, floats) == kept(loose, fields, small) == "double"
    assert kept(loose, words, text, nulls, fields) == "string", "only text formats disagree"
    for some in ([text, ints], [nulls, text, floats, ints]):
        with pytest.raises(
            CorpusError, match=r"kept column 'n' is string in .*3\.parquet and (int64|double) in"
        ):
            kept(*some)
    with pytest.raises(
        CorpusError,
        match=r"'n' is int64 in .*1\.parquet and list<element: string> in .*6\.jsonl; write one of them anew",
    ):
        kept(ints, words)
    with pytest.raises(
        CorpusError, match=r"2\.parquet: kept column 'n' is double, elsewhere in the data set int64"
    ):
        check_columns(floats, resolve([ints], **keep))
    with pytest.raises(
        CorpusError, match=r"3\.parquet: kept column 'n' is string, elsewhere in the data set int64"
    ):
        check_columns(text, resolve([ints], **keep))
    with pytest.raises(
        CorpusError, match=r"1\.parquet: kept column 'n' is int64, elsewhere in the data set string"
    ):
        check_columns(ints, resolve([text], **keep))
    for fitting in (small, nulls, loose):
        check_columns(fitting, resolve([ints], **keep))
    for fitting in (words, fields, loose):
        check_columns(fitting, resolve([text], **keep))


def test_twice_the_same_column_is_refused(storage: Storage, tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["1"])] * 3, names=["id", "text", "text"])
    with pytest.raises(CorpusError, match="a column name stands twice"):
        scan(storage, put(tmp_path, "a.parquet", parquet_bytes(table)))


def test_keys_of_late_rows_are_found(storage: Storage, tmp_path: Path) -> None:
    """However far from the beginning a title or a kept column begins, and however its name is escaped."""
    plain = [{"id": str(i), "text": f"text {i}"} for i in range(300)]
    late = {"id": "late", "text": "x", "title": "a title", "l/g": "en", "größe": 3}
    whole = json.dumps(late, ensure_ascii=False)
    for n, line in enumerate(
        (whole, json.dumps(late), whole.replace("title", "t\\u0069tle").replace("/", "\\/"))
    ):
        for place in (0, 150, 300):
            rows = jsonl_bytes(plain[:place]) + line.encode() + b"\n" + jsonl_bytes(plain[place:])
            uri = put(tmp_path, f"{n}.jsonl", rows)
            assert resolve(scan(storage, uri)[0]).title == "title"
            found = read_all(storage, uri)
            titles = [None] * place + ["a title"] + [None] * (300 - place)
            assert found.titles == titles
            keep = {"keep_columns": ("l/g", "größe"), "title_column": "l/g", "text_column": "title"}
            assert read_all(storage, uri, **keep).kept["größe"].to_pylist() == [t and 3 for t in titles]
            assert read_all(storage, uri, title_column="größe").titles == [t and 3 for t in titles]
            assert read_all(storage, uri, title_column="l/g").titles == [t and "en" for t in titles]


def test_a_late_id_key_is_no_id_column(storage: Storage, tmp_path: Path) -> None:
    """What the first rows have decides, whether or not later rows are parsed for another reason."""
    rows = [{"id": str(i), "text": "x"} for i in range(200)] + [
        {"_id": "z", "id": "200", "text": "x", "n": 1}
    ]
    uri = put(tmp_path, "a.jsonl", jsonl_bytes(rows))
    for keep in ((), ("n",)):
        assert resolve(scan(storage, uri, keep_columns=keep)[0], keep_columns=keep).id == "id"


def test_names_that_are_no_utf8_are_said_to_be_so(storage: Storage, tmp_path: Path) -> None:
    latin = put(tmp_path, "a.csv", "id,text,größe\n1,x,2\n".encode("latin-1"))
    wide = put(tmp_path, "b.csv", "id,text\n1,x\n".encode("utf-16"))
    for uri in (latin, wide):
        with pytest.raises(CorpusError, match=r"\.csv: the header .* is not UTF-8; write the file anew"):
            scan(storage, uri)
    key = put(
        tmp_path, "c.jsonl", b'{"id": "1", "text": "x", "\\ud800k": 1}\n{"id": "2", "text": "y", "\xff": 1}'
    )
    scanned, _ = scan(storage, key)
    assert from_json(ScannedObject, to_json(scanned)) == scanned
    assert read_all(storage, key).texts == ["x", "y"]


def test_tabs_separate_whatever_the_compression(storage: Storage, tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f"a, b, {i}"} for i in range(5)]
    for ending in ("", ".gz", ".zst", ".zstd", ".ZSTD"):
        data = compress(csv_bytes(rows, "\t"), ending.lower()[:4])
        assert read_all(storage, put(tmp_path, f"a.tsv{ending}", data)).texts == [r["text"] for r in rows]


def test_uuids_and_decimals_are_ids(storage: Storage, tmp_path: Path) -> None:
    keys = [uuid.UUID(int=i * 7**40) for i in range(3)]
    numbers = [decimal.Decimal(12345678901234567890 + i) for i in range(3)]
    ids = {
        "uuid": (pa.array([key.bytes for key in keys], pa.uuid()), [str(key) for key in keys]),
        "decimal": (pa.array(numbers, pa.decimal128(38, 0)), [str(n) for n in numbers]),
        "scaled": (pa.array(numbers, pa.decimal128(38, 2)), [f"{n}.00" for n in numbers]),
        "small": (pa.array([decimal.Decimal("0.0000001")] * 3, pa.decimal128(9, 7)), ["0.0000001"] * 3),
        "integers": (pa.array([1, 2, 3]).dictionary_encode(), ["1", "2", "3"]),
    }
    for name, (column, truth) in ids.items():
        table = pa.table({"id": column, "text": ["x", "y", "z"]})
        rows = read_all(
            storage, put(tmp_path, f"{name}.parquet", parquet_bytes(table)), UnitLimits(2, 9999, 0)
        )
        assert [str(i) for i in rows.ids] == truth
        if name != "small":
            assert check_rows(rows)[0].passage_ids == truth
    raw = pa.table({"id": pa.array([b"0" * 16], pa.binary(16)), "text": ["x"]})
    scanned, _ = scan(storage, put(tmp_path, "raw.parquet", parquet_bytes(raw)))
    with pytest.raises(CorpusError, match=r"id column 'id' is fixed_size_binary\[16\], expected text"):
        resolve(scanned)


# --- between plan and read -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv"])
@pytest.mark.parametrize("change", ["other", "shorter", "longer", "gone"])
def test_a_change_after_the_plan_is_said_to_be_one(
    storage: Storage, root: str, name: str, change: str
) -> None:
    def content(rows) -> bytes:
        if name == "a.parquet":
            return parquet_bytes(rows, row_group_size=5)
        return compress(
            csv_bytes(rows) if name == "a.csv" else jsonl_bytes(rows), ".gz" if name.endswith("gz") else ""
        )

    uri = join(root, name)
    storage.write(uri, content(ROWS))
    scanned, found = scan(storage, uri, UnitLimits(5, 10_000_000, 0))
    columns = resolve(scanned)
    if change == "gone":
        storage.delete([uri])
    else:
        new = {
            "other": [r | {"text": r["text"].upper()} for r in ROWS],
            "shorter": ROWS[:7],
            "longer": ROWS * 2,
        }
        storage.write(uri, content(new[change]))
    said = (
        "is gone; run again to plan without it"
        if change == "gone"
        else "changed since the run began; run again, the embed job first if"
    )
    with pytest.raises(CorpusError, match=said) as caught:
        read(storage, found, columns)
    assert name in str(caught.value)
    assert "to embed" not in str(caught.value)  # a rerank reads corpora, too


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv"])
def test_a_change_while_reading_yields_nothing_mixed(
    storage: Storage, bucket: str, faulty, s3_server, name: str
) -> None:
    """The object is replaced before the rows arrive, at every request in turn."""

    def content(word: str, count: int) -> bytes:
        rows = [{"id": str(i), "text": f"{word} {i}"} for i in range(count)]
        if name == "a.parquet":
            return parquet_bytes(rows, row_group_size=5)
        return compress(
            csv_bytes(rows) if name == "a.csv" else jsonl_bytes(rows), ".gz" if name.endswith("gz") else ""
        )

    uri = join(bucket, name)
    other = s3_server.filesystem()
    proxy = faulty()
    for new in (content("new", 20), content("newer and longer", 50)):
        for turn in range(1, 6):
            proxy.fault = lambda *_: ""
            storage.write(uri, content("old", 20))
            scanned, found = scan(storage, uri, UnitLimits(100, 10_000_000, 0))

            def replace(number: int, *_: object, turn=turn, new=new) -> str:
                if number == turn:
                    other.pipe_file(uri.removeprefix("s3://"), new)
                return ""

            columns = resolve(scanned)
            del proxy.requests[:]
            proxy.fault = replace
            try:
                ((_, rows),) = read(storage, found, columns).items()
            except CorpusError as error:
                assert "changed since the run began" in str(error)
            else:
                assert turn > len(proxy.requests)
                assert rows.texts == [f"old {i}" for i in range(20)]


def test_an_unreachable_store_is_a_storage_error_in_every_format(
    storage: Storage, bucket: str, faulty, s3_server
) -> None:
    """Not a corpus error: the corpus is fine, and the next run continues."""
    many = [{"id": str(i), "text": os.urandom(100).hex()} for i in range(200)]
    contents = {
        "a.parquet": parquet_bytes(many, row_group_size=50),
        "a.jsonl": jsonl_bytes(many),
        "a.jsonl.gz": compress(jsonl_bytes(many), ".gz"),
        "a.csv.zst": compress(csv_bytes(many), ".zst"),
    }
    denied = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
    assert denied
    for name, data in contents.items():
        uri = join(bucket, name)
        storage.write(uri, data)
        scanned, found = scan(storage, uri)
        columns = resolve(scanned)
        proxy = faulty(lambda _, method, path: "403" if method == "GET" else "")
        with pytest.raises(StorageError, match=name):
            read(storage, found, columns)
        with pytest.raises(StorageError, match=name):
            scan(storage, uri)
        proxy.fault = lambda *_: ""


def test_ids_survive_as_json_would_have_them(storage: Storage, tmp_path: Path) -> None:
    uri = put(tmp_path, "a.jsonl", json.dumps({"id": 2**63, "text": "x", "k": [1, {"é": None}]}).encode())
    rows = read_all(storage, uri, keep_columns=("k",))
    assert check_rows(rows)[0].passage_ids == [str(2**63)]
    assert rows.kept["k"].to_pylist() == ['[1, {"é": null}]'], "no type holds both, so it is text"
