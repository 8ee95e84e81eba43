"""What is held of shards is what they hold, is fetched once, and goes where there is no room for it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bge_ray.dataset.held import HeldShards, MappedTables
from bge_ray.dataset.lookup import ShardMap, find_passages, read_places
from bge_ray.dataset.read import COLUMNS, read_verified
from bge_ray.errors import DamagedShardError, StorageError
from bge_ray.storage.objects import Storage
from tests.support.counted import CountedStorage
from tests.support.vectors import VectorDataset, clustered

DIM = 8
SHARDS, ROWS = 5, 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ShardMap]:
    root = str(tmp_path_factory.mktemp("held"))
    dataset = VectorDataset(root, DIM)
    for number in range(SHARDS):
        names = [f"p{number}-{row}" for row in range(ROWS)]
        dataset.put(number, clustered(ROWS, DIM, number), names)
    return root, ShardMap.of(dataset.publish())


def held(made: tuple[str, ShardMap], tables: MappedTables | None = None) -> tuple[CountedStorage, HeldShards]:
    storage = CountedStorage()
    return storage, HeldShards(storage, *made, tables or MappedTables())


def all_ids(shards: ShardMap) -> np.ndarray:
    return np.concatenate([start + (np.arange(ROWS) << 13) for start in shards.starts.tolist()])


@pytest.mark.long
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(
        st.tuples(
            st.sets(st.integers(0, SHARDS * ROWS + 3), max_size=30),
            st.sampled_from([["passage_id"], ["embedding"], ["passage_id", "embedding"], ["text_hash"], []]),
        ),
        max_size=5,
    ),
    room=st.sampled_from([0, 3_000, 1 << 30]),
    most=st.sampled_from([1, 3, 100]),
)
def test_rows_are_those_of_the_shards_whatever_is_held(
    made: tuple[str, ShardMap], asked: list[tuple[set[int], list[str]]], room: int, most: int
) -> None:
    root, shards = made
    storage, mine = held(made, MappedTables(lambda: room, most))
    ids = np.append(all_ids(shards), [3, 1 << 50, (1 << 50) + 8, (1 << 50) + 16])
    for places, columns in asked:
        wanted = np.unique(ids[sorted(places)]) if places else np.empty(0, np.int64)
        truth = read_places(storage, root, shards, wanted, columns)
        assert mine.places(wanted, columns).equals(truth)


def test_each_byte_is_fetched_once(tmp_path: Path) -> None:
    dataset = VectorDataset(str(tmp_path), 64)
    for number in range(3):
        dataset.put(number, clustered(5_000, 64, number), [f"p{number}-{row}" for row in range(5_000)])
    made = str(tmp_path), ShardMap.of(dataset.publish())
    storage, mine = held(made)
    ids = np.concatenate([start + (np.arange(5_000) << 13) for start in made[1].starts.tolist()])
    for _ in range(3):
        for some in (ids, ids[::7], ids[5:60]):
            mine.places(some, ["passage_id"])
            mine.places(some, ["embedding", "passage_id"])
        mine.find(pa.array(["p1-3"]), "passage_id")
    # The end of each says where its columns lie: pyarrow reads 64 kB for it.
    for fact in made[1].facts:
        assert storage.bytes[f"{made[0]}/{fact.path}"] <= fact.bytes + (64 << 10)
    assert max(storage.ranges.values()) == 1
    before = sum(storage.bytes.values())
    for _ in range(2):
        assert sum(map(len, mine.whole(made[1].facts[0], COLUMNS))) == 5_000
        assert sum(storage.bytes.values()) - before == made[1].facts[0].bytes


def test_what_others_read_is_not_fetched(made: tuple[str, ShardMap]) -> None:
    """A search reads shards whole; who is asked for the rest of them afterwards has it from there."""
    searched, searcher = held(made)
    storage, mine = held(made)
    root, shards = made
    for fact in shards.facts:
        rows = searcher.whole(fact, COLUMNS, ["vector_id", "passage_id", "embedding"], mine.keep)
        assert sum(map(len, rows)) == ROWS
        assert [batch.schema.names for batch in rows] == [COLUMNS]
    assert sum(searched.bytes.values()) == sum(fact.bytes for fact in shards.facts)
    assert not storage.bytes
    ids, columns = all_ids(shards), ["passage_id", "embedding"]
    for _ in range(2):
        assert mine.places(ids, columns).equals(read_places(Storage(20), root, shards, ids, columns))
    # Only the end of each, which says where its columns lie; what was not handed over is fetched.
    assert len(storage.ranges) == len(shards.facts)
    assert mine.places(ids, ["text_hash"]).equals(read_places(Storage(20), root, shards, ids, ["text_hash"]))
    assert len(storage.ranges) > len(shards.facts)
    # Held already: nothing is read again, and nothing handed over again.
    for fact in shards.facts:
        searcher.whole(fact, COLUMNS, ["passage_id"], lambda *_: pytest.fail("handed over twice"))


def test_values_are_found_as_they_are_without_being_held(made: tuple[str, ShardMap]) -> None:
    root, shards = made
    storage, mine = held(made)
    wanted = pa.array(["p4-0", "nobody", "p0-39", "p2-7"])
    positions, ids = mine.find(wanted, "passage_id")
    truth = [find_passages(storage, root, fact, wanted) for fact in shards.facts]
    assert positions.tolist() == [place for places, _ in truth for place in places.tolist()]
    assert ids.tolist() == [found for _, some in truth for found in some.tolist()]
    assert sorted(positions.tolist()) == [0, 2, 3]


def test_what_was_not_asked_for_the_longest_goes_first() -> None:
    def table(value: int) -> pa.Table:
        return pa.table({"x": np.full(1000, value)})

    there: list[str] = []
    tables = MappedTables(lambda: 20_000 - 8_000 * len(there))

    def hold(*keys: str) -> Sequence[bool]:
        there[:] = [key for key in "abcd" if tables.get(key) is not None]
        return [key in there for key in keys]

    tables.put("a", table(1))
    tables.put("b", table(2))
    hold()
    tables.get("b")
    tables.get("a")
    # No room for a third: of the two, b was asked for before a. Room comes as they go.
    room = iter([4_000, 12_000])
    tables._room = lambda: next(room)
    tables.put("c", table(3))
    assert hold("a", "b", "c") == [True, False, True]
    tables._room = lambda: 0
    assert tables.put("d", table(4)).equals(table(4))
    assert hold("a", "c", "d") == [False, False, False]


def test_nothing_is_left_on_the_disk(made: tuple[str, ShardMap], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, mine = held(made)
    assert len(mine.places(all_ids(made[1]), ["embedding"])) == SHARDS * ROWS
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_gone_or_another_is_named(tmp_path: Path) -> None:
    dataset = VectorDataset(str(tmp_path), DIM)
    dataset.put(0, clustered(ROWS, DIM, 0))
    shards = ShardMap.of(dataset.publish())
    path = tmp_path / shards.facts[0].path
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    for ask in (
        lambda mine: mine.places(all_ids(shards), ["embedding"]),
        lambda mine: mine.find(pa.array(["x"]), "passage_id"),
        lambda mine: mine.whole(shards.facts[0], COLUMNS),
    ):
        with pytest.raises(DamagedShardError, match=shards.facts[0].path):
            ask(HeldShards(Storage(20), str(tmp_path), shards, MappedTables()))
    path.write_bytes(data)
    assert read_verified(Storage(20), str(tmp_path), shards.facts[0]) == data
    path.unlink()
    with pytest.raises(StorageError, match=shards.facts[0].path):
        HeldShards(Storage(20), str(tmp_path), shards, MappedTables()).places(all_ids(shards), [])


def test_no_more_are_held_than_may_be() -> None:
    tables = MappedTables(most=3)
    for number in range(5):
        tables.put(number, pa.table({"x": [number]}))
        tables.get(0)
    assert [n for n in range(5) if tables.get(n) is not None] == [0, 3, 4]


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/dev/full")  # no folder, as a disk that takes nothing
    with pytest.raises(StorageError, match=r"/dev/full: 8 bytes of a shard could not be held.*TMPDIR"):
        MappedTables(lambda: 1 << 30).put("a", pa.table({"x": [1]}))
