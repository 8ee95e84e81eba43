"""The invariant of every format: units cover each row once, and reading some of them changes nothing."""

import csv
import io
import json
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_ray.formats import lines
from bge_ray.formats.rows import check_rows
from bge_ray.records.plan import UnitLimits
from bge_ray.storage.objects import Storage
from tests.support.reading import compress, csv_bytes, jsonl_bytes, parquet_bytes, read, resolve, scan

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
RECORDS = st.lists(
    st.fixed_dictionaries({"id": TEXT, "text": TEXT, "title": TEXT, "extra": TEXT}), min_size=1, max_size=30
)
LIMITS = st.builds(
    UnitLimits,
    max_rows=st.integers(1, 12),
    max_bytes=st.integers(1, 2000),
    vector_bytes=st.integers(0, 100),
)
STORAGE = Storage(timeout_s=5.0)
FIELDS = ("id", "text", "title", "extra")


def check_invariant(name: str, data: bytes, truth: list[dict], limits: UnitLimits, pick: list[bool]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        # Fields hold line breaks, which a TSV is asked about.
        settings = {"keep_columns": ("extra",), "csv_quoting": "csv"}
        scanned, corpus_object = scan(STORAGE, str(path), limits, **settings)
        assert corpus_object.n_rows == len(truth)
        units = corpus_object.units()
        assert [u.first_row for u in units] == [sum(u.n_rows for u in units[:i]) for i in range(len(units))]
        assert all(0 < u.n_rows <= limits.max_rows for u in units)
        columns = resolve(scanned, keep_columns=("extra",))
        chosen = [u.first_row for u, take in zip(units, pick * len(units), strict=False) if take]
        for wanted in (None, chosen):
            found = read(STORAGE, corpus_object, columns, wanted)
            assert list(found) == ([u.first_row for u in units] if wanted is None else chosen)
            for first, rows in found.items():
                expected = truth[first : first + len(rows)]
                for column, values in zip(
                    FIELDS, (rows.ids, rows.texts, rows.titles, rows.kept["extra"].to_pylist()), strict=True
                ):
                    assert values == [r[column] for r in expected]
                passages, rejected = check_rows(rows)
                assert sorted([*passages.rows, *(r.row for r in rejected)]) == list(range(len(rows)))


@settings(max_examples=60, deadline=None)
@given(
    records=RECORDS,
    limits=LIMITS,
    pick=st.lists(st.booleans(), min_size=1, max_size=5),
    ending=st.sampled_from(["", ".gz", ".zst"]),
    members=st.integers(1, 3),
    newline=st.sampled_from(["\n", "\r\n", "\n\n", "\n  \n"]),
    mark=st.sampled_from([b"", lines.BOM]),
    cut=st.booleans(),
)
def test_jsonl(records, limits, pick, ending, members, newline, mark, cut) -> None:
    data = mark + jsonl_bytes(records, newline)
    data = data.rstrip() if cut else data
    truth = [json.loads(line) for line in data.removeprefix(mark).split(b"\n") if line.strip()]
    assert truth == records
    check_invariant(f"a.jsonl{ending}", compress(data, ending, members), truth, limits, pick)


@settings(max_examples=60, deadline=None)
@given(
    records=RECORDS,
    limits=LIMITS,
    pick=st.lists(st.booleans(), min_size=1, max_size=5),
    ending=st.sampled_from(["", ".gz", ".zst"]),
    kind=st.sampled_from([("csv", ","), ("tsv", "\t")]),
)
def test_csv(records, limits, pick, ending, kind) -> None:
    # A column that looks like numbers would be kept as such.
    records = [record | {"extra": f"x{record['extra']}"} for record in records]
    data = csv_bytes(records, kind[1])
    truth = list(csv.DictReader(io.StringIO(data.decode(), newline=""), delimiter=kind[1]))
    check_invariant(f"a.{kind[0]}{ending}", compress(data, ending), truth, limits, pick)


@settings(max_examples=60, deadline=None)
@given(
    records=RECORDS,
    limits=LIMITS,
    pick=st.lists(st.booleans(), min_size=1, max_size=5),
    group=st.integers(1, 40),
    dictionary=st.booleans(),
)
def test_parquet(records, limits, pick, group, dictionary) -> None:
    data = parquet_bytes(records, row_group_size=group, use_dictionary=dictionary)
    truth = pq.read_table(io.BytesIO(data)).to_pylist()
    check_invariant("a.parquet", data, truth, limits, pick)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_mark_inside_a_file_belongs_to_its_line(tmp_path: Path, ending: str) -> None:
    """However the file is cut: only the mark that begins the file is no part of its row."""
    good, marked = b'{"id": "1", "text": "a"}\n', lines.BOM + b'{"id": "2", "text": "b"}\n'
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(lines.BOM + good + marked + good, ending))
    faults = []
    for max_rows in (1, 3):
        scanned, found = scan(STORAGE, str(path), UnitLimits(max_rows, 10_000, 0))
        rows = read(STORAGE, found, resolve(scanned))
        faults.append([first + row for first, part in rows.items() for row in part.faults])
    assert faults == [[1], [1]]
