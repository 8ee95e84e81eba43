"""Stages are sized so that no cluster, however small, can wait for itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_ray.errors import SettingsError
from bge_ray.pipeline.engine.cluster import cap_sizes, size_stages
from bge_ray.settings.sections import ResourcesSettings


@given(st.integers(1, 512), st.integers(0, 64))
def test_every_pool_fits_at_once(cpus: int, gpus: int) -> None:
    """What encoders, one reader and one writer reserve together is there, so none blocks the others."""
    try:
        sizes = size_stages(ResourcesSettings(), cpus, gpus)
    except SettingsError:
        assert gpus * 0.25 > cpus - 0.2  # refused only where the CPUs are truly used up
        return
    reserved = (
        sizes.num_encoders * sizes.encoder_cpus
        + sizes.num_readers * sizes.reader_cpus
        + sizes.num_writers * sizes.writer_cpus
    )
    assert reserved <= cpus + 1e-6
    assert min(sizes.num_encoders, sizes.num_readers, sizes.num_writers) >= 1
    assert sizes.num_encoders == (gpus or cpus)
    assert (sizes.device == "cuda") == (gpus > 0)
    # Ray fuses a task into an actor stage of equal size, and would then tokenise inside the encoder.
    assert sizes.reader_cpus != sizes.encoder_cpus or sizes.encoder_gpus


@given(st.integers(2, 256), st.integers(1, 256))
def test_cpu_threads_do_not_exceed_the_cores(cpus: int, num_encoders: int) -> None:
    sizes = size_stages(ResourcesSettings(num_encoders=num_encoders), cpus, 0)
    assert sizes.num_encoders == num_encoders
    assert sizes.encoder_threads * num_encoders <= max(cpus, num_encoders)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 128) | st.none())
def test_nothing_waits_for_a_core_that_no_node_has(cores: int, nodes: int, num_encoders: int | None) -> None:
    """An encoder fits on a node; tasks go on however the encoders lie, and after a node was lost."""
    sizes = size_stages(ResourcesSettings(num_encoders=num_encoders), cores * nodes, 0, node_cpus=cores)
    assert sizes.encoder_cpus <= cores
    assert (sizes.reader_cpus, sizes.writer_cpus) == (0, 0)


def test_tasks_reserve_cores_only_where_encoders_take_whole_ones() -> None:
    roomy = size_stages(ResourcesSettings(), 16, 2, node_cpus=8)
    assert (roomy.encoder_cpus, roomy.reader_cpus) == (1.0, 1.0)
    tight = size_stages(ResourcesSettings(), 2, 2, node_cpus=1)
    assert (tight.encoder_cpus, tight.reader_cpus) == (0.25, 0.0)


def test_gpus_are_shared_where_asked() -> None:
    sizes = size_stages(ResourcesSettings(gpus_per_encoder=0.5), 32, 4)
    assert (sizes.num_encoders, sizes.encoder_gpus) == (8, 0.5)


def test_too_many_encoders_for_the_cpus_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"resources\.num_encoders"):
        size_stages(ResourcesSettings(num_encoders=8), 2, 8)


def test_a_small_job_starts_no_idle_actor() -> None:
    sizes = cap_sizes(size_stages(ResourcesSettings(), 64, 8), spans=1, units=3)
    assert (sizes.num_encoders, sizes.num_readers, sizes.num_writers) == (3, 1, 3)
