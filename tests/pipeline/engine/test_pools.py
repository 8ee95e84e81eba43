"""Pools and tasks are sized so that no cluster, however small, can wait for itself."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.errors import SettingsError
from bge_ray.pipeline.embed.job import (
    MAX_WRITERS,
    READERS_PER_CORE,
    READERS_PER_GPU,
    WRITER_CPUS,
    WRITER_SHARE,
    WRITERS_PER_CORE,
    WRITERS_PER_GPU,
)
from bge_ray.pipeline.engine import pools
from bge_ray.pipeline.engine.pools import (
    PoolRequest,
    Sizes,
    TaskRequest,
    device_of,
    encoder_request,
    reranker_request,
    searcher_request,
    size_pools,
)
from bge_ray.pipeline.runs.work import TASKS
from bge_ray.settings.sections import Settings, parse_settings

TASK_STAGES = 5
ANY = st.none() | st.integers(1, 500)
REQUESTS = st.lists(
    st.sampled_from([encoder_request, searcher_request, reranker_request]), min_size=1, unique=True
)


def embed_tasks(spans: int = 10_000, units: int = 10_000) -> list[TaskRequest]:
    return [
        TaskRequest(
            "writers",
            min(MAX_WRITERS, units),
            WRITER_SHARE,
            WRITER_CPUS,
            per_gpu=WRITERS_PER_GPU,
            per_core=WRITERS_PER_CORE,
        ),
        TaskRequest("readers", spans, 1.0, per_gpu=READERS_PER_GPU, per_core=READERS_PER_CORE),
    ]


def encoders(count: int | None = None, gpus: float | None = None, most: int = 10_000) -> PoolRequest:
    return PoolRequest("encoders", "resources.num_encoders", most, count, gpus)


def embed(pool: PoolRequest, cpus: float, gpus: float, node: float | None = None) -> Sizes:
    return size_pools([pool], embed_tasks(), cpus, gpus, node_cpus=node)


@given(st.integers(1, 512), st.integers(0, 64))
def test_every_pool_fits_at_once(cpus: int, gpus: int) -> None:
    """What encoders, one reader and one writer reserve together is there, so none blocks the others."""
    try:
        sizes = embed(encoders(), cpus, gpus)
    except SettingsError:
        assert gpus * 0.25 > cpus - 0.2  # refused only where the CPUs are truly used up
        return
    pool, readers, writers = sizes.pools["encoders"], sizes.tasks["readers"], sizes.tasks["writers"]
    reserved = pool.count * pool.cpus + readers.count * readers.cpus + writers.count * writers.cpus
    assert reserved <= cpus + 1e-6
    assert min(pool.count, readers.count, writers.count) >= 1
    assert pool.count == (gpus or cpus)
    assert (pool.device == "cuda") == (gpus > 0)
    # Ray fuses a task into an actor stage of equal size, and would then tokenise inside the encoder.
    assert readers.cpus != pool.cpus or pool.gpus


@given(st.integers(2, 256), st.integers(1, 256))
def test_cpu_threads_do_not_exceed_the_cores(cpus: int, count: int) -> None:
    pool = embed(encoders(count), cpus, 0).pools["encoders"]
    assert pool.count == count
    assert pool.threads * count <= max(cpus, count)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 128) | st.none())
def test_nothing_waits_for_a_core_that_no_node_has(cores: int, nodes: int, count: int | None) -> None:
    """An encoder fits on a node; tasks go on however the encoders lie, and after a node was lost."""
    sizes = embed(encoders(count), cores * nodes, 0, cores)
    assert sizes.pools["encoders"].cpus <= cores
    assert {tasks.cpus for tasks in sizes.tasks.values()} == {0.0}


@given(REQUESTS, ANY, ANY, st.integers(1, 2000), st.integers(0, 64), st.integers(1, 128))
def test_pools_of_a_search_always_fit_beside_each_other(
    requests: list, most: int | None, fixed: int | None, cpus: int, gpus: int, node: int
) -> None:
    settings = parse_settings(None, [] if fixed is None else [f"search.num_searchers={fixed}"])
    pools = [request(settings, most or 10_000) for request in requests]
    try:
        sizes = size_pools(pools, [TASKS] * TASK_STAGES, float(cpus), float(gpus), node_cpus=min(node, cpus))
    except SettingsError:
        assert gpus * 0.25 > cpus / 2 - 1  # GPUs without the CPUs to feed them
        return
    used = sum(p.count * p.cpus for p in sizes.pools.values())
    assert sum(p.count * p.gpus for p in sizes.pools.values()) <= gpus + 1e-6
    # One task of each stage fits beside all actors, or a stage would wait for ever.
    tasks = sizes.tasks["tasks"]
    assert tasks.count >= 1
    assert used + TASK_STAGES * tasks.cpus <= cpus + 1e-3
    for pool in pools:
        sized = sizes.pools[pool.name]
        assert 1 <= sized.count <= pool.most
        assert 0 < sized.cpus <= min(node, cpus)
        assert (sized.device == "cuda") == (gpus > 0 and pool.name != "searchers")


def test_tasks_reserve_cores_only_where_encoders_take_whole_ones() -> None:
    roomy = embed(encoders(), 16, 2, 8)
    assert (roomy.pools["encoders"].cpus, roomy.tasks["readers"].cpus) == (1.0, 1.0)
    tight = embed(encoders(), 2, 2, 1)
    assert (tight.pools["encoders"].cpus, tight.tasks["readers"].cpus) == (0.25, 0.0)


def test_on_a_gpu_two_units_overlap_and_have_two_writers() -> None:
    sizes = embed(encoders(), 64, 4)
    assert (sizes.pools["encoders"].units_at_once, sizes.tasks["writers"].count) == (2, 8)
    assert embed(encoders(), 4, 0).pools["encoders"].units_at_once == 1


def test_gpus_are_shared_where_asked() -> None:
    pool = embed(encoders(gpus=0.5), 32, 4).pools["encoders"]
    assert (pool.count, pool.gpus) == (8, 0.5)


def test_a_device_that_is_asked_for_is_known_before_any_node_is_there() -> None:
    """On a cluster that scales from zero there is no GPU to count when dtypes are settled."""

    def ask_nobody() -> None:
        raise AssertionError("nodes were waited for")

    for gpus, device in ((0, "cpu"), (0.5, "cuda"), (1, "cuda")):
        settings = parse_settings(
            None, [f"resources.gpus_per_encoder={gpus}", f"rerank.gpus_per_reranker={gpus}"]
        )
        for request in (encoder_request, reranker_request):
            assert device_of(settings, request(settings, 1), ask_nobody) == device


def test_a_device_that_nobody_named_is_told_by_the_nodes_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster that scales from zero a CPU would be taken for all that there is."""
    there: dict[str, float] = {}
    monkeypatch.setattr(pools, "await_pools", lambda *_: there.update(CPU=8.0, GPU=1.0))
    monkeypatch.setattr(pools, "ray", SimpleNamespace(cluster_resources=lambda: there))
    for request in (encoder_request, reranker_request):
        there.clear()
        assert device_of(Settings(), request(Settings(), 1), lambda: None) == "cuda"


def test_both_models_share_a_single_gpu() -> None:
    settings = Settings()
    pools = [encoder_request(settings, 100), searcher_request(settings, 4), reranker_request(settings, 100)]
    sizes = size_pools(pools, [TASKS], 16.0, 1.0).pools
    assert (sizes["encoders"].count, sizes["encoders"].gpus) == (1, 0.25)
    assert (sizes["rerankers"].count, sizes["rerankers"].gpus) == (1, 0.75)
    alone = size_pools([reranker_request(settings, 100)], [TASKS], 64.0, 8.0).pools
    assert (alone["rerankers"].count, alone["rerankers"].gpus) == (8, 1.0)


def test_what_does_not_fit_is_refused_with_the_keys_to_change() -> None:
    with pytest.raises(SettingsError, match=r"resources\.num_encoders"):
        embed(encoders(8), 2, 8)
    settings = parse_settings(None, ["rerank.num_rerankers=3", "rerank.gpus_per_reranker=1"])
    with pytest.raises(
        SettingsError, match=r"rerank\.num_rerankers: the actors need 3 GPUs, the cluster has 2"
    ):
        size_pools([reranker_request(settings, 10)], [TASKS], 16.0, 2.0)


def test_a_small_job_starts_no_idle_actor() -> None:
    sizes = size_pools([encoders(most=3)], embed_tasks(spans=1, units=3), 64, 8)
    assert sizes.pools["encoders"].count == 3
    assert (sizes.tasks["readers"].count, sizes.tasks["writers"].count) == (1, 3)


def test_two_cores_without_a_gpu_are_shared_as_they_always_were() -> None:
    sizes = embed(encoders(), 2, 0)
    pool = sizes.pools["encoders"]
    assert (pool.count, pool.cpus, pool.threads) == (2, 0.5, 1)
    assert (sizes.tasks["readers"].count, sizes.tasks["writers"].count) == (1, 2)
