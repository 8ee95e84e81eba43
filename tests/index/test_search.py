"""Search against brute force in numpy."""

import functools

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bge_ray.errors import IndexBuildError
from bge_ray.index.add import add_part
from bge_ray.index.factory import Metric
from bge_ray.index.files import merged_file
from bge_ray.index.merge import total_sizes
from bge_ray.index.part import open_part
from bge_ray.index.probes import choose_probes
from bge_ray.index.search import load_index, search
from bge_ray.index.selectors import select
from bge_ray.index.topk import NO_RESULT, best, best_rows, exact_topk, merge_topk, pair_scores, rescore
from bge_ray.index.train import TrainedIndex
from bge_ray.records.ids import vector_ids

pytestmark = pytest.mark.long

DIM = 32
once = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def build(trained: TrainedIndex, vectors: np.ndarray, ids: np.ndarray) -> bytes:
    data = add_part(trained, [(vectors, ids)])
    parts = [open_part("part", lambda offset, length: data[offset : offset + length])]
    return b"".join(merged_file(trained, parts, total_sizes(trained, parts)))


def brute(queries: np.ndarray, vectors: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores in float64 sorted by (-float32 score, id), padded with holes."""
    scores, found = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
    for row, query in enumerate(queries):
        exact = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1).astype(np.float32)
        order = sorted(range(len(ids)), key=lambda i: (-exact[i], ids[i]))[:k]
        scores[row, : len(order)], found[row, : len(order)] = exact[order], ids[order]
    return scores, found


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "RR,IVF16,Flat"])
@pytest.mark.parametrize("n_queries", [1, 40])
def test_full_search_is_brute_force(make_vectors, make_trained, factory, metric, n_queries):
    vectors, ids = make_vectors(400), np.random.default_rng(0).permutation(400) + (7 << 32)
    queries = make_vectors(n_queries, seed=5)
    index = load_index(build(make_trained(factory, metric), vectors, ids))
    scores, found = search(index, queries, 10, effort=16)
    true_scores, truth = brute(queries, vectors, ids, 10)
    np.testing.assert_allclose(scores, true_scores, atol=2e-6)
    assert (found == truth).mean() > 0.99  # neighbours closer than rounding may swap
    assert scores.dtype == np.float32
    assert found.dtype == np.int64


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("factory", ["IVF16,SQ8", "IVF16,RaBitQ4", "RR,IVF16,SQ4", "SQfp16"])
def test_lossy_scores_stay_near_inner_products(make_vectors, make_trained, factory, metric):
    vectors, ids = make_vectors(400), np.arange(400)
    queries = make_vectors(20, seed=5)
    scores, found = search(
        load_index(build(make_trained(factory, metric), vectors, ids)), queries, 10, effort=16
    )
    assert (np.diff(scores, axis=1) <= 0).all()
    exact = np.einsum("qd,qkd->qk", queries, vectors[found])
    np.testing.assert_allclose(scores, exact, atol=0.15)


def test_hundreds_of_equal_vectors_are_ordered_by_id(make_vectors, make_trained):
    vectors = np.concatenate(
        [make_vectors(1), make_vectors(3, seed=9), np.repeat(make_vectors(1), 600, axis=0)]
    )
    ids = np.random.default_rng(0).permutation(len(vectors)).astype(np.int64)
    equal = np.sort(np.delete(ids, [1, 2, 3]))
    for factory in ("IVF16,Flat", "IVF16,SQ8", "RR,IVF16,RaBitQ"):
        index = load_index(build(make_trained(factory), vectors, ids))
        _, found = search(index, vectors[:1], 20, effort=16)
        np.testing.assert_array_equal(found[0], equal[:20])


def test_fewer_results_than_k(make_vectors, make_trained):
    vectors, ids = make_vectors(5), np.arange(5) + 10
    for factory in ("IVF16,SQ8", "Flat", "RR,IVF16,RaBitQ"):
        index = load_index(build(make_trained(factory), vectors, ids))
        scores, found = search(index, make_vectors(3, seed=4), 8, effort=16)
        assert (np.sort(found[:, :5]) == ids).all()
        assert (found[:, 5:] == NO_RESULT).all()
        assert np.isneginf(scores[:, 5:]).all()
        assert np.isfinite(scores[:, :5]).all()


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "Flat", "RR,IVF16,RaBitQ"])
def test_empty_index_and_no_queries(make_vectors, make_trained, factory):
    trained = make_trained(factory)
    scores, found = search(load_index(trained.data), make_vectors(2), 4, effort=3)
    assert (found == NO_RESULT).all()
    assert np.isneginf(scores).all()
    index = load_index(build(trained, make_vectors(9), np.arange(9)))
    scores, found = search(index, make_vectors(0), 4)
    assert scores.shape == found.shape == (0, 4)


def test_effort_is_the_number_of_lists_probed(make_vectors, make_trained):
    vectors = make_vectors(500)
    for factory in ("IVF16,SQ8", "RR,IVF16,SQ8"):
        index = load_index(build(make_trained(factory), vectors, np.arange(500)))
        queries = make_vectors(20, seed=8)
        ivf = faiss.extract_index_ivf(index)
        for effort in (1, 5, 16, 1000):
            _, found = search(index, queries, 3, effort=effort)
            plain = faiss.deserialize_index(faiss.serialize_index(index))
            faiss.extract_index_ivf(plain).nprobe = effort
            np.testing.assert_array_equal(found, plain.search(queries, 3)[1])
        assert ivf.nprobe == 8


def test_mapped_file_gives_the_same_results(make_vectors, make_trained, tmp_path):
    for factory in ("IVF16,SQ8", "RR,IVF16,RaBitQ", "Flat", "IVF16,PQ8x4"):
        data = build(make_trained(factory), make_vectors(300), np.arange(300))
        path = tmp_path / "index.faiss"
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        queries = make_vectors(20, seed=3)
        expected = search(load_index(data), queries, 7, effort=9)
        for mmap in (True, False):
            for got, want in zip(
                search(load_index(path, mmap=mmap), queries, 7, effort=9), expected, strict=True
            ):
                np.testing.assert_array_equal(got, want)


# Bad input


@pytest.mark.parametrize("value", [np.nan, np.inf, 0, 4])
def test_bad_query_is_named(make_vectors, make_trained, value):
    index = load_index(make_trained("IVF16,SQ8").data)
    queries = make_vectors(4)
    queries[2] *= np.float32(value)
    for call in (
        lambda: search(index, queries, 3),
        lambda: exact_topk(queries, [], 3),
        lambda: pair_scores(queries, make_vectors(1), np.arange(4), np.zeros(4, np.int64)),
    ):
        with pytest.raises(IndexBuildError, match="queries: row 2 has"):
            call()


def test_wrong_dim_of_queries(make_vectors, make_trained):
    with pytest.raises(IndexBuildError, match="queries have shape"):
        search(load_index(make_trained("IVF16,SQ8").data), make_vectors(3, dim=16), 5)


@pytest.mark.parametrize(("k", "effort"), [(0, 1), (-1, 1), (5, 0)])
def test_bad_k_and_effort(make_vectors, make_trained, k, effort):
    with pytest.raises(IndexBuildError, match="at least 1"):
        search(load_index(make_trained("IVF16,SQ8").data), make_vectors(3), k, effort=effort)


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "Flat", "RR,IVF16,RaBitQ"])
def test_truncated_or_missing_file(make_vectors, make_trained, tmp_path, factory):
    data = build(make_trained(factory), make_vectors(100), np.arange(100))
    path = tmp_path / "index.faiss"
    with pytest.raises(IndexBuildError, match=r"index\.faiss cannot be opened"):
        load_index(path)
    for keep in (0, 4, 100, len(data) // 2, len(data) - 1):
        path = tmp_path / f"index-{keep}.faiss"
        path.write_bytes(data[:keep])
        for source in (data[:keep], path):
            with pytest.raises(IndexBuildError, match="cannot be opened"):
                load_index(source, n_bytes=len(data) if keep == len(data) - 1 else None)


def test_other_size_than_noted(make_trained, tmp_path):
    data = make_trained("IVF16,SQ8").data
    for size in (len(data) - 1, len(data) + 1):
        with pytest.raises(IndexBuildError, match=f"has {len(data)} bytes, should have {size}"):
            load_index(data, n_bytes=size)
    with pytest.raises(IndexBuildError, match="it has 0 bytes"):
        load_index(tmp_path / "missing", n_bytes=5)
    assert load_index(data, n_bytes=len(data)).ntotal == 0


def test_file_that_counts_vectors_it_dropped(make_vectors, make_trained):
    index = make_trained("IVF16,SQ8").open()
    vectors = make_vectors(10)
    vectors[4] = np.nan
    index.add_with_ids(vectors, np.arange(10))  # FAISS: ntotal 10, lists hold 9
    with pytest.raises(IndexBuildError, match="says 10 vectors, its lists hold 9"):
        load_index(faiss.serialize_index(index).tobytes())


# Merging, exact search, scoring again


@once
@given(
    columns=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    k=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_merge_topk_is_a_sort(columns, k, seed):
    rng = np.random.default_rng(seed)
    results, next_id = [], 0
    for width in columns:
        scores = rng.integers(0, 4, (3, width)).astype(np.float32)
        ids = np.arange(next_id, next_id + width) + np.zeros((3, 1), np.int64)
        ids[rng.random((3, width)) < 0.2] = NO_RESULT
        next_id += width
        results.append(best(scores, ids, max(width, 1)))
    scores, ids = merge_topk(results, k)
    k = min(k, sum(ids.shape[1] for _, ids in results))  # no wider than what there is
    assert ids.shape == (3, k)
    for row in range(3):
        pairs = sorted(
            (-score, name)
            for given_scores, given_ids in results
            for score, name in zip(given_scores[row], given_ids[row], strict=True)
            if name != NO_RESULT
        )[:k]
        assert ids[row].tolist() == [name for _, name in pairs] + [NO_RESULT] * (k - len(pairs))
        assert scores[row].tolist() == [-score for score, _ in pairs] + [-np.inf] * (k - len(pairs))


def test_merge_topk_refuses_other_queries():
    one, two = (best(np.zeros((n, 1), np.float32), np.zeros((n, 1), np.int64), 1) for n in (1, 2))
    with pytest.raises(IndexBuildError, match=r"\[1, 2\] queries"):
        merge_topk([one, two], 1)
    with pytest.raises(IndexBuildError, match="cannot merge"):
        merge_topk([], 1)


@once
@given(
    blocks=st.lists(st.integers(0, 120), min_size=1, max_size=5),
    k=st.integers(1, 40),
    n_queries=st.sampled_from([1, 3, 25]),
)
def test_exact_topk_is_brute_force_with_equal_vectors(make_vectors, blocks, k, n_queries):
    n = sum(blocks)
    vectors = unit(make_vectors(max(n // 2, 1))[np.random.default_rng(0).integers(0, max(n // 2, 1), n)])
    ids = np.random.default_rng(1).permutation(n).astype(np.int64)
    cuts = np.cumsum(blocks)[:-1]
    queries = unit(make_vectors(n_queries, seed=2))
    scores, found = exact_topk(queries, zip(np.split(vectors, cuts), np.split(ids, cuts), strict=True), k)
    true_scores, truth = brute(queries, vectors, ids, min(k, n))
    assert found.shape == (n_queries, min(k, n))  # k beyond the corpus costs nothing
    np.testing.assert_allclose(scores, true_scores, atol=1e-6)
    swapped = found != truth
    assert swapped.sum() <= 0.01 * swapped.size or np.allclose(
        scores[swapped], true_scores[swapped], atol=1e-7
    )


@once
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    cut=st.integers(1, 200),
    k=st.integers(1, 35),
)
def test_of_the_chunks_of_a_row_the_best_counts_whatever_the_blocks(make_vectors, sizes, cut, k):
    """Against numpy over all chunks; a third of the vectors are equal, and blocks cut rows apart."""
    n, queries = sum(sizes), unit(make_vectors(4, seed=2))
    vectors = unit(make_vectors(n)[np.random.default_rng(n).integers(0, -(-n // 3), n)])
    rows = np.repeat(np.arange(len(sizes)), sizes)
    numbers = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    ids = vector_ids(3, rows, numbers)
    blocks = [(vectors[at : at + cut], ids[at : at + cut]) for at in range(0, n, cut)]
    scores, found = exact_topk(queries, blocks, k, per_row=True)
    # One sum a pair, in the order of the dimensions: equal vectors have equal scores.
    all_scores = np.einsum("qd,nd->qn", queries.astype(np.float64), vectors.astype(np.float64))
    every = exact_topk(queries, [(vectors, ids)], n)
    for query in range(len(queries)):
        best_of: dict[int, int] = {}
        for vector_id in every[1][query].tolist():
            best_of.setdefault(vector_id >> 13, vector_id)
        truth = list(best_of.values())[:k]
        assert found[query].tolist() == truth + [NO_RESULT] * (found.shape[1] - len(truth))
        top = np.sort(np.maximum.reduceat(all_scores[query], np.cumsum(sizes) - sizes))[::-1][:k]
        np.testing.assert_allclose(scores[query, : len(truth)], top, atol=1e-6)
    again = best_rows(every, found.shape[1])
    np.testing.assert_array_equal(again[1], found)
    np.testing.assert_array_equal(again[0], scores)


def test_a_row_of_8000_chunks_takes_one_place(make_vectors):
    query = make_vectors(1)
    near = unit(query + 0.01 * make_vectors(8000, seed=3))
    others = unit(make_vectors(50, seed=4))
    ids = np.concatenate([vector_ids(0, np.zeros(8000, int), np.arange(8000)), vector_ids(1, np.arange(50))])
    scores, found = exact_topk(query, [(np.concatenate([near, others]), ids)], 10, per_row=True)
    assert found[0, 0] == np.argmax(near.astype(np.float64) @ query[0].astype(np.float64))
    truth = np.argsort(-(others.astype(np.float64) @ query[0].astype(np.float64)))[:9]
    assert (found[0, 1:] >> 13 & ((1 << 28) - 1)).tolist() == truth.tolist()
    assert (np.diff(scores[0]) <= 0).all()


def test_exact_topk_does_not_depend_on_blocks(make_vectors):
    vectors = np.repeat(make_vectors(150), 3, axis=0)
    ids = np.random.default_rng(1).permutation(450).astype(np.int64)
    queries = make_vectors(30, seed=2)
    whole = exact_topk(queries, [(vectors, ids)], 17)
    for size in (1, 7, 64):
        cuts = range(size, 450, size)
        for got, want in zip(
            exact_topk(queries, zip(np.split(vectors, cuts), np.split(ids, cuts), strict=True), 17),
            whole,
            strict=True,
        ):
            np.testing.assert_array_equal(got, want)


def test_rescoring_restores_recall(make_vectors, make_trained):
    vectors, ids = make_vectors(3000), np.random.default_rng(0).permutation(3000) + (3 << 32)
    rows = {name: row for row, name in enumerate(ids.tolist())}
    queries = make_vectors(50, seed=2)

    def score(numbers: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return pair_scores(queries, vectors, numbers, np.array([rows[name] for name in wanted.tolist()]))

    index = load_index(build(make_trained("RR,IVF16,RaBitQ"), vectors, ids))
    _, candidates = search(index, queries, 200, effort=16)
    scores, found = (part[:, :10] for part in rescore(candidates, score))
    true_scores, truth = exact_topk(queries, [(vectors, ids)], 10)
    hits = (found[:, :, None] == truth[:, None]).any(axis=2)
    before = (candidates[:, :10, None] == truth[:, None]).any(axis=2)
    assert hits.mean() > before.mean() + 0.2
    assert hits.mean() > 0.9
    np.testing.assert_array_equal(scores[hits & (found == truth)], true_scores[hits & (found == truth)])


def test_rescoring_keeps_holes_at_the_end(make_vectors):
    queries, vectors = make_vectors(2, seed=1), make_vectors(5)
    candidates = np.array([[4, NO_RESULT, 2], [NO_RESULT] * 3])
    scores, found = rescore(candidates, functools.partial(pair_scores, queries, vectors))
    assert sorted(found[0, :2]) == [2, 4]
    assert (found[0, 2:] == NO_RESULT).all()
    assert (found[1] == NO_RESULT).all()
    assert np.isneginf(scores[1]).all()
    nothing = np.full((2, 3), NO_RESULT)
    again = rescore(nothing, functools.partial(pair_scores, queries, vectors))
    assert (again[1] == NO_RESULT).all()


def test_a_bad_vector_among_candidates_is_named(make_vectors):
    with pytest.raises(IndexBuildError, match="candidate vectors: row 0"):
        pair_scores(make_vectors(1), np.zeros((2, DIM), np.float32), np.array([0]), np.array([1]))


def test_a_graph_is_walked_as_widely_as_it_is_asked(make_vectors):
    """With efSearch 4 and k 100, a walk of 4 candidates would leave results out and be wrong."""
    vectors, queries = make_vectors(3000), make_vectors(50, seed=2)
    index = faiss.index_factory(vectors.shape[1], "IDMap2,HNSW16")
    index.add_with_ids(vectors, np.arange(3000))
    faiss.downcast_index(index.index).hnsw.efSearch = 4
    _, truth = exact_topk(queries, [(vectors, np.arange(3000))], 100)
    for effort in (4, None):
        _, found = search(index, queries, 100, effort=effort)
        assert (found != NO_RESULT).all()
        assert np.mean([len(set(f) & set(t)) / 100 for f, t in zip(found, truth, strict=True)]) > 0.85


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize(
    "factory", ["IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8x4", "IVF16,RaBitQ4", "IVF16_HNSW32,SQ8", "RR,IVF16,SQ8"]
)
def test_lists_that_are_chosen_once_give_what_each_file_would_find(
    make_vectors, make_trained, factory, metric
):
    """What is chosen by one file holds for another with other vectors, with a filter, and through ties."""
    trained, queries = make_trained(factory, metric), make_vectors(30, seed=5)
    rows = np.concatenate([make_vectors(300), np.repeat(make_vectors(1, seed=5), 60, axis=0)])
    others = load_index(build(trained, make_vectors(50, seed=8), np.arange(50)))
    index = load_index(build(trained, rows, np.arange(360)))
    among = select(index, lambda ids: ids % 3 == 0)
    for effort in (1, 5, 16):
        probes = choose_probes(others, queries, effort)
        assert probes.lists.shape == (30, effort)
        for chosen in (None, among):
            scores, ids = search(index, queries, 10, effort=effort, among=chosen, probes=probes)
            expected, there = search(index, queries, 10, effort=effort, among=chosen)
            np.testing.assert_allclose(scores, expected, atol=1e-6)
            assert (ids == there).mean() > 0.995  # neighbours closer than rounding may swap
    np.testing.assert_array_equal(
        choose_probes(index, queries[4:5], 5).lists, choose_probes(index, queries, 5)[np.array([4])].lists
    )


def test_an_index_without_lists_has_none_to_choose(make_vectors, make_trained):
    index = load_index(build(make_trained("Flat", Metric.L2), make_vectors(50), np.arange(50)))
    assert choose_probes(index, make_vectors(3), 5) is None
    graph = faiss.index_factory(DIM, "IDMap2,HNSW16")
    graph.add_with_ids(make_vectors(50), np.arange(50))
    assert choose_probes(graph, make_vectors(3), 5) is None
