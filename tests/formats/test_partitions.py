"""Columns that stand in the path: kept with the values that pyarrow, too, reads from it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from bge_ray.errors import CorpusError
from bge_ray.formats.corpus import check_columns, list_corpus, scan_object
from bge_ray.formats.partitions import partition_values
from bge_ray.settings.sections import CorpusSettings
from bge_ray.storage.objects import Storage
from tests.support.reading import LARGE, csv_bytes, jsonl_bytes, read, resolve

KEEP = {"keep_columns": ("lang", "day", "n")}


def scan_all(storage: Storage, folder: Path, **settings):
    given = CorpusSettings(uri=str(folder), **settings)
    return [scan_object(storage, info, given, LARGE) for info in list_corpus(storage, given)]


def test_kept_columns_come_from_the_path_as_pyarrow_reads_it(storage: Storage, tmp_path: Path) -> None:
    langs = ["en", "zh", "a/b=c d%", None]
    table = pa.table(
        {
            "id": [str(i) for i in range(40)],
            "text": [f"text {i}" for i in range(40)],
            "n": list(range(40)),
            "lang": [langs[i % 4] for i in range(40)],
            "day": [f"2026-01-0{1 + i % 2}" for i in range(40)],
        }
    )
    hive = ds.partitioning(pa.schema([("lang", pa.string()), ("day", pa.string())]), flavor="hive")
    ds.write_dataset(table, tmp_path, format="parquet", partitioning=hive)
    scanned = scan_all(storage, tmp_path, **KEEP)
    assert len(scanned) == 4
    columns = resolve(scanned, **KEEP)
    assert {name: kind.name for name, kind in columns.kept.items()} == {
        "lang": "string",
        "day": "string",
        "n": "int64",
    }
    found = []
    for scan in scanned:
        for rows in read(storage, scan.under(0), columns).values():
            assert list(rows.kept) == ["lang", "day", "n"]
            found += zip(rows.ids, *(column.to_pylist() for column in rows.kept.values()), strict=True)
    theirs = ds.dataset(tmp_path, format="parquet", partitioning=hive).to_table()
    assert sorted(found, key=str) == sorted(
        zip(*(theirs[name].to_pylist() for name in ("id", "lang", "day", "n")), strict=True), key=str
    )


@pytest.mark.parametrize(("name", "encode"), [("a.jsonl", jsonl_bytes), ("a.csv", csv_bytes)])
def test_a_column_of_the_rows_comes_before_the_path(
    storage: Storage, tmp_path: Path, name: str, encode
) -> None:
    rows = [{"id": str(i), "text": "t", "lang": "of the row"} for i in range(3)]
    for folder, records in (
        ("lang=path", [{k: r[k] for k in ("id", "text")} for r in rows]),
        ("lang=other", rows),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(encode(records))
    other, path = scan_all(storage, tmp_path, keep_columns=("lang",))
    columns = resolve([other, path], keep_columns=("lang",))
    kept = [
        part.kept["lang"].to_pylist()
        for s in (other, path)
        for part in read(storage, s.under(0), columns).values()
    ]
    assert kept == [["of the row"] * 3, ["path"] * 3]
    # It is part of the plan, so that a unit is read as it was planned.
    assert path.under(0).partitions == (("lang", "path"),)


def test_an_object_outside_the_partitions_is_refused(storage: Storage, tmp_path: Path) -> None:
    for folder in (tmp_path / "lang=en", tmp_path):
        folder.mkdir(exist_ok=True)
        (folder / "a.jsonl").write_bytes(jsonl_bytes([{"id": "1", "text": "t"}]))
    bare, placed = scan_all(storage, tmp_path, keep_columns=("lang",))
    assert placed.partitions and not bare.partitions
    with pytest.raises(CorpusError, match=r"/a\.jsonl: no column 'lang'"):
        check_columns(bare, resolve(placed, keep_columns=("lang",)))


def test_what_a_path_says() -> None:
    assert partition_values("s3://b/year=2026/x=__HIVE_DEFAULT_PARTITION__/a=b=c/y=%2F/=z/k=v.parquet") == {
        "year": "2026",
        "x": None,
        "a": "b=c",
        "y": "/",
    }
    assert partition_values("s3://b/a.parquet") == {}
