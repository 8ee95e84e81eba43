"""Shards: what they hold, who can read them, and that a commit can be cut off anywhere."""

import hashlib
import io
import itertools
import multiprocessing
import os
import signal

import datasets
import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.dataset.commit import marker_path
from bge_ray.dataset.folder import Dataset, marker_files
from bge_ray.errors import StorageError
from bge_ray.records.canonical import from_json
from bge_ray.records.dataset import Marker, make_manifest
from bge_ray.records.ids import vector_ids
from bge_ray.storage.objects import Storage, join
from tests.support.records import FINGERPRINT, UNIT, make_spec, make_tables, make_vectors, make_writer
from tests.support.slow import slow_but

pytestmark = pytest.mark.long

FORKSERVER = multiprocessing.get_context("forkserver")
SHARD, REJECTED = f"embeddings/{UNIT.name}.parquet", f"rejected/{UNIT.name}.parquet"


def check_committed(storage: Storage, root: str, marker: Marker) -> None:
    """The marker is on the store, and its files are what it says: each row of the unit once."""
    assert from_json(Marker, storage.read(join(root, marker_path(UNIT)))) == marker
    ids: list[int] = []
    for fact in marker_files(marker):
        data = storage.read(join(root, fact.path))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (fact.bytes, fact.sha256)
        table = pq.read_table(io.BytesIO(data))
        assert len(table) == fact.rows
        ids += table["vector_id"].to_pylist()
    expected = vector_ids(UNIT.object_no, np.arange(UNIT.first_row, UNIT.first_row + UNIT.n_rows))
    assert sorted(ids) == expected.tolist()
    assert (marker.rows_out + marker.rows_rejected) == UNIT.n_rows


def test_a_commit_is_files_and_a_marker(storage: Storage, root: str) -> None:
    shard, rejected = make_tables(make_spec(), bad=(0, 1, 3))
    marker = make_writer(storage, root).commit(UNIT, FINGERPRINT, shard, rejected)
    check_committed(storage, root, marker)
    assert (marker.rows_out, marker.rows_rejected) == (7, 3)
    assert marker.reasons == {"empty_text": 2, "null_text": 1}
    assert marker.tokens == sum(shard["n_tokens"].to_pylist())
    assert marker.truncated == sum(shard["truncated"].to_pylist())
    assert (marker.embeddings.path, marker.rejected.path) == (SHARD, REJECTED)


def test_a_unit_without_rows_of_a_kind_has_no_file_of_it(storage: Storage, root: str) -> None:
    spec = make_spec()
    marker = make_writer(storage, root).commit(UNIT, FINGERPRINT, *make_tables(spec))
    assert marker.rejected is None
    check_committed(storage, root, marker)
    other = join(root, "other")
    marker = make_writer(storage, other).commit(UNIT, FINGERPRINT, *make_tables(spec, bad=tuple(range(10))))
    assert marker.embeddings is None
    assert marker.tokens == 0
    check_committed(storage, other, marker)


def test_rows_that_do_not_add_up_are_not_written(storage: Storage, root: str) -> None:
    shard, rejected = make_tables(make_spec(), bad=(2,))
    with pytest.raises(StorageError, match="9 rows to write, 10 were planned"):
        make_writer(storage, root).commit(UNIT, FINGERPRINT, shard, rejected.slice(1))
    assert storage.list_files(root) == []


def test_the_same_rows_give_the_same_bytes(storage: Storage, tmp_path) -> None:
    markers = [
        make_writer(storage, str(tmp_path / name)).commit(
            UNIT, FINGERPRINT, *make_tables(make_spec(), bad=(2,))
        )
        for name in "ab"
    ]
    assert markers[0] == markers[1]


# --- cut off ---------------------------------------------------------------------------------------


def _commit(url: str, root: str) -> None:
    import fsspec

    fsspec.config.conf["s3"] = {"endpoint_url": url}
    make_writer(Storage(20.0), root).commit(UNIT, FINGERPRINT, *make_tables(make_spec(), bad=(4,)))


@pytest.mark.parametrize(
    ("write", "moment"),
    slow_but([(1, "after"), (2, "before")], itertools.product([1, 2, 3], ["before", "after"])),
)
def test_killed_at_any_write_the_next_attempt_finishes(
    storage: Storage, bucket: str, faulty, write: int, moment: str
) -> None:
    """The process dies at its n-th PUT, before the server sees it or after it is done."""
    puts = []

    def strike() -> None:
        os.kill(process.pid, signal.SIGKILL)

    def fault(_: int, method: str, path: str) -> str:
        puts.extend([path] * (method == "PUT"))
        if method != "PUT" or len(puts) != write:
            return ""
        if moment == "after":
            return "mute"
        strike()
        return "lost"

    proxy = faulty(fault)
    proxy.after_mute = strike
    process = FORKSERVER.Process(target=_commit, args=(proxy.url, bucket))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    proxy.fault = lambda *_: ""
    there = {info.uri.removeprefix(f"{bucket}/") for info in storage.list_files(bucket)}
    if marker_path(UNIT) in there:
        assert {SHARD, REJECTED} <= there, "the marker comes last"
    marker = make_writer(storage, bucket).commit(UNIT, FINGERPRINT, *make_tables(make_spec(), bad=(4,)))
    check_committed(storage, bucket, marker)
    assert {info.uri.removeprefix(f"{bucket}/") for info in storage.list_files(bucket)} == {
        SHARD, REJECTED, marker_path(UNIT)
    }  # fmt: skip


def test_a_file_of_the_same_rows_is_adopted_with_its_own_bits(storage: Storage, root: str) -> None:
    """On a GPU the last bits differ from attempt to attempt; the first file stays and is vouched for."""
    writer = make_writer(storage, root)
    first = writer.commit(UNIT, FINGERPRINT, *make_tables(make_spec()))
    storage.delete([join(root, marker_path(UNIT))])
    second = writer.commit(UNIT, FINGERPRINT, *make_tables(make_spec(), vectors=make_vectors() + 1e-6))
    assert second == first
    check_committed(storage, root, second)


@pytest.mark.parametrize(
    ("before", "now"),
    [((4,), ()), ((), (4,)), ((4,), (7,)), ((4, 5), (5,))],
    ids=["less", "more", "other", "fewer"],
)
def test_an_attempt_that_rejected_other_rows_is_not_mixed_in(
    storage: Storage, root: str, before, now
) -> None:
    """A row may kill its worker in one run and not in the next: no row may be lost or doubled by that."""
    spec = make_spec()
    writer = make_writer(storage, root)
    writer.commit(UNIT, FINGERPRINT, *make_tables(spec, bad=before))
    storage.delete([join(root, marker_path(UNIT))])
    for half in ("embeddings", "rejected"):
        old = [i.uri for i in storage.list_files(join(root, half))]
        marker = writer.commit(UNIT, FINGERPRINT, *make_tables(spec, bad=now))
        check_committed(storage, root, marker)
        assert set(old) <= {i.uri for i in storage.list_files(join(root, half))}, "a twin may vouch for it"
    assert writer.commit(UNIT, FINGERPRINT, *make_tables(spec, bad=now)) == marker, "again: the same files"
    dataset = Dataset(storage, root)
    manifest = make_manifest(spec.vector_fingerprint, [marker])
    dataset.publish(manifest)
    dataset.sweep(spec, manifest, 0)
    left = {
        i.uri.rpartition("/")[2]
        for f in ("embeddings", "rejected")
        for i in storage.list_files(join(root, f))
    }
    assert left == {f.path.rpartition("/")[2] for f in marker_files(marker)}


@pytest.mark.parametrize("state", ["truncated", "empty", "garbage", "other fingerprint", "other columns"])
def test_a_foreign_or_damaged_file_in_the_way_is_left_alone(storage: Storage, root: str, state: str) -> None:
    spec = make_spec()
    scratch = join(root, "scratch")
    fingerprint = "0" * 64 if state == "other fingerprint" else FINGERPRINT
    made = make_spec(kept={"more": pa.string()}) if state == "other columns" else spec
    make_writer(storage, scratch, made).commit(UNIT, fingerprint, *make_tables(made))
    whole = storage.read(join(scratch, SHARD))
    content = {"truncated": whole[:-30], "empty": b"", "garbage": os.urandom(300)}.get(state, whole)
    storage.write(join(root, SHARD), content)
    for _ in range(2):
        marker = make_writer(storage, root).commit(UNIT, FINGERPRINT, *make_tables(spec))
        check_committed(storage, root, marker)
        assert marker.embeddings.path != SHARD
        assert storage.read(join(root, SHARD)) == content


def test_a_file_that_was_put_beside_a_damaged_one_and_is_damaged_too_is_made_again(
    storage: Storage, root: str
) -> None:
    paths = []
    for _ in range(4):
        marker = make_writer(storage, root).commit(UNIT, FINGERPRINT, *make_tables(make_spec()))
        check_committed(storage, root, marker)
        paths.append(marker.embeddings.path)
        uri = join(root, marker.embeddings.path)
        storage.write(uri, storage.read(uri)[:-30])
    assert len(set(paths)) == 4


def test_two_at_once_leave_one_consistent_unit(storage: Storage, root: str) -> None:
    spec = make_spec()
    from concurrent.futures import ThreadPoolExecutor

    def commit(seed: int) -> Marker:
        vectors = make_vectors() + np.float32(seed) * 1e-6
        tables = make_tables(spec, bad=(seed % 3,), vectors=vectors)
        return make_writer(storage, root).commit(UNIT, FINGERPRINT, *tables)

    with ThreadPoolExecutor(6) as pool:
        markers = list(pool.map(commit, range(6)))
    final = from_json(Marker, storage.read(join(root, marker_path(UNIT))))
    assert final in markers
    check_committed(storage, root, final)


# --- what is in a file -----------------------------------------------------------------------------

KEPT = {"lang": pa.string(), "year": pa.int32(), "when": pa.timestamp("ms")}


@pytest.fixture(params=["float32", "float16"])
def written(request, storage: Storage, tmp_path):
    spec = make_spec(dtype=request.param, kept=KEPT)
    shard, rejected = make_tables(spec, bad=(2,))
    make_writer(storage, str(tmp_path), spec).commit(UNIT, FINGERPRINT, shard, rejected)
    good = np.delete(np.arange(UNIT.n_rows), 2)
    return request.param, str(tmp_path / SHARD), make_vectors()[good].astype(request.param), good, spec


def test_the_file_itself(written) -> None:
    dtype, path, _, _, spec = written
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    ours = ["vector_id", "passage_id", "text_hash", "n_tokens", "truncated", "embedding"]
    assert schema.names == [*ours, *KEPT]
    kind = schema.field("embedding").type
    assert pa.types.is_fixed_size_list(kind)
    assert (kind.list_size, str(kind.value_type)) == (8, {"float32": "float", "float16": "halffloat"}[dtype])
    assert not kind.value_field.nullable
    assert not any(schema.field(i).nullable for i in range(5))
    group = file.metadata.row_group(0)
    chunks = {
        group.column(i).path_in_schema.partition(".")[0]: group.column(i) for i in range(group.num_columns)
    }
    assert not chunks["embedding"].has_dictionary_page
    assert "DICTIONARY" not in str(chunks["embedding"].encodings)
    assert chunks["embedding"].compression == "ZSTD"
    assert chunks["vector_id"].statistics.min == (3 << 41) + (100 << 13)
    facts = {k.decode(): v.decode() for k, v in schema.metadata.items() if k.startswith(b"bge_ray.")}
    assert facts == {
        "bge_ray.unit_fingerprint": FINGERPRINT,
        "bge_ray.vector_fingerprint": spec.vector_fingerprint,
        "bge_ray.model": "a/model",
        "bge_ray.weights_sha256": "0" * 64,
        "bge_ray.pooling": "cls",
        "bge_ray.max_length": "16",
        "bge_ray.normalized": "true",
        "bge_ray.compute_dtype": "float32",
    }


def check_values(ids, passage_ids, embeddings, langs, years, written) -> None:
    _, _, vectors, good, _ = written
    assert list(ids) == [(3 << 41) + ((100 + i) << 13) for i in good]
    assert list(passage_ids) == [f"p{i}" for i in good]
    np.testing.assert_array_equal(np.asarray(embeddings, np.float32), vectors.astype(np.float32))
    assert list(langs) == [None if i % 4 == 0 else f"lang {i}" for i in good]
    assert list(years) == good.tolist()


def test_pyarrow_reads_it(written) -> None:
    table = pq.read_table(written[1])
    columns = [table[n].to_pylist() for n in ("vector_id", "passage_id", "embedding", "lang", "year")]
    check_values(*columns, written)


def test_duckdb_reads_it(written) -> None:
    columns = "vector_id, passage_id, embedding::float[8], lang, year"
    query = f"select {columns} from read_parquet(?) order by vector_id"
    found = duckdb.connect().execute(query, [written[1]]).fetchall()
    check_values(*zip(*found, strict=True), written)


def test_polars_reads_it(written) -> None:
    frame = polars.read_parquet(written[1])
    embeddings = frame["embedding"].cast(polars.Array(polars.Float32, 8)).to_numpy()
    check_values(frame["vector_id"], frame["passage_id"], embeddings, frame["lang"], frame["year"], written)


def test_hugging_face_datasets_reads_it(written, tmp_path) -> None:
    found = datasets.load_dataset(
        "parquet", data_files=written[1], split="train", cache_dir=str(tmp_path / "hf")
    )
    columns = [found[name] for name in ("vector_id", "passage_id", "embedding", "lang", "year")]
    check_values(*map(list, columns), written)
