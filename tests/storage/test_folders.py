"""Folders as places, and which settings may name folders within each other: a table."""

from pathlib import Path

import pytest

from bge_ray.errors import OutputCollisionError
from bge_ray.storage.folders import absolute, place, refuse_collisions, refuse_own_files, same_place
from bge_ray.storage.objects import Storage, join

SAME = [
    ("s3://b/x", "s3://b/x/"),
    ("s3://b/x", "s3a://b/x"),
    ("s3://b", "s3://b/"),
    ("gs://b/x", "gcs://b/x/"),
    ("/data/x", "/data/x/"),
    ("/data/x", "file:///data/x"),
    ("/data/x", "/data/y/../x"),
    ("/data/x", "/data/./x//"),
    ("/data/a b", "file:///data/a b/"),
    ("simplecache::s3://b/x", "s3://b/x"),
]
DIFFERENT = [
    ("s3://b/x", "s3://b/X"),
    ("s3://b/x", "s3://b/xy"),
    ("s3://b/x", "s3://c/x"),
    ("s3://b/x", "gs://b/x"),
    ("s3://b/y/../x", "s3://b/x"),  # in a bucket these are two keys
    ("/data/x", "/data/X"),
    ("/b/x", "s3://b/x"),
    ("memory://b/x", "/b/x"),
]


def is_inside(inner: str, outer: str) -> bool:
    below, above = place(inner), place(outer)
    n = len(above.parts)
    return below.protocol == above.protocol and len(below.parts) > n and below.parts[:n] == above.parts


@pytest.mark.parametrize(("a", "b"), SAME)
def test_two_names_of_one_place(a: str, b: str) -> None:
    assert same_place(a, b)
    assert same_place(b, a)
    assert not is_inside(a, b)
    assert is_inside(join(a, "deep/down"), b)
    assert is_inside(join(b, "deep"), a)
    assert not is_inside(a, join(b, "deep"))
    assert hash(place(a)) == hash(place(b))


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_two_places(a: str, b: str) -> None:
    assert not same_place(a, b)
    assert not is_inside(a, b)
    assert not is_inside(b, a)


def test_a_name_that_means_the_same_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("c/*.jsonl") == f"{tmp_path}/c/*.jsonl"
    assert absolute("file:///data/x") == "/data/x"
    for uri in ("s3://b/x/**", "simplecache::s3://b/x", "memory://x"):
        assert absolute(uri) == uri


def test_relative_and_linked_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    assert same_place("real", str(tmp_path / "real"))
    assert same_place("./real/../real", "file://" + str(tmp_path / "real"))
    assert same_place("link/deep", "real/deep")
    assert is_inside("link/not/there/yet", "real")
    assert is_inside("real", ".")
    assert not is_inside("real", "link/deep")


def test_a_bucket_holds_what_is_in_it() -> None:
    assert is_inside("s3a://b/x", "s3://b")
    assert not is_inside("s3://bb/x", "s3://b")


# (output.uri, search.output, rerank.output, corpus.uri, search.queries, rerank.candidates), and the two
# settings that the refusal names, or None where the nesting is legitimate.
D, R, RR, C, Q, K = (
    "output.uri",
    "search.output",
    "rerank.output",
    "corpus.uri",
    "search.queries",
    "rerank.candidates",
)
TABLE = [
    # Apart from each other.
    (("/w/data", "/w/run", "/w/run/reranked", "/w/corpus", "/w/queries.jsonl", "/w/run"), None),
    (("s3://b/d", "s3://b/r", "s3://b/rr", "s3://b/c", "s3://b/q", "s3://b/r/run.parquet"), None),
    ((None, None, "/w/rr", None, "/w/q.jsonl", "/w/candidates.jsonl"), None),
    # Outputs below each other, beside the files that the outer one has there itself.
    (("/w", "/w/run", "/w/run/reranked", None, None, None), None),
    (("/w", "/w/run", "/w/reranked", None, None, None), None),
    (("/w/run/data", "/w/run", "/w/reranked", None, None, None), None),
    (("/w", "/w", None, None, None, None), (D, R)),
    (("/w", "/w/../w/", None, None, None, None), (D, R)),
    ((None, "s3://b/r", "s3a://b/r/", None, None, None), (R, RR)),
    (("/w", None, "/w", None, None, None), (D, RR)),
    (("/w", "/w/embeddings", None, None, None, None), (D, R)),
    (("/w", "/w/index/run", None, None, None, None), (D, R)),
    (("/w", "/w/report.json", None, None, None, None), (D, R)),
    (("/w/run/work/data", "/w/run", None, None, None, None), (D, R)),
    ((None, "/w/run", "/w/run/work/reranked", None, None, None), (R, RR)),
    # The corpus in or around an output.
    (("/w", None, None, "/w", None, None), (D, C)),
    (("/w/out", None, None, "/w", None, None), (D, C)),
    (("/w/a/b/out", None, None, "file:///w/", None, None), (D, C)),
    (("/w/_out", None, None, "/w", None, None), None),  # hidden from a listing
    (("/w/.cache/out", None, None, "/w", None, None), None),
    (("/w/_day=1/out", None, None, "/w", None, None), (D, C)),  # a partition is not hidden
    (("/w", None, None, "/w/corpus", None, None), None),
    (("/w", None, None, "/w/corpus.jsonl", None, None), None),
    (("/w", None, None, "/w/embeddings", None, None), (D, C)),
    (("/w", None, None, "/w/embeddings/mine.parquet", None, None), (D, C)),
    (("/w", None, None, "/w/report.json", None, None), (D, C)),
    ((None, "/w/corpus/run", None, "/w/corpus", None, None), (R, C)),
    ((None, None, "/w/corpus", "/w/corpus", None, None), (RR, C)),
    (("s3://b/corpus-out", None, None, "s3://b/corpus", None, None), None),
    # A glob that reaches into an output, and globs that do not.
    (("/w/out", None, None, "/w/**/*.parquet", None, None), (D, C)),
    (("/w/out", None, None, "/w/**", None, None), (D, C)),
    (("/w/2024/out", None, None, "/w/2*/**/*.json", None, None), (D, C)),
    (("/w/out", None, None, "/w/**/*.jsonl", None, None), None),
    (("/w/out", None, None, "/w/**/part-*.parquet", None, None), None),
    (("/w/out", None, None, "/w/*.parquet", None, None), None),
    (("/w/out", None, None, "/w/2*/**/*.parquet", None, None), None),
    (("/w/_out", None, None, "/w/**/*.parquet", None, None), None),
    (("/v/out", None, None, "/w/**/*.parquet", None, None), None),
    # Queries.
    ((None, "/w/q", None, None, "/w/q", None), (R, Q)),
    ((None, "/w/q/run", None, None, "/w/q", None), (R, Q)),
    ((None, "/w/q/run", None, None, "/w/q/queries.jsonl", None), None),
    ((None, "/w/run", None, None, "/w/run/queries.jsonl", None), None),
    (("/w/data", "/w/run", None, None, "/w/data/queries.parquet", None), None),
    # Candidates: a run, of which one file is read, or that file.
    ((None, "/w/run", "/w/run/reranked", None, None, "/w/run"), None),
    ((None, "/w/run", "/w/run/reranked", None, None, "/w/run/run.parquet"), None),
    ((None, None, "/w/run/reranked", None, None, "/w/run"), None),
    ((None, None, "/w/run/reranked", None, None, "/w/run/run.parquet"), None),
    ((None, None, "/w/run", None, None, "/w/run"), (RR, K)),
    ((None, None, "/w/run", None, None, "/w/run/run.trec"), (RR, K)),
    ((None, None, "/w/run", None, None, "/w/run/candidates.jsonl"), None),
    ((None, None, "/w/run", None, None, "/w/run/work/part"), (RR, K)),
    (("/w", None, "/w/rr", None, None, "/w/run"), None),
]


@pytest.mark.parametrize(("uris", "named"), TABLE)
def test_which_nestings_are_legitimate(uris: tuple, named: tuple[str, str] | None) -> None:
    data, run, reranked, corpus, queries, candidates = uris

    def check() -> None:
        refuse_collisions({D: data, R: run, RR: reranked}, {C: corpus, Q: queries}, {K: candidates})

    if named is None:
        check()
        return
    with pytest.raises(OutputCollisionError, match="choose another") as caught:
        check()
    for setting in named:
        assert setting in str(caught.value)


def test_linked_folders_collide(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    real, link = str(tmp_path / "real"), str(tmp_path / "link")
    with pytest.raises(OutputCollisionError, match="both are"):
        refuse_collisions({D: real, R: link}, {}, {})
    with pytest.raises(OutputCollisionError, match="lies inside"):
        refuse_collisions({D: join(real, "out")}, {C: link}, {})


# Globs, and whether a listing holds what is written to <root>/w/out: the table is true of real listings.
GLOBS = [
    "w",
    "w/**/*.parquet",
    "w/**",
    "w/**/*.jsonl",
    "w/*.parquet",
    "w/o*/**/*.parquet",
    "w/x*/**/*.parquet",
]


@pytest.mark.parametrize("glob", GLOBS)
@pytest.mark.parametrize("output", ["w/out", "w/_out", "w/x/out"])
def test_what_is_refused_is_what_a_listing_sees(storage: Storage, root: str, glob: str, output: str) -> None:
    written = [
        join(root, output, n) for n in ("embeddings/000000-000000000.parquet", "run.parquet", "report.json")
    ]
    for uri in [*written, join(root, "w/corpus.parquet"), join(root, "w/corpus.jsonl")]:
        storage.write(uri, b"")
    listed = [info.uri for info in storage.list_files(join(root, glob))]
    seen = any(is_inside(uri, join(root, output)) for uri in listed)
    try:
        refuse_collisions({D: join(root, output)}, {C: join(root, glob)}, {})
        refused = False
    except OutputCollisionError:
        refused = True
    assert refused == seen
    if seen:
        with pytest.raises(OutputCollisionError, match=rf"{C}: lists .*{D}"):
            refuse_own_files(C, listed, {D: join(root, output), R: None})
    else:
        refuse_own_files(C, listed, {D: join(root, output), R: None})


def test_a_listing_may_hold_other_files_below_an_output() -> None:
    outputs = {D: "s3://b/out", R: None}
    refuse_own_files(C, ["s3://b/out/corpus/a.parquet", "s3://b/out/run/run.parquet"], outputs)
    for own in ("embeddings/000000-000000000.parquet", "manifest.json", "index/index.json"):
        with pytest.raises(OutputCollisionError, match=own):
            refuse_own_files(C, ["s3://b/corpus/a.parquet", f"s3://b/out/{own}"], outputs)


def test_what_mining_writes_is_no_input_of_it() -> None:
    for source in ("w/**/*.jsonl", "w/out/negatives.jsonl", "w/out"):
        with pytest.raises(OutputCollisionError):
            refuse_collisions({"mine.output": "w/out"}, {"mine.input": source}, {})
    refuse_collisions({"mine.output": "w/out"}, {"mine.input": "w/other/negatives.jsonl"}, {})
    refuse_collisions({"search.output": "w/out"}, {"search.queries": "w/**/*.jsonl"}, {})
