"""Which objects of the plan before a new one is compared with, and which of their shards a unit looks at."""

import numpy as np

from bge_ray.formats.corpus import ScannedObject
from bge_ray.pipeline.embed.sources import (
    MAX_EARLIER,
    NEAR_SHARDS,
    EarlierObjects,
    earlier_shards,
    nearest,
)
from bge_ray.pipeline.embed.tasks import Source
from bge_ray.records.dataset import FileFact, make_manifest
from bge_ray.records.plan import Coding, CorpusObject, Plan, Unit
from bge_ray.storage.objects import ObjectInfo
from tests.support.records import make_marker


def known(number: int, uri: str, size: int, etag: str, earlier: tuple[int, ...] = ()) -> CorpusObject:
    return CorpusObject(number, uri, size, etag, Coding("jsonl"), (), earlier=earlier)


def seen(uri: str, size: int, etag: str) -> ScannedObject:
    return ScannedObject(ObjectInfo(uri, size, etag, etag), Coding("jsonl"), (), {})


def test_the_likeliest_object_comes_first_and_what_it_was_compared_with_follows() -> None:
    objects = (
        known(0, "s3://b/x.jsonl", 10, "e0"),
        known(1, "s3://b/y.jsonl", 20, "e1", earlier=(7,)),
        known(2, "s3://b/z.jsonl", 10, "e2"),
        known(3, "s3://b/old/w.jsonl", 30, "e3"),
        known(4, "s3://b/none.jsonl", 40, "-"),
    )
    listed = ["s3://b/x.jsonl", "s3://b/y.jsonl", "s3://b/z.jsonl", "s3://b/none.jsonl"]
    earlier = EarlierObjects(Plan(objects, 8), listed)
    assert earlier.of(seen("s3://b/copy.jsonl", 20, "e1")) == (1, 7), "the same version, and what that had"
    assert earlier.of(seen("s3://b/y.jsonl", 21, "n")) == (1, 7), "its own earlier version"
    assert earlier.of(seen("s3://b/y.jsonl", 10, "e2")) == (2, 1, 7, 0), "another's content under its name"
    assert earlier.of(seen("s3://b/copy.jsonl", 10, "n")) == (0, 2), "of the same size"
    assert earlier.of(seen("s3://b/new/w.jsonl", 31, "n")) == (3,), "gone elsewhere under the same name"
    assert earlier.of(seen("s3://b/new/x.jsonl", 11, "n")) == (), "the one of this name is still there"
    assert earlier.of(seen("s3://b/new/v.jsonl", 9, "-")) == ()
    many = tuple(known(n, f"s3://b/{n}.jsonl", 10, f"e{n}") for n in range(9))
    assert len(EarlierObjects(Plan(many, 9), []).of(seen("s3://b/a.jsonl", 10, "n"))) == MAX_EARLIER
    assert EarlierObjects(None, []).of(seen("s3://b/a.jsonl", 10, "n")) == ()


def test_shards_are_those_published_and_those_left_of_objects_that_are_gone() -> None:
    def marker(number: int, first_row: int, path: str):
        return make_marker(Unit(number, first_row, 5), FileFact(path, 1, "0", 5))

    published = [marker(0, 0, "a"), marker(0, 5, "b"), marker(1, 0, "c")]
    # Of this run, under way: the same unit with other columns, and a unit of an object that is new.
    under_way = {"00000000-0000000000": marker(0, 0, "a2"), "00000003-0000000000": marker(3, 0, "d")}
    left = {"00000002-0000000000": marker(2, 0, "e")}
    plan = Plan((known(0, "x", 1, "e"), known(3, "y", 1, "e")), 4)
    manifest = make_manifest("v", published)
    found = earlier_shards(manifest, under_way | left, plan, "v")
    paths = {number: [source.fact.path for source in some] for number, some in found.items()}
    assert paths == {0: ["a", "b"], 1: ["c"], 2: ["e"]}
    assert earlier_shards(manifest, {}, plan, "w") == {}, "vectors of other settings are no vectors of this"
    assert earlier_shards(None, left, plan, "v").keys() == {2}


def test_the_nearest_shards_are_those_of_the_same_rows_and_around_them() -> None:
    sources = [Source(first, 100, FileFact(str(first), 1, "0", 100), "f") for first in range(0, 20_000, 100)]
    near = nearest(sources, 5_000, 100, 700)
    assert len(near) == 7
    assert near[0].first_row in (4_900, 5_000, 5_100)
    assert max(abs(source.first_row - 5_000) for source in near) <= 400
    assert len(nearest(sources, 0, 10, 10**9)) == NEAR_SHARDS
    large = [Source(0, 9, FileFact("a", 1, "0", 10**6), "f"), Source(0, 9, FileFact("b", 1, "0", 10), "f")]
    assert [source.fact.path for source in nearest(large, 0, 10, 100)] == ["a"], "one is always looked at"
    assert nearest([], 0, 10) == []
    # Of rows that are cut into many chunks: it is rows that are near, not chunks.
    chunked = [
        Source(first, 100, FileFact(str(first), 1, "0", 50_000), "f") for first in range(0, 20_000, 100)
    ]
    assert {source.first_row for source in nearest(chunked, 15_000, 100)} >= {14_900, 15_000, 15_100}
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, rows = int(rng.integers(0, 20_000)), int(rng.integers(1, 500))
        near = nearest(sources, first, rows)
        overlapping = {
            s.first_row for s in sources if s.first_row < first + rows and first < s.first_row + 100
        }
        assert overlapping <= {source.first_row for source in near}
