"""Input cut into units and groups; the sizes of pools; sums that must hold for any cluster."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bge_ray.errors import SettingsError
from bge_ray.pipeline.engine.pools import TASK_STAGES, size_pools
from bge_ray.pipeline.runs.intake import Block, Limits, read_group, take_in
from bge_ray.pipeline.runs.parcels import CANDIDATE_SCHEMA, QUERY_SCHEMA, part_uri
from bge_ray.settings.sections import Settings, parse_settings
from bge_ray.storage.objects import Storage

STORAGE = Storage(5)


def blocks(sizes: list[int]) -> Iterator[Block]:
    for number, size in enumerate(sizes):
        yield {"query_id": [f"q{number}"] * size, "query": [f"text {number}"] * size}


@hypothesis_settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 12), max_size=40), unit=st.integers(1, 10), groups=st.integers(1, 4))
def test_every_row_is_in_one_unit_and_no_query_is_torn(
    sizes: list[int], unit: int, groups: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = str(tmp_path_factory.mktemp("work"))
    intake = take_in(STORAGE, folder, blocks(sizes), QUERY_SCHEMA, Limits(unit, unit * groups), "key")
    assert intake.rows == sum(sizes)
    assert len({u.fingerprint for u in intake.units}) == len(intake.units)
    seen: list[str] = []
    for group in intake.groups:
        table = read_group(STORAGE, group)
        for task in group.todo:
            rows = [
                r["query_id"] for r in table.to_pylist() if 0 <= r["row_no"] - task.first_row < task.n_rows
            ]
            assert len(rows) == task.n_rows
            assert len(rows) <= unit or len(set(rows)) == 1  # only a single query may be larger
            assert not set(rows) & set(seen)
            seen += rows
    assert seen == [f"q{number}" for number, size in enumerate(sizes) for _ in range(size)]


def test_finished_units_are_not_taken_in_again_and_a_longer_input_keeps_its_beginning(tmp_path: Path) -> None:
    limits = Limits(2, 4)
    before = take_in(STORAGE, str(tmp_path), blocks([1] * 9), QUERY_SCHEMA, limits, "key")
    done = [unit for unit in before.units if unit.first_row == 0]
    for unit in done:
        STORAGE.write(part_uri(str(tmp_path), unit.fingerprint), b"anything")
    after = take_in(STORAGE, str(tmp_path), blocks([1] * 13), QUERY_SCHEMA, limits, "key")
    assert after.units[:4] == before.units[:4]
    assert {u.fingerprint for g in after.groups for u in g.todo}.isdisjoint(u.fingerprint for u in done)
    left = after.groups[0]
    assert [r["row_no"] for r in read_group(STORAGE, left).to_pylist()] == [2, 3]
    other = take_in(STORAGE, str(tmp_path), blocks([1] * 9), QUERY_SCHEMA, limits, "another key")
    assert {u.fingerprint for u in other.units}.isdisjoint(u.fingerprint for u in before.units)


def test_long_texts_close_a_group_early(tmp_path: Path) -> None:
    nothing = {name: [None] for name in ("vector_id", "score", "logit", "reason", "detail")}

    def long_lists() -> Iterator[Block]:
        for i in range(8):
            yield {
                "query_id": [str(i)],
                "query": ["q"],
                "passage_id": ["p"],
                "text": ["x" * (20 << 20)],
            } | nothing

    intake = take_in(STORAGE, str(tmp_path), long_lists(), CANDIDATE_SCHEMA, Limits(1, 1000), "key")
    assert [len(group.todo) for group in intake.groups] == [4, 4]
    assert pq.read_schema(pa.BufferReader(STORAGE.read(intake.groups[0].uri))).names == CANDIDATE_SCHEMA.names


POOLS = st.fixed_dictionaries(
    {},
    optional={
        "encoders": st.integers(1, 500),
        "searchers": st.integers(1, 500),
        "rerankers": st.integers(1, 500),
    },
).filter(bool)


@given(most=POOLS, cpus=st.integers(1, 2000), gpus=st.integers(0, 64), node=st.integers(1, 128))
def test_pools_and_tasks_always_fit_beside_each_other(
    most: dict[str, int], cpus: int, gpus: int, node: int
) -> None:
    sizes = size_pools(Settings(), most, float(cpus), float(gpus), float(min(node, cpus)))
    assert set(sizes.pools) == set(most)
    used = sum(p.count * p.cpus for p in sizes.pools.values())
    assert sum(p.count * p.gpus for p in sizes.pools.values()) <= gpus + 1e-6
    assert 0 < sizes.task_cpus <= 1
    # One task of each stage fits beside all actors, or a stage would wait for ever.
    assert used + TASK_STAGES * sizes.task_cpus <= cpus + 1e-3
    for name, pool in sizes.pools.items():
        assert 1 <= pool.count <= most[name]
        assert 0 < pool.cpus <= min(node, cpus)
        if gpus and name != "searchers":
            assert pool.device == "cuda"


def test_what_does_not_fit_is_refused_with_the_keys_to_change() -> None:
    settings = parse_settings(None, ["rerank.num_rerankers=3", "rerank.gpus_per_reranker=1"])
    with pytest.raises(SettingsError, match="need 3 GPUs, the cluster has 2"):
        size_pools(settings, {"rerankers": 10}, 16.0, 2.0, 16.0)


def test_both_models_share_a_single_gpu() -> None:
    most = {"encoders": 100, "searchers": 4, "rerankers": 100}
    sizes = size_pools(Settings(), most, 16.0, 1.0, 16.0)
    assert (sizes["encoders"].count, sizes["encoders"].gpus) == (1, 0.25)
    assert (sizes["rerankers"].count, sizes["rerankers"].gpus) == (1, 0.75)
    alone = size_pools(Settings(), {"rerankers": 100}, 64.0, 8.0, 64.0)
    assert (alone["rerankers"].count, alone["rerankers"].gpus) == (8, 1.0)
