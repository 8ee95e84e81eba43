"""Qrels: both usual forms say the same, and a bad line is named."""

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
        ("q1 0 a 0.5\n", "line 1: expected .* with a whole number"),
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
