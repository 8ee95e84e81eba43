"""Adding: everything FAISS would take without a word is refused and named."""

import warnings

import faiss
import numpy as np
import pytest

from bge_ray.errors import IndexBuildError
from bge_ray.index.add import add_part, build_shard
from bge_ray.index.factory import Metric
from bge_ray.index.part import open_part, part_sizes
from bge_ray.index.search import load_index, search
from bge_ray.index.topk import exact_topk, merge_topk
from bge_ray.index.vectors import check_vectors

DIM = 32


def ids_of(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int64) + (1 << 40)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("factory", ["IVF16,SQ8", "Flat", "RR,IVF16,RaBitQ"])
def test_row_that_is_not_finite_is_named(make_vectors, make_trained, factory, value):
    vectors = make_vectors(50)
    vectors[31, 3] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(IndexBuildError, match="row 31 has"):
            add_part(make_trained(factory), [(vectors, ids_of(50))])


@pytest.mark.parametrize("factor", [0, 0.5, 0.98, 1.02, 7])
def test_zero_and_unnormalised_rows_are_refused(make_vectors, factor):
    vectors = make_vectors(50)
    vectors[2] *= np.float32(factor)
    with pytest.raises(IndexBuildError, match="row 2 has norm"):
        check_vectors(vectors, ids_of(50), DIM)


@pytest.mark.parametrize("shape", [(50, 31), (50, 33), (50,), (50, DIM, 1), (0, 31)])
def test_wrong_shape_is_refused(shape):
    with pytest.raises(IndexBuildError, match="shape"):
        check_vectors(np.ones(shape, np.float32), ids_of(shape[0]), DIM)


@pytest.mark.parametrize("dtype", [np.float64, np.int8, object])
def test_wrong_vector_dtype_is_refused(make_vectors, dtype):
    with pytest.raises(IndexBuildError, match="must be float16 or float32"):
        check_vectors(make_vectors(5).astype(dtype), ids_of(5), DIM)


@pytest.mark.parametrize("dtype", [np.int32, np.uint64, np.float64, np.float32, object])
def test_wrong_id_dtype_is_refused(make_vectors, dtype):
    with pytest.raises(IndexBuildError, match="must be int64"):
        check_vectors(make_vectors(5), np.arange(5).astype(dtype), DIM)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([3, -1, 4]), "id -1 is negative"),
        (np.array([3, 4, 3]), "1 ids are there twice, the first is 3"),
        (np.array([3, 4]), "must be int64"),
        (np.array([[3], [4], [5]]), "must be int64"),
    ],
)
def test_bad_ids_are_refused(make_vectors, ids, message):
    with pytest.raises(IndexBuildError, match=message):
        check_vectors(make_vectors(3), ids, DIM)


def test_ids_twice_in_two_shards_are_refused(make_vectors, make_trained):
    shards = [(make_vectors(5), ids_of(5)), (make_vectors(3, seed=1), ids_of(3))]
    with pytest.raises(IndexBuildError, match="3 ids are there twice"):
        add_part(make_trained("IVF16,SQ8"), shards)
    with pytest.raises(IndexBuildError, match="3 ids are there twice"):
        build_shard(make_trained("HNSW8"), shards)


@pytest.mark.parametrize("n_ids", [4, 6])
def test_other_number_of_ids_is_refused(make_vectors, make_trained, n_ids):
    with pytest.raises(IndexBuildError, match=f"5 vectors for {n_ids} ids"):
        add_part(make_trained("IVF16,SQ8"), [(make_vectors(5), ids_of(n_ids))])


@pytest.mark.parametrize(
    "assign",
    [
        lambda rows: (np.full(len(rows), -1), np.ones(len(rows), bool)),
        lambda rows: (np.full(len(rows), 16), np.ones(len(rows), bool)),
        lambda rows: (np.zeros(len(rows), np.int32), np.ones(len(rows), bool)),
        lambda rows: (np.zeros(len(rows) - 1, np.int64), np.ones(len(rows) - 1, bool)),
    ],
)
def test_bad_assignment_is_refused(make_vectors, make_trained, assign):
    with pytest.raises(IndexBuildError, match="assignment"):
        add_part(make_trained("IVF16,SQ8"), [(make_vectors(5), ids_of(5))], assign=assign)


def test_strided_read_only_float16_input(make_vectors, make_trained):
    vectors = np.asfortranarray(make_vectors(60).astype(np.float16))
    vectors.flags.writeable = False
    ids = np.repeat(ids_of(60), 2)[::2]
    trained = make_trained("IVF16,SQ8")
    assert add_part(trained, [(vectors, ids)]) == add_part(
        trained, [(np.ascontiguousarray(vectors), ids_of(60))]
    )
    unit, _ = check_vectors(vectors, ids, DIM)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)


def test_head_and_sizes_of_a_part(make_vectors, make_trained):
    trained = make_trained("IVF16,SQ8")
    data = add_part(trained, [(make_vectors(60), ids_of(60))])
    part = open_part("a", lambda offset, length: data[offset : offset + length])
    head = part.head
    assert (head.rows, head.nlist, head.code_size) == (60, 16, 32)
    assert (head.min_id, head.max_id) == (1 << 40, (1 << 40) + 59)
    assert head.training_sha256 == trained.sha256
    assert part_sizes(part).sum() == 60
    assert len(data) == head.lists_offset + 60 * head.entry_bytes


def test_part_without_rows(make_trained):
    data = add_part(make_trained("IVF16,SQ8"), [])
    part = open_part("a", lambda offset, length: data[offset : offset + length])
    assert (part.head.rows, part.head.min_id, part.head.max_id) == (0, -1, -1)
    assert not part_sizes(part).any()


# HNSW shards


@pytest.mark.parametrize("factory", ["HNSW8", "HNSW8,SQ8"])
@pytest.mark.parametrize("metric", list(Metric))
def test_hnsw_shards_merge_at_search_time(make_vectors, make_trained, factory, metric):
    trained = make_trained(factory, metric)
    vectors, ids = make_vectors(600), ids_of(600)
    cuts = [slice(0, 250), slice(250, 251), slice(251, 600)]
    shards = [build_shard(trained, [(vectors[cut], ids[cut])]) for cut in cuts]
    assert shards[0] == build_shard(trained, [(vectors[cuts[0]], ids[cuts[0]])])
    queries = make_vectors(30, seed=3)
    results = [search(load_index(shard), queries, 10, effort=200) for shard in shards]
    scores, found = merge_topk(results, 10)
    true_scores, truth = exact_topk(queries, [(vectors, ids)], 10)
    assert (found[:, :, None] == truth[:, None]).any(axis=2).mean() > 0.9
    np.testing.assert_allclose(scores, true_scores, atol=0.02)


def test_kinds_are_not_mixed_up(make_vectors, make_trained):
    shards = [(make_vectors(5), ids_of(5))]
    with pytest.raises(IndexBuildError, match="cannot be merged"):
        add_part(make_trained("HNSW8"), shards)
    with pytest.raises(IndexBuildError, match="built from parts"):
        build_shard(make_trained("Flat"), shards)
    with pytest.raises(IndexBuildError, match="at least one vector"):
        build_shard(make_trained("HNSW8"), [])


def test_building_a_shard_restores_the_threads(make_vectors, make_trained):
    faiss.omp_set_num_threads(2)
    build_shard(make_trained("HNSW8"), [(make_vectors(5), ids_of(5))])
    assert faiss.omp_get_max_threads() == 2
    faiss.omp_set_num_threads(1)
