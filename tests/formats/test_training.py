"""Training examples: what is read, what is left out and why, and that nothing is lost in silence."""

import gzip
import json
from pathlib import Path

import pytest

from bge_ray.errors import CorpusError
from bge_ray.formats.training import read_examples
from bge_ray.storage.objects import Storage

STORAGE = Storage(5)


def write(path: Path, *records: object) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def read(uri: str) -> tuple[list[object], list[tuple[object, ...]]]:
    rejected: list[tuple[object, ...]] = []
    return list(read_examples(STORAGE, uri, lambda *what: rejected.append(what))), rejected


def test_an_example_with_all_it_may_have(tmp_path: Path) -> None:
    labels = {"prompt": "Find it.", "type": "symmetric_sts"}
    record = {"query": "q", "pos": ["a", "b"], "neg": ["c"], "pos_id": [1, "x"], "_id": 7, **labels}
    (found,), rejected = read(write(tmp_path / "a.jsonl.gz", record))
    assert (found.query_id, found.query, found.texts) == ("7", "q", ["a", "b"])
    assert (found.passage_ids, found.labels) == (["1", "x"], labels)
    assert rejected == []


def test_what_is_no_example_is_named_with_its_line(tmp_path: Path) -> None:
    uri = write(
        tmp_path / "a.jsonl",
        {"query": "good", "pos": ["p"]},
        "{not json",
        ["a list"],
        {"pos": ["p"]},
        {"query": " ", "pos": ["p"]},
        {"query": "q", "pos": []},
        {"query": "q", "pos": "text"},
        {"query": "q", "pos": [1]},
        {"query": "q", "pos": ["p"], "pos_id": ["a", "b"]},
        {"query": "again", "pos": ["p"], "id": "1"},
        '{"query": "a \\ud800 b", "pos": ["p"]}',
        {"query": "q", "pos": ["p"], "neg": ["n\ud800"]},
        {"query": "q", "pos": ["\u200b "]},
        {"query": "q", "pos": ["p"], "prompt": 5},
    )
    found, rejected = read(uri)
    assert [(example.query_id, example.query) for example in found] == [("1", "good")]
    assert [reason for _, _, reason, _ in rejected] == [
        "malformed",
        "malformed",
        "empty_query",
        "empty_query",
        "no_positive",
        "malformed",
        "malformed",
        "malformed",
        "duplicate_query",
        "invalid_unicode",
        "invalid_unicode",
        "malformed",
        "malformed",
    ]
    assert len(found) + len(rejected) == 14
    assert [f"line {number}" in detail[3] for number, detail in enumerate(rejected, 2)] == [True] * 13


def test_lines_of_several_files_have_different_ids(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.json"):
        write(tmp_path / name, {"query": "q", "pos": ["p"]}, {"query": "r", "pos": ["p"]})
    found, rejected = read(str(tmp_path))
    assert [e.query_id for e in found] == ["a.jsonl:1", "a.jsonl:2", "b.json:1", "b.json:2"]
    assert rejected == []


def test_no_input_and_input_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such file"):
        read(str(tmp_path / "none"))
    with pytest.raises(CorpusError, match=r"\.jsonl or \.json"):
        read(write(tmp_path / "a.csv", "query,pos"))
