"""Training: deterministic, checked, and open to centroids found elsewhere."""

import faiss
import numpy as np
import pytest

from bge_ray.errors import IndexBuildError
from bge_ray.index.add import add_part
from bge_ray.index.factory import Kind, Metric
from bge_ray.index.train import centroids, default_nprobe, load_trained, rotate, train

DIM = 32


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "RR,IVF16,RaBitQ", "SQ8"])
@pytest.mark.parametrize("metric", list(Metric))
def test_same_sample_same_bytes(make_vectors, factory, metric):
    sample = make_vectors(1300)
    first = train(sample, factory, metric)
    assert train(np.asfortranarray(sample), factory, metric) == first
    index = first.open()
    assert index.is_trained
    assert index.ntotal == 0
    assert index.metric_type == metric.faiss


def test_float16_sample_is_taken(make_vectors):
    sample = make_vectors(700).astype(np.float16)
    assert train(sample, "IVF16,SQ8", Metric.L2) == train(sample.astype(np.float32), "IVF16,SQ8", Metric.L2)


def test_sample_is_not_changed(make_vectors):
    sample = make_vectors(700) * np.float32(1.004)
    before = sample.copy()
    sample.flags.writeable = False
    train(sample, "RR,IVF16,SQ8", Metric.L2)
    np.testing.assert_array_equal(sample, before)


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "HNSW8", "HNSW8,SQfp16"])
def test_kinds_that_learn_nothing_need_no_sample(factory):
    trained = train(np.empty((0, DIM), np.float32), factory, Metric.L2)
    assert trained.open().is_trained
    assert trained.spec.kind in (Kind.FLAT, Kind.SHARDS)


def test_centroids_are_unit_for_inner_product_only(make_trained):
    norms = np.linalg.norm(centroids(make_trained("IVF16,SQ8", Metric.INNER_PRODUCT)), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)
    norms = np.linalg.norm(centroids(make_trained("IVF16,SQ8", Metric.L2)), axis=1)
    assert norms.max() < 0.999


def test_file_carries_a_useful_nprobe(make_trained):
    index = make_trained("RR,IVF16,SQ8").open()
    assert faiss.extract_index_ivf(index).nprobe == 8
    assert [default_nprobe(n) for n in (1, 16, 1024, 65536)] == [1, 8, 32, 256]


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "RR,IVF16,RaBitQ", "IVF16_HNSW8,SQ8"])
@pytest.mark.parametrize("metric", list(Metric))
def test_given_centroids_are_kept(make_vectors, factory, metric):
    asked = []

    def kmeans(points: np.ndarray, nlist: int, spherical: bool) -> np.ndarray:
        asked.append((points.shape, nlist, spherical))
        return points[:nlist]

    sample = make_vectors(700)
    trained = train(sample, factory, metric, kmeans=kmeans)
    assert asked == [((700, DIM), 16, metric is Metric.INNER_PRODUCT)]
    np.testing.assert_array_equal(centroids(trained), rotate(trained.open(), sample)[:16])


def test_faiss_kmeans_as_a_hook_gives_the_same_index(make_vectors):
    def kmeans(points: np.ndarray, nlist: int, spherical: bool) -> np.ndarray:
        found = faiss.Kmeans(points.shape[1], nlist, niter=10, spherical=spherical, verbose=False)
        found.train(points)
        return found.centroids

    sample = make_vectors(700)
    hooked = train(sample, "RR,IVF16,RaBitQ", Metric.L2, kmeans=kmeans)
    np.testing.assert_array_equal(centroids(hooked), centroids(train(sample, "RR,IVF16,RaBitQ", Metric.L2)))


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize(
    "factory", ["IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8x4", "IVF16,RaBitQ", "RR,IVF16,SQ8", "RR,IVF16,RaBitQ"]
)
def test_assignment_elsewhere_gives_the_same_bytes(make_vectors, make_trained, factory, metric):
    trained = make_trained(factory, metric)
    found = centroids(trained)
    penalty = 0 if metric is Metric.INNER_PRODUCT else (found**2).sum(axis=1) / 2

    def assign(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers = (rows @ found.T - penalty).argmax(axis=1)
        numbers[::7] = 0  # as good as any where it says that it does not know
        return numbers, np.arange(len(rows)) % 7 != 0

    shards = [(make_vectors(500), np.arange(500))]
    assert add_part(trained, shards, assign=assign) == add_part(trained, shards)


def test_trained_index_survives_storage(make_trained):
    trained = make_trained("RR,IVF16,RaBitQ")
    loaded = load_trained(trained.data, "RR,IVF16,RaBitQ", Metric.L2, DIM, trained.sha256)
    assert loaded == trained


# Bad input


@pytest.mark.parametrize(
    ("rows", "message"),
    [(16 * 39 - 1, "at least 624 training rows, got 623"), (0, "at least 624 training rows")],
)
def test_too_few_rows(make_vectors, rows, message):
    with pytest.raises(IndexBuildError, match=message):
        train(make_vectors(rows), "IVF16,SQ8", Metric.L2)


def test_sq8_without_rows():
    with pytest.raises(IndexBuildError, match="at least 1 training rows"):
        train(np.empty((0, DIM), np.float32), "SQ8", Metric.L2)


def test_too_few_different_rows(make_vectors):
    sample = np.tile(make_vectors(15), (60, 1))
    with pytest.raises(IndexBuildError, match="15 different rows for 16 lists"):
        train(sample, "IVF16,SQ8", Metric.L2)


@pytest.mark.parametrize("value", [np.nan, np.inf, 30.0])
def test_bad_row_in_the_sample_is_named(make_vectors, value):
    sample = make_vectors(700)
    sample[321, 5] = value
    with pytest.raises(IndexBuildError, match="training sample: row 321 has"):
        train(sample, "IVF16,SQ8", Metric.L2)


def test_bad_centroids_are_refused(make_vectors):
    with pytest.raises(IndexBuildError, match="k-means returned"):
        train(make_vectors(700), "IVF16,SQ8", Metric.L2, kmeans=lambda points, nlist, _: points[: nlist - 1])
    with pytest.raises(IndexBuildError, match="not finite"):
        train(
            make_vectors(700), "IVF16,SQ8", Metric.L2, kmeans=lambda points, nlist, _: points[:nlist] * np.nan
        )


def test_flat_index_has_no_centroids(make_trained):
    with pytest.raises(IndexBuildError, match="no centroids"):
        centroids(make_trained("Flat"))


def test_other_or_damaged_trained_index_is_refused(make_vectors, make_trained):
    trained, other = make_trained("IVF16,SQ8"), make_trained("IVF16,Flat")
    with pytest.raises(IndexBuildError, match="another or damaged"):
        load_trained(other.data, "IVF16,SQ8", Metric.L2, DIM, trained.sha256)
    with pytest.raises(IndexBuildError, match="another or damaged"):
        load_trained(trained.data[:-1], "IVF16,SQ8", Metric.L2, DIM, trained.sha256)
    with pytest.raises(IndexBuildError, match="not IVF17,SQ8"):
        load_trained(trained.data, "IVF17,SQ8", Metric.L2, DIM, trained.sha256)
    with pytest.raises(IndexBuildError, match="not IVF16,SQ8"):
        load_trained(trained.data, "IVF16,SQ8", Metric.INNER_PRODUCT, DIM, trained.sha256)
    with pytest.raises(IndexBuildError, match="not IVF16,SQ8"):
        load_trained(trained.data, "IVF16,SQ8", Metric.L2, 64, trained.sha256)
