"""Actors that share the shards answer as one that has all of them, also when they are killed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.dataset.lookup import ShardMap
from bge_ray.errors import DamagedShardError
from bge_ray.pipeline.runs.holders import Holders, RowHolder, start_holders
from bge_ray.storage.objects import Storage
from tests.support.vectors import VectorDataset, clustered

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

DIM, SHARDS, ROWS = 8, 5, 30


def read_schema(shard: Path) -> pa.Schema:
    schema = pq.read_schema(shard).remove_metadata()
    return pa.schema([schema.field("vector_id"), schema.field("passage_id")])


def checked(holders: Holders, alone: RowHolder, ids: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted = np.unique(rng.choice(ids, 40))
    for columns in (["passage_id"], ["embedding", "text_hash"]):
        assert holders.places(wanted, columns).equals(alone.places(wanted, columns))
    queries = clustered(6, DIM, 99)
    numbers, asked = rng.integers(0, 6, 200), rng.choice(ids, 200)
    mine = holders.exact_scores(queries, numbers, asked)
    assert np.array_equal(mine, alone.exact_scores(queries, numbers, asked))
    assert not np.isnan(mine).any()
    names = pa.array(["p0-3", "p4-29", "nobody", "p2-0"])
    found, truth = holders.find(names, "passage_id"), alone.find(names, "passage_id")
    assert sorted(zip(*map(list, found), strict=True)) == sorted(zip(*map(list, truth), strict=True))


def test_together_they_are_one_and_a_killed_one_answers_again(tmp_path: Path) -> None:
    import ray

    dataset = VectorDataset(str(tmp_path), DIM)
    for number in range(SHARDS):
        vectors = clustered(ROWS, DIM, number)
        dataset.put(number, vectors, [f"p{number}-{row}" for row in range(ROWS)])
    shards = ShardMap.of(dataset.publish())
    ids = np.concatenate([start + (np.arange(ROWS) << 13) for start in shards.starts.tolist()])
    alone = RowHolder(Storage(20), str(tmp_path), shards)
    holders = start_holders(Storage(20), str(tmp_path), shards, 3)
    try:
        assert len(holders.actors) == 3
        checked(holders, alone, ids, 0)
        for actor in holders.actors[:2]:
            ray.kill(actor, no_restart=False)
        checked(holders, alone, ids, 1)
        # What others have read goes to whose shard it is, and comes back from there.
        fact = shards.facts[3]
        names = [f"other-{row}" for row in range(ROWS)]
        other = pa.table([ids[3 * ROWS : 4 * ROWS], names], schema=read_schema(tmp_path / fact.path))
        taker = start_holders(Storage(20), str(tmp_path), shards, 3)
        taker.keep(fact, 0, other)
        told = taker.places(ids[2 * ROWS : 4 * ROWS], ["passage_id"])["passage_id"].to_pylist()
        assert told == [*(f"p2-{row}" for row in range(ROWS)), *names]
        taker.stop()
        # Ids of no shard have no row.
        beyond = np.array([3, 5 << 41, 1 << 60], np.int64)
        assert len(holders.places(beyond, ["passage_id"])) == 0
        # What is damaged is said in the words of who read it.
        path = tmp_path / shards.facts[4].path
        path.write_bytes(path.read_bytes()[:-100] + bytes(100))
        fresh = start_holders(Storage(20), str(tmp_path), shards, 2)
        with pytest.raises(DamagedShardError, match=shards.facts[4].path):
            fresh.places(ids, ["embedding"])
        fresh.stop()
    finally:
        holders.stop()
