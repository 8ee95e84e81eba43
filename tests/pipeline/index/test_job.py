"""The index job on a real Ray and a real S3 server: equal to one process, restartable, honest."""

import hashlib
import json
from pathlib import Path

import faiss
import numpy as np
import pytest

from bge_ray.dataset.read import read_vectors
from bge_ray.errors import (
    CorpusError,
    DatasetMismatchError,
    IndexBuildError,
    OutputBusyError,
    OutputCollisionError,
    SettingsError,
    StorageError,
)
from bge_ray.index.factory import Metric
from bge_ray.index.search import load_index, search
from bge_ray.index.topk import merge_topk
from bge_ray.index.train import load_trained
from bge_ray.index.vectors import check_vectors
from bge_ray.pipeline.index.job import build_index, index_outcome, plan_index
from bge_ray.pipeline.index.published import index_files, read_index
from bge_ray.records.index import IndexDescription
from bge_ray.settings.sections import Settings, parse_settings
from bge_ray.storage.lease import Lease
from bge_ray.storage.objects import Storage, join
from tests.support.vectors import VectorDataset, clustered, make_dataset

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STORAGE = Storage(20)
DIM = 32
# (n, 32) vectors with 264 bytes a row as IVF,Flat: 8 MB, two ranges of the smallest allowed size.
UNEVEN = [9000, 1, 12_000, 17_000, 700, 8000]


def settings_for(root: str, *overrides: str) -> Settings:
    keys = {
        "output.uri": root,
        "output.storage_timeout_s": 20,
        "index.num_queries": 100,
        "index.range_bytes": 5_242_880,
        "index.part_bytes": 1_000_000,
    }
    return parse_settings(None, [f"{k}={v}" for k, v in keys.items()] + list(overrides))


def file_bytes(root: str, index: dict) -> list[bytes]:
    """Read the published files, checking size and hash of each."""
    found = []
    for file in index_files(root, index):
        data = STORAGE.read(file.path)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
        found.append(data)
    return found


def names(root: str, folder: str) -> set[str]:
    return {info.uri.rpartition("/")[2] for info in STORAGE.list_files(f"{root}/index/{folder}")}


def all_vectors(made: VectorDataset) -> tuple[np.ndarray, np.ndarray]:
    manifest = made.dataset.read_manifest()
    found = [
        batch
        for marker in manifest.shards
        for batch in read_vectors(STORAGE, made.dataset.root, marker.embeddings)
    ]
    return np.concatenate([v for v, _ in found]), np.concatenate([i for _, i in found])


def in_one_process(made: VectorDataset, index: IndexDescription) -> bytes:
    """Add all vectors of the data set to the trained index, in this process, with FAISS alone."""
    root, training = made.dataset.root, index.training
    trained = load_trained(
        STORAGE.read(join(root, "index", training.path)),
        index.factory,
        Metric(index.metric),
        index.dim,
        training.sha256,
    )
    faiss.omp_set_num_threads(1)  # as every task; a matrix product's last bit depends on its threads
    whole = trained.open()
    for marker in made.dataset.read_manifest().shards:
        for vectors, ids in read_vectors(STORAGE, root, marker.embeddings):
            whole.add_with_ids(*check_vectors(vectors, ids, index.dim))
    ivf = faiss.try_extract_index_ivf(whole)
    if ivf is not None:
        ivf.nprobe = index.effort
    return faiss.serialize_index(whole).tobytes()


@pytest.mark.parametrize(
    ("factory", "metric", "dtype", "dim"),
    [
        # 12 MB: three ranges, copied together on the server
        pytest.param("IVF32,Flat", "l2", "float32", 64, marks=pytest.mark.slow),
        pytest.param("IVF32,SQ8", "ip", "float16", DIM, marks=pytest.mark.slow),
        pytest.param("RR,IVF32,RaBitQ4", "l2", "float32", DIM, marks=pytest.mark.slow),
        pytest.param("Flat", "ip", "float32", 64, marks=pytest.mark.slow),
        pytest.param("SQ8", "l2", "float16", DIM, marks=pytest.mark.slow),
    ],
)
def test_the_single_file_is_that_of_one_process(
    bucket: str, factory: str, metric: str, dtype: str, dim: int
) -> None:
    made = make_dataset(bucket, UNEVEN, dim, dtype)
    index = build_index(settings_for(bucket, f"index.factory={factory}", f"index.metric={metric}"))
    [data] = file_bytes(bucket, index)
    assert data == in_one_process(made, index)
    assert index.ntotal == sum(UNEVEN)
    assert len(names(bucket, "parts")) > 1


@pytest.mark.slow
def test_a_folder_on_disk_works_like_a_bucket(tmp_path: Path) -> None:
    made = make_dataset(str(tmp_path / "out"), UNEVEN, 64)
    root = made.dataset.root
    index = build_index(settings_for(root, "index.factory=IVF32,Flat"))
    assert file_bytes(root, index) == [in_one_process(made, index)]
    assert {path.name for path in (tmp_path / "out/index").rglob(".*")} == set()


@pytest.mark.slow
def test_ranges_searched_together_equal_the_single_file(bucket: str) -> None:
    make_dataset(bucket, UNEVEN, 64)
    single = build_index(settings_for(bucket, "index.factory=IVF32,Flat"))
    [whole] = [load_index(data) for data in file_bytes(bucket, single)]
    parts = names(bucket, "parts")
    ranges = build_index(settings_for(bucket, "index.factory=IVF32,Flat", "index.layout=ranges"))
    assert names(bucket, "parts") == parts  # another layout needs no adding
    files = [load_index(data) for data in file_bytes(bucket, ranges)]
    assert len(files) > 1
    assert sum(file.ntotal for file in files) == whole.ntotal == sum(UNEVEN)
    queries = clustered(50, 64, seed=77)
    for nprobe in (1, 5, 32):
        together = merge_topk([search(file, queries, 10, effort=nprobe) for file in files], 10)
        for one, other in zip(together, search(whole, queries, 10, effort=nprobe), strict=True):
            np.testing.assert_array_equal(one, other)
    assert ranges.recall == single.recall


@pytest.mark.slow
def test_flat_ranges_hold_every_vector_once(bucket: str) -> None:
    made = make_dataset(bucket, UNEVEN, 64)
    index = build_index(settings_for(bucket, "index.factory=Flat", "index.layout=ranges"))
    files = [load_index(data) for data in file_bytes(bucket, index)]
    assert len(files) > 1
    vectors, ids = all_vectors(made)
    _, found = merge_topk([search(file, vectors[::500], 1) for file in files], 1)
    np.testing.assert_array_equal(found[:, 0], ids[::500])
    assert index.recall["@10"].value == 1


@pytest.mark.slow
def test_hnsw_is_built_as_shards_that_open_with_the_tuned_breadth(bucket: str) -> None:
    made = make_dataset(bucket, [4000, 5000, 6000, 4000], 96)
    index = build_index(settings_for(bucket, "index.factory=HNSW16", "index.layout=ranges"))
    datas = file_bytes(bucket, index)
    assert len(datas) > 1
    assert (index.kind, index.parameter) == ("shards", "efSearch")
    for data in datas:
        opened = load_index(data)  # a name of its own: FAISS frees what no name holds
        inner = faiss.downcast_index(faiss.downcast_index(opened).index)
        assert inner.hnsw.efSearch == index.effort
    vectors, ids = all_vectors(made)
    exact = np.argsort(-(vectors[:40] @ vectors.T), axis=1)[:, :10]
    _, found = merge_topk([search(load_index(data), vectors[:40], 10) for data in datas], 10)
    recall = np.mean([len(set(f) & set(ids[e])) / 10 for f, e in zip(found, exact, strict=True)])
    assert recall > 0.9
    before = names(bucket, "parts")
    made.put(9, clustered(300, 96, seed=9))
    made.publish()
    after = build_index(settings_for(bucket, "index.factory=HNSW16", "index.layout=ranges"))
    assert after.ntotal == 19_300
    assert before & names(bucket, "parts")


def test_recall_and_nprobe_are_what_brute_force_says(bucket: str, tmp_path: Path) -> None:
    made = make_dataset(bucket, UNEVEN, DIM)
    index = build_index(
        settings_for(bucket, "index.factory=IVF64,SQ4", "index.recall_target=0.8", "index.recall_k=10")
    )
    assert index.reached
    path = tmp_path / "index.faiss"
    path.write_bytes(file_bytes(bucket, index)[0])
    opened = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)  # plain FAISS, as a user opens it
    assert faiss.extract_index_ivf(opened).nprobe == index.effort
    vectors, ids = all_vectors(made)
    rng = np.random.default_rng(3)
    rows = rng.choice(len(vectors), 300, replace=False)
    exact = np.argsort(-(vectors[rows] @ vectors.T), axis=1)[:, :11]
    _, found = opened.search(vectors[rows], 101)
    hits = reranked = 0
    for row, truth, got in zip(rows, exact, found, strict=True):
        true_ids = set(ids[[t for t in truth if t != row][:10]])
        others = [i for i in got if i != ids[row]][:100]
        hits += len(true_ids & set(others[:10]))
        reranked += len(true_ids & set(others))
    assert hits / 3000 == pytest.approx(index.recall["@10"].value, abs=0.05)
    assert reranked / 3000 == pytest.approx(index.recall_after_exact_reranking.value, abs=0.05)
    assert index.gain_of_exact_reranking > 0.02
    fewer = [point for point in index.curve if point.effort == index.effort - 1]
    assert not fewer or fewer[0].recall["@10"] < 0.8
    assert index.ceiling["@10"].value >= index.recall["@10"].value - 0.05


def test_plain_faiss_returns_the_documented_ids(bucket: str, tmp_path: Path) -> None:
    """What the README shows: open the file, and find an id's row by object number and row number."""
    made = make_dataset(bucket, [3000, 2500], DIM)
    index = build_index(settings_for(bucket, "index.factory=IVF16,Flat"))
    path = tmp_path / "index.faiss"
    path.write_bytes(file_bytes(bucket, index)[0])
    opened = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    vectors, _ = all_vectors(made)
    _, found = opened.search(vectors[2990:3010], 1)
    object_no, row_no = found[:, 0] >> 41, found[:, 0] >> 13 & 0xFFFFFFF
    np.testing.assert_array_equal(object_no, [0] * 10 + [1] * 10)
    np.testing.assert_array_equal(row_no, [*range(2990, 3000), *range(10)])


@pytest.mark.slow
def test_a_rerun_does_nothing_and_a_lost_file_is_made_again(bucket: str) -> None:
    make_dataset(bucket, UNEVEN, DIM)
    settings = settings_for(bucket, "index.factory=IVF32,SQ8")
    first = build_index(settings)
    listed = STORAGE.list_files(f"{bucket}/index")
    assert build_index(settings) == first
    assert STORAGE.list_files(f"{bucket}/index") == listed
    assert "up to date" in plan_index(settings)
    STORAGE.delete([index_files(bucket, first)[0].path])
    again = build_index(settings)
    assert again.files == first.files
    assert {info.uri for info in STORAGE.list_files(f"{bucket}/index")} == {info.uri for info in listed}


@pytest.mark.slow
def test_only_what_changed_is_added_and_nothing_is_trained_again(bucket: str) -> None:
    made = make_dataset(bucket, [4000] * 24, DIM)
    settings = settings_for(bucket, "index.factory=IVF32,SQ8", "index.part_bytes=700000")
    first = build_index(settings)
    parts = names(bucket, "parts")
    assert len(parts) > 6
    made.put(30, clustered(1000, DIM, seed=30))  # new
    made.remove(2)  # changed: another content is another object
    made.put(31, clustered(900, DIM, seed=31))
    made.remove(11)  # removed
    made.publish()
    second = build_index(settings)
    assert second.training == first.training
    kept = parts & names(bucket, "parts")
    # What goes takes the group it was in along, and the next one if it ended there; what comes, the last.
    assert len(kept) >= len(parts) - 5
    assert len(names(bucket, "parts")) <= len(parts) + 3
    [data] = file_bytes(bucket, second)
    assert data == in_one_process(made, second)
    _, ids = search(load_index(data), all_vectors(made)[0][::97], 20, effort=32)
    assert not set((ids >> 41).ravel()) & {2, 11}


@pytest.mark.slow
def test_vectors_that_lie_elsewhere_are_trained_on_anew(bucket: str) -> None:
    made = make_dataset(bucket, [4000] * 4, DIM)
    settings = settings_for(bucket, "index.factory=IVF32,SQ8")
    first = build_index(settings)
    for number in range(10, 18):
        made.put(number, clustered(4000, DIM, seed=number, clusters=1, centres_seed=5))
    made.publish()
    second = build_index(settings)
    assert second.drift > 0.3
    assert second.training.sha256 != first.training.sha256
    assert second.imbalance < 4
    [data] = file_bytes(bucket, second)
    assert data == in_one_process(made, second)
    assert len(names(bucket, "trained")) == 2  # the index and its list sizes; the old ones are swept


@pytest.mark.slow
def test_a_target_out_of_reach_is_said_and_the_index_kept(bucket: str) -> None:
    from bge_ray.errors import RecallError

    make_dataset(bucket, [5000, 5000], DIM)
    settings = settings_for(bucket, "index.factory=IVF16,RaBitQ", "index.recall_target=0.99")
    with pytest.raises(RecallError, match=r"0\.99 was not reached") as caught:
        index_outcome(settings)
    assert caught.value.exit_code == 1
    index = read_index(STORAGE, bucket)
    assert (index.reached, index.ntotal, index.effort) == (False, 10_000, 16)
    assert len(file_bytes(bucket, index)) == 1
    # Nothing to do: another run would not find more, so a nightly chain goes on.
    assert "0.99 was not reached: as the run that built it said" in index_outcome(settings)


@pytest.mark.slow
def test_a_second_run_at_once_is_refused(bucket: str) -> None:
    make_dataset(bucket, [3000], DIM)
    settings = settings_for(bucket, "index.factory=IVF16,SQ8")
    with Lease(STORAGE, f"{bucket}/index", renew_s=1), pytest.raises(OutputBusyError, match="is writing"):
        build_index(settings)
    assert names(bucket, "") <= {"lease.json"}
    assert build_index(settings).ntotal == 3000


def test_what_is_no_complete_data_set_is_refused(bucket: str) -> None:
    for root, match in [
        (f"{bucket}/none", "run bge-ray embed first"),
        (f"{bucket}/half", "run bge-ray embed first"),
    ]:
        if root.endswith("half"):
            VectorDataset(root).put(0, clustered(100, DIM, 0))
        with pytest.raises(SettingsError, match=match):
            build_index(settings_for(root))
    unnormalised = VectorDataset(f"{bucket}/long", normalize=False)
    unnormalised.put(0, 3 * clustered(100, DIM, 0))
    unnormalised.publish()
    with pytest.raises(SettingsError, match="not normalised"):
        build_index(settings_for(f"{bucket}/long"))
    other = VectorDataset(f"{bucket}/other")
    other.put(0, clustered(100, DIM, 0))
    manifest = json.loads(STORAGE.read(f"{bucket}/long/manifest.json"))
    STORAGE.write(f"{bucket}/other/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(DatasetMismatchError, match="of another data set"):
        build_index(settings_for(f"{bucket}/other"))
    for root in ("none", "half", "long", "other"):
        assert STORAGE.list_files(f"{bucket}/{root}/index") == []


@pytest.mark.parametrize(
    ("factory", "instead"),
    [
        ("IVF64,PQ8x4fs", "without 'fs'"),
        ("IVF64,Flat,RFlat", "re-rank from the embedding shards"),
        ("IDMap,IVF64,Flat", "leave IDMap out"),
        ("NSG32", "HNSW32"),
        ("rubbish", "use 'auto'"),
        ("IVF1024,SQ8", "use 'auto', 'Flat' or fewer lists"),
    ],
)
def test_an_index_that_cannot_be_built_is_refused_with_another(
    tmp_path: Path, factory: str, instead: str
) -> None:
    make_dataset(str(tmp_path), [2000], DIM)
    with pytest.raises(SettingsError, match=instead):
        build_index(settings_for(str(tmp_path), f"index.factory={factory}"))
    assert not (tmp_path / "index").exists()


@pytest.mark.slow
def test_a_tiny_data_set_has_an_index_too(bucket: str) -> None:
    for rows in (1, 2, 7, 60):
        root = f"{bucket}/{rows}"
        make_dataset(root, [rows], DIM)
        index = build_index(settings_for(root))
        assert (index.ntotal, index.reached) == (rows, True)


def damage(uri: str, at: int = -40) -> bytes:
    data = STORAGE.read(uri)
    flipped = bytearray(data)
    flipped[at] ^= 0xFF
    STORAGE.write(uri, bytes(flipped))
    return data


@pytest.mark.slow
def test_a_damaged_shard_is_named_and_the_old_index_stays(bucket: str) -> None:
    made = make_dataset(bucket, [4000, 4000], DIM)
    settings = settings_for(bucket, "index.factory=IVF16,SQ8")
    first = build_index(settings)
    marker = made.put(2, clustered(4000, DIM, seed=2))
    made.publish()
    uri = f"{bucket}/{marker.embeddings.path}"
    whole = damage(uri)
    with pytest.raises(StorageError, match=marker.embeddings.path):
        build_index(settings)
    assert read_index(STORAGE, bucket) == first
    assert file_bytes(bucket, first)
    STORAGE.write(uri, whole)
    assert build_index(settings).ntotal == 12_000


@pytest.mark.parametrize(("fault", "message"), [(np.nan, "NaN or infinity"), (0.0, "norm 0, must be 1")])
def test_a_bad_vector_is_named_with_its_shard(bucket: str, fault: float, message: str) -> None:
    made = make_dataset(bucket, [4000], DIM)
    vectors = clustered(4000, DIM, seed=5)
    vectors[17] = fault
    marker = made.put(1, vectors)
    made.publish()
    with pytest.raises(IndexBuildError, match=message) as caught:
        build_index(settings_for(bucket, "index.factory=IVF16,SQ8"))
    assert marker.embeddings.path in str(caught.value)
    assert read_index(STORAGE, bucket) is None


@pytest.mark.slow
def test_damaged_parts_and_trainings_are_named_and_nothing_is_overwritten(bucket: str) -> None:
    made = make_dataset(bucket, [4000, 4000], DIM)
    settings = settings_for(bucket, "index.factory=IVF16,SQ8")
    first = build_index(settings)
    part = f"{bucket}/index/{first.parts[0]}"
    training = f"{bucket}/index/{first.training.path}"
    made.put(2, clustered(500, DIM, seed=2))
    made.publish()
    for uri, at, match in [
        (part, -40, "is damaged"),
        (part, 5, "no index part"),
        (training, -40, r"run index\.py with index\.verify"),
        (f"{bucket}/index/training.json", 0, "is damaged; remove it"),
    ]:
        whole = damage(uri, at)
        with pytest.raises((IndexBuildError, OutputCollisionError), match=match) as caught:
            build_index(settings)
        assert uri.rpartition("/")[2] in str(caught.value)
        assert read_index(STORAGE, bucket) == first
        assert file_bytes(bucket, first)
        STORAGE.write(uri, whole)
    assert build_index(settings).ntotal == 8500


@pytest.mark.slow
def test_a_part_of_another_training_is_refused(bucket: str) -> None:
    make_dataset(bucket, [4000], DIM)
    settings = settings_for(bucket, "index.factory=IVF16,SQ8")
    first = build_index(settings)
    other = f"{bucket}/other"
    make_dataset(other, [3000], DIM)
    foreign = build_index(settings_for(other, "index.factory=IVF16,SQ8"))
    part = f"{bucket}/index/{first.parts[0]}"
    STORAGE.write(part, STORAGE.read(f"{other}/index/{foreign.parts[0]}"))
    STORAGE.delete([f"{bucket}/index/index.json"])
    with pytest.raises(IndexBuildError, match="was made with the trained index"):
        build_index(settings)


@pytest.mark.slow
def test_a_training_that_is_gone_is_made_again(bucket: str) -> None:
    make_dataset(bucket, [4000], DIM)
    first = build_index(settings_for(bucket, "index.factory=IVF16,SQ8"))
    STORAGE.delete([f"{bucket}/index/{first.training.path}"])
    again = build_index(settings_for(bucket, "index.factory=IVF16,SQ8", "index.recall_target=0.9"))
    assert again.ntotal == 4000


@pytest.mark.slow
def test_the_whole_data_set_can_be_moved(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "a"), [4000], DIM)
    first = build_index(settings_for(str(tmp_path / "a"), "index.factory=IVF16,SQ8"))
    (tmp_path / "a").rename(tmp_path / "b")
    again = build_index(
        settings_for(str(tmp_path / "b"), "index.factory=IVF16,SQ8", "index.recall_target=0.9")
    )
    assert again.training == first.training


@pytest.mark.slow
def test_the_users_queries_are_encoded_with_the_instruction(bucket: str, tiny_model: Path) -> None:
    from bge_ray.pipeline.embed.job import embed
    from tests.support.corpora import docstrings, jsonl_bytes

    passages = docstrings(400)
    STORAGE.write(f"{bucket}/corpus/x.jsonl", jsonl_bytes(passages))
    lines = [json.dumps({"_id": str(i), "text": p["text"][:60]}) for i, p in enumerate(passages[:30])]
    STORAGE.write(f"{bucket}/queries.jsonl", "\n".join(lines).encode())
    keys = [
        f"corpus.uri={bucket}/corpus",
        f"output.uri={bucket}/out",
        f"model.name={tiny_model}",
        "model.query_instruction='query: '",
        f"index.queries={bucket}/queries.jsonl",
    ]
    embed(parse_settings(None, keys))
    index = build_index(parse_settings(None, [*keys, "index.factory=IVF4,SQ8"]))
    assert (index.num_queries, index.queries) == (30, f"{bucket}/queries.jsonl")
    plain = build_index(
        parse_settings(None, [*keys[:3], "model.query_instruction=''", keys[4], "index.factory=IVF4,SQ8"])
    )
    # Another instruction makes other queries, and so another measurement.
    assert (plain.inputs != index.inputs, plain.queries) == (True, index.queries)
    bad = f"{bucket}/bad.jsonl"
    STORAGE.write(bad, b'{"x": 1}\n')
    with pytest.raises(CorpusError, match=r"bad\.jsonl"):
        build_index(parse_settings(None, [*keys[:4], f"index.queries={bad}"]))


@pytest.mark.slow
def test_the_report_is_one_page_with_both_pictures(bucket: str) -> None:
    make_dataset(bucket, UNEVEN, DIM)
    build_index(settings_for(bucket, "index.factory=IVF32,SQ8"))
    page = STORAGE.read(f"{bucket}/index/report.html").decode()
    assert page.count("<svg") == 2
    assert "IVF32,SQ8" in page
    assert not any(word in page for word in ("src=", "<link", "<script", "@import"))


def test_a_searcher_leaves_nothing_on_the_disk_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    from bge_ray.pipeline.index.searchers import Searcher

    root = str(tmp_path / "out")
    make_dataset(root, [4000], DIM)
    index = build_index(settings_for(root, "index.factory=IVF16,SQ8"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    searcher = Searcher(STORAGE, index_files(root, index), threads=1)
    queries = clustered(20, DIM, seed=3)
    first = searcher.search(queries, 5, 16)
    assert list(scratch.iterdir()) == []
    np.testing.assert_array_equal(searcher.search(queries, 5, 16)[1], first[1])
