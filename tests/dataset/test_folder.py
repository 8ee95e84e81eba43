"""The data set: what was written is found again, what is damaged is named, what is needed is never swept."""

import dataclasses
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.dataset.changes import check_changes, manifest_digest, read_changes, write_change
from bge_ray.dataset.commit import FINGERPRINT_KEY, marker_path
from bge_ray.dataset.folder import KEPT_PLANS, Dataset, manifest_fact
from bge_ray.errors import DatasetMismatchError
from bge_ray.records.canonical import to_json
from bge_ray.records.dataset import FileFact, Marker, make_manifest
from bge_ray.records.plan import Coding, CorpusObject, Plan, Span, Unit
from bge_ray.storage.objects import TEMPORARY_SUFFIX, Storage, join
from bge_ray.storage.ownership import holds
from bge_ray.storage.sweep import Swept
from tests.support.records import make_marker, make_spec


@pytest.fixture
def dataset(storage: Storage, root: str) -> Dataset:
    return Dataset(storage, root)


def names(dataset: Dataset) -> list[str]:
    marker = f"{dataset.root.rpartition('/')[2]}/"
    return sorted(i.uri.rpartition(marker)[2] for i in dataset.storage.list_files(dataset.root))


def add_unit(dataset: Dataset, number: int, *, mark: bool = True) -> Marker:
    unit = Unit(0, number * 10, 10)
    fact = FileFact(f"embeddings/{unit.name}.parquet", 7, "0" * 64, 10)
    marker = make_marker(unit, fact)
    dataset.storage.write(join(dataset.root, fact.path), b"1234567")
    if mark:
        dataset.storage.write(join(dataset.root, marker_path(unit)), to_json(marker))
    return marker


def test_a_spec_is_created_once(dataset: Dataset) -> None:
    assert dataset.read_spec() is None
    spec = make_spec(kept={"lang": pa.string()})
    dataset.create_spec(spec)
    dataset.create_spec(spec)
    assert dataset.read_spec() == spec


def test_another_spec_is_refused_and_each_difference_named(dataset: Dataset) -> None:
    dataset.create_spec(make_spec(kept={"lang": pa.string()}))
    elsewhere = make_spec(kept={"lang": pa.string()}, name="/local/copy", query_instruction="other")
    dataset.create_spec(elsewhere)  # neither changes a vector
    with pytest.raises(DatasetMismatchError) as caught:
        dataset.create_spec(make_spec(dtype="float16", pooling="mean", max_length=8))
    said = str(caught.value)
    for part in (
        "dtype: there 'float32', now 'float16'",
        "model.pooling: there 'cls', now 'mean'",
        "model.max_length: there 16, now 8",
        dataset.root,
        "choose another output.uri",
    ):
        assert part in said
    assert "model.name" not in said
    assert "weights" not in said
    assert "columns" not in said, "these may change"


def test_columns_change_with_the_shards_that_have_them_and_nothing_else_does(dataset: Dataset) -> None:
    before = make_spec(kept={"lang": pa.string()})
    dataset.create_spec(before)
    other = make_spec(kept={"year": pa.int64()}, query_instruction="other")
    dataset.create_spec(other)
    assert dataset.read_spec() == before, "its shards are not published yet"
    dataset.change_rows(other)
    assert dataset.read_spec() == dataclasses.replace(before, columns=other.columns)
    with pytest.raises(DatasetMismatchError, match="max_length"):
        dataset.change_rows(make_spec(max_length=8))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a data set of ours"),
        (b"{not json", "not a data set of ours"),
        (b"[1]", "not a data set of ours"),
        (b'{"model": 1}', "not a data set of ours"),
        (b'{"format_version": 99, "new": {}}', "format 99, this version writes 2"),
    ],
)
def test_a_dataset_json_that_is_not_ours(dataset: Dataset, content: bytes, said: str) -> None:
    dataset.storage.write(join(dataset.root, "dataset.json"), content)
    with pytest.raises(DatasetMismatchError, match=rf"dataset\.json: {said}"):
        dataset.read_spec()
    with pytest.raises(DatasetMismatchError, match=rf"dataset\.json: {said}"):
        dataset.create_spec(make_spec())


def test_a_spec_that_was_changed_by_hand_is_refused(dataset: Dataset) -> None:
    spec, uri = make_spec(query_instruction="query: "), join(dataset.root, "dataset.json")
    dataset.create_spec(spec)
    dataset.create_spec(make_spec(query_instruction="other"))  # which is not written
    assert dataset.read_spec() == spec
    written = dataset.storage.read(uri)
    dataset.storage.write(uri, written.replace(b"query: ", b"QUERY: "))
    for act in (dataset.read_spec, lambda: dataset.create_spec(spec)):
        with pytest.raises(
            DatasetMismatchError, match=r"dataset\.json: was changed since it was written; restore"
        ):
            act()
    dataset.storage.write(uri, written)
    assert dataset.read_spec() == spec
    dataset.storage.delete([join(dataset.root, "_bge_ray.json")])  # a copy of the data set need not have it
    dataset.storage.write(uri, to_json(make_spec(query_instruction="other")))
    assert dataset.read_spec() != spec


def test_plans_are_numbered_and_taken_once(dataset: Dataset) -> None:
    assert dataset.latest_plan() == (0, None)
    first = Plan((CorpusObject(0, "s3://c/a", 5, "e", Coding("jsonl"), (Span(0, 5, 0, (2, 1)),)),), 1)
    second = dataclasses.replace(first, next_object_no=2)
    assert dataset.create_plan(1, first)
    assert not dataset.create_plan(1, second)
    assert dataset.latest_plan() == (1, first)
    for number in range(2, 12):
        assert dataset.create_plan(number, second)
    dataset.storage.write(join(dataset.root, "plan", "notes.txt"), b"a person left this")
    assert dataset.latest_plan() == (11, second)


def test_a_manifest_round_trip(dataset: Dataset) -> None:
    assert dataset.read_manifest() is None
    manifest = make_manifest("d" * 64, [add_unit(dataset, n) for n in (2, 0, 1)])
    dataset.publish(manifest)
    assert dataset.read_manifest() == manifest
    assert [m.unit.first_row for m in manifest.shards] == [0, 10, 20]
    assert manifest.rows_in == 30


def test_finished_counts_only_what_is_there(dataset: Dataset) -> None:
    markers = [add_unit(dataset, n) for n in range(5)]
    files = [join(dataset.root, m.embeddings.path) for m in markers]
    assert dataset.finished() == {m.unit.name: m for m in markers}
    dataset.storage.delete([files[1]])
    dataset.storage.write(files[2], b"short")
    dataset.storage.write(files[3], b"longer than was written")
    before = names(dataset)
    assert dataset.finished() == {m.unit.name: m for m in (markers[0], markers[4])}
    assert names(dataset) == before, "looking changes nothing: a dry run looks, too"


def test_finished_takes_the_marker_that_is_true(dataset: Dataset) -> None:
    """A late twin may leave a marker for a file that a sweep removed; the manifest's still counts."""
    folded = add_unit(dataset, 0, mark=False)
    dataset.publish(make_manifest("d" * 64, [folded]))
    assert dataset.finished() == {folded.unit.name: folded}
    gone = FileFact(f"embeddings/{folded.unit.name}-{'1' * 12}.parquet", 7, "1" * 64, 10)
    late = dataclasses.replace(folded, embeddings=gone)
    dataset.storage.write(join(dataset.root, marker_path(folded.unit)), to_json(late))
    assert dataset.finished() == {folded.unit.name: folded}
    dataset.storage.write(join(dataset.root, gone.path), b"7654321")
    assert dataset.finished() == {folded.unit.name: late}, "newer, and its file is there"


def write_shard(dataset: Dataset, path: str, metadata: dict[bytes, bytes]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata(metadata), sink)
    dataset.storage.write(join(dataset.root, path), sink.getvalue().to_pybytes())


def test_sweep_removes_only_what_is_ours_and_the_manifest_does_not_need(dataset: Dataset) -> None:
    live = [add_unit(dataset, n) for n in range(3)]
    ours = {FINGERPRINT_KEY: b"f" * 64}
    dead = [f"{folder}/{Unit(0, 70, 10).name}.parquet" for folder in ("embeddings", "rejected")]
    for path in dead:
        write_shard(dataset, path, ours)
    foreign = [
        "rejected/x.parquet",
        f"embeddings/{Unit(0, 80, 10).name}.parquet",
        "embeddings/part-0.parquet",
    ]
    for path in foreign:
        write_shard(dataset, path, {b"author": b"a person"})
    for number in range(1, KEPT_PLANS + 4):
        dataset.create_plan(number, Plan((), number))
    others = ["dataset.json", "index/index.faiss", "report.json", "embeddings.txt", "done/notes.json"]
    for name in others:
        dataset.storage.write(join(dataset.root, name), b"keep")
    manifest = make_manifest("d" * 64, live)
    dataset.publish(manifest)
    plans = [f"plan/{n:06d}.json" for n in range(4, KEPT_PLANS + 4)]
    kept = [*others, *foreign, *plans, *(m.embeddings.path for m in live)]
    written = ["manifest.json", "README.md", "changes/000001.json"]
    assert dataset.sweep(make_spec(), manifest, 3600) == Swept(0, 2)
    assert names(dataset) == sorted([*kept, *written, *dead])
    assert dataset.sweep(make_spec(), manifest, 0) == Swept(2, 0)
    assert names(dataset) == sorted([*kept, *written])
    assert dataset.sweep(make_spec(), manifest, 0) == Swept(0, 0)
    assert dataset.finished() == {m.unit.name: m for m in live}


def test_sweep_removes_what_killed_writers_left(storage: Storage, tmp_path) -> None:
    dataset = Dataset(storage, str(tmp_path))
    left = tmp_path / "embeddings" / f".00.parquet.abc{TEMPORARY_SUFFIX}"
    left.parent.mkdir()
    left.write_bytes(b"half a shard")
    os.utime(left, (1, 1))
    dataset.sweep(make_spec(), make_manifest("d" * 64, []), 0)
    assert not left.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'"text"', b'{"unit": 5}', b'{"number": 1}'])
def test_damaged_json_is_named_with_what_to_do(dataset: Dataset, content: bytes) -> None:
    for name, read, advice in (
        ("manifest.json", dataset.read_manifest, "restore it, or remove it"),
        ("plan/000001.json", dataset.latest_plan, "restore it"),
        ("plan/000001.json", dataset.corpus, "restore it"),
        ("done/00000000-0000000000.json", dataset.finished, "move it away"),
        ("changes/000001.json", lambda: check_changes(dataset.storage, dataset.root), "move it away"),
        ("changes/000001.json", lambda: read_changes(dataset.storage, dataset.root), "move it away"),
    ):
        uri = join(dataset.root, name)
        dataset.storage.write(uri, content)
        if read == dataset.corpus and content.startswith(b"{") and content.endswith(b"}"):
            continue  # it asks no more of a plan
        with pytest.raises(DatasetMismatchError) as caught:
            read()
        said = str(caught.value)
        assert uri in said
        assert advice in said
        assert "\n" not in said
        assert "errors.pydantic.dev" not in said
        assert caught.value.exit_code == 2
        dataset.storage.delete([uri])


@pytest.mark.parametrize("known", ["dataset.json", "manifest.json", "done/00000000-0000000000.json"])
def test_plans_that_are_gone_are_missed_by_what_came_after_them(dataset: Dataset, known: str) -> None:
    dataset.check_numbers()
    dataset.storage.write(join(dataset.root, known), b"{}")
    with pytest.raises(DatasetMismatchError, match=r"is gone, but .* restore it") as caught:
        dataset.check_numbers()
    assert known in str(caught.value)
    assert join(dataset.root, "plan") in str(caught.value)
    dataset.create_plan(7, Plan((), 0))
    dataset.check_numbers()


def test_no_change_is_replaced(dataset: Dataset) -> None:
    """Not one that was published, though its manifest is gone, nor one that never was, nor another's."""
    storage, root = dataset.storage, dataset.root
    one, two, three = (make_manifest("d" * 64, [add_unit(dataset, n) for n in range(m)]) for m in (1, 2, 3))
    first = write_change(storage, root, None, one)
    assert write_change(storage, root, None, one) == first, "its run died before it published"
    dataset.publish(one)
    storage.delete([join(root, "manifest.json")])
    dataset.publish(two)
    left = write_change(storage, root, two, one)
    last = write_change(storage, root, two, three)
    assert [c.number for c in (first, left, last)] == [1, 3, 4]
    storage.write(join(root, "manifest.json"), to_json(three))
    found = read_changes(storage, root)
    assert [(c.number, c.before, c.after) for c in found] == [
        (2, None, manifest_digest(two)),
        (4, manifest_digest(two), manifest_digest(three)),
    ]


def test_a_card_that_is_gone_is_missed_and_one_that_was_changed_is_said_and_stays(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, uri = make_manifest("d" * 64, []), join(dataset.root, "README.md")
    dataset.sweep(make_spec(), manifest, 0)
    assert dataset.has_card()
    dataset.storage.delete([uri])
    assert not dataset.has_card()
    dataset.sweep(make_spec(), manifest, 0)
    assert dataset.has_card()
    assert not caplog.records
    dataset.storage.write(uri, b"# edited")
    assert dataset.has_card()
    assert uri in caplog.text


def test_a_manifest_is_named_as_it_is_published(dataset: Dataset) -> None:
    manifest = make_manifest("d" * 64, [add_unit(dataset, 0)])
    dataset.publish(manifest)
    assert holds(dataset.storage, join(dataset.root, "manifest.json"), manifest_fact(manifest))
