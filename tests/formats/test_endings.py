"""The table of endings: what each name means."""

import pytest

from bge_ray.formats.endings import Ending, beir_folder, ending_of


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("s3://b/a.parquet", Ending("parquet", "", ",")),
        ("a.PQ", Ending("parquet", "", ",")),
        ("a.csv.jsonl", Ending("jsonl", "", ",")),
        ("a.ndjson.gz", Ending("jsonl", "gzip", ",")),
        ("a.json.zst", Ending("jsonl", "zstd", ",")),
        ("a.csv", Ending("csv", "", ",")),
        ("a.Tsv", Ending("csv", "", "\t")),
        ("a.tsv.zstd", Ending("csv", "zstd", "\t")),
        ("run.trec.gz", Ending("", "gzip", ",")),
        ("a.jsonl.bz2", Ending("", "", ",")),
        ("a.tsv/part-0", Ending("", "", ",")),
        ("jsonl", Ending("", "", ",")),
        ("a.jsonl\n", Ending("", "", ",")),
    ],
)
def test_what_a_name_means(name: str, meaning: Ending) -> None:
    assert ending_of(name) == meaning


def test_files_of_a_beir_folder() -> None:
    assert beir_folder("s3://b/nq/corpus.jsonl.zstd", "corpus") == "s3://b/nq/"
    assert beir_folder("s3://b/nq/queries.jsonl", "queries") == "s3://b/nq/"
    for other in (
        "s3://b/my-corpus.jsonl",
        "s3://b/corpus.json",
        "s3://b/queries.jsonl",
        "s3://b/corpus.jsonl/x",
    ):
        assert beir_folder(other, "corpus") is None
