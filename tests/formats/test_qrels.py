"""Qrels: both usual forms say the same, and a bad line is named."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.errors import CorpusError, StorageError
from bge_ray.formats.qrels import read_qrels
from bge_ray.storage.objects import Storage, join
from tests.support.reading import compress


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
        ("q1 0 a 0.5\n", "line 1: relevance '0.5', expected a whole number"),
        # More than trec_eval counts with.
        ("q1 0 a 9223372036854775808\n", "line 1: relevance '9223372036854775808', expected a whole number"),
        ("q1 0 a 1\nq1 0 \xff 1\n", "line 2: not UTF-8"),
        ("", "no judgement"),
    ):
        storage.write(join(root, "bad"), text.encode("latin-1"))
        with pytest.raises(CorpusError, match=said):
            read_qrels(storage, join(root, "bad"))
    storage.write(join(root, "packed.tsv.zstd"), compress(b"q1\ta\t3\n", ".zst"))
    assert read_qrels(storage, join(root, "packed.tsv.zstd")) == {"q1": {"a": 3}}
    with pytest.raises((CorpusError, StorageError), match="no such object"):
        read_qrels(storage, join(root, "none.tsv"))


def test_ids_with_blanks_relevance_as_a_float_tables_and_folders(storage: Storage, root: str) -> None:
    expected = {"q 1": {"a doc": 1, "b": 0}, "q2": {"c": 2}}
    rows = [(q, p, r) for q, ps in expected.items() for p, r in ps.items()]
    lines = "".join(f"{q}\t{p}\t{float(r)}\n" for q, p, r in rows)
    trec = "".join(f"{q}\t0\t{p}\t{r}\n" for q, p, r in rows)
    storage.write(join(root, "beir/qrels/test.tsv"), f"query-id\tcorpus-id\tscore\n{lines}".encode())
    storage.write(join(root, "plain.tsv"), lines.encode())
    storage.write(join(root, "tabs.trec"), trec.encode())
    for kind in (pa.int64(), pa.float64()):
        sink = io.BytesIO()
        columns = [pa.array(values) for values in zip(*rows, strict=True)]
        names = ["query-id", "corpus-id", "score"]
        pq.write_table(pa.table([*columns[:2], columns[2].cast(kind)], names=names), sink)
        storage.write(join(root, f"hub/{kind}/test-00000-of-00001.parquet"), sink.getvalue())
    for name in ("beir", "beir/qrels", "plain.tsv", "tabs.trec", "hub/int64", "hub/double"):
        assert read_qrels(storage, join(root, name)) == expected
    with pytest.raises(CorpusError, match="holds several files"):
        read_qrels(storage, join(root, "hub"))
    storage.write(join(root, "half.tsv"), b"q\tp\t0.5\n")
    with pytest.raises(CorpusError, match=r"relevance '0\.5', expected a whole number"):
        read_qrels(storage, join(root, "half.tsv"))
