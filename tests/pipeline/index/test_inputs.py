"""What an index is made from is settled, or refused with what can be had instead."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bge_ray.errors import SettingsError
from bge_ray.pipeline.engine.pools import PoolRequest
from bge_ray.pipeline.index import job
from bge_ray.pipeline.index.inputs import read_inputs, settle_spec
from bge_ray.pipeline.index.job import build_index
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec
from bge_ray.settings.sections import Settings, parse_settings
from tests.support.vectors import MODEL, make_dataset

DATASET = DatasetSpec(MODEL, Columns("id", "text", None))


# With the rows that each trains on with one list: 39 a centroid, of which a PQ has one a code.
FACTORIES = [
    ("IVF1,Flat", 39),
    ("IVF64,SQ8", 39),
    ("RR,IVF256,RaBitQ", 39),
    ("IVF4,PQ8", 39 * 256),
    ("IVF64,PQ8x4", 39 * 16),
]


@pytest.mark.parametrize("n_vectors", [1, 30, 38, 39, 77, 500, 1000])
@pytest.mark.parametrize(("factory", "least"), FACTORIES)
def test_what_is_named_instead_of_a_factory_can_be_built(factory: str, least: int, n_vectors: int) -> None:
    def settle(asked: str) -> None:
        settle_spec(DATASET, n_vectors, parse_settings(None, [f"index.factory={asked}"]), None)

    try:
        settle(factory)
    except SettingsError as error:
        named = re.search(r"such as (\S+)$", str(error))
        for instead in ("auto", "Flat", *([named[1]] if named else [])):
            settle(instead)
        assert (named is not None) == (n_vectors >= least)


def test_a_training_that_is_there_needs_no_rows_unless_another_is_asked_for() -> None:
    """A data set that shrank below what a training takes is indexed with the one that it has."""
    factory, n_vectors = "IVF64,SQ8", 500
    keys = [f"index.factory={factory}"]
    assert settle_spec(DATASET, n_vectors, parse_settings(None, keys), factory)[0].factory == factory
    for more, trained in (([], "IVF32,SQ8"), ([], None), (["index.retrain=true"], factory)):
        with pytest.raises(SettingsError, match=r"needs at least 2,496 vectors to train on, there are 500"):
            settle_spec(DATASET, n_vectors, parse_settings(None, [*keys, *more]), trained)


class NodesWereAwaited(Exception):
    """The build would wait for them here."""


def test_gpus_that_no_node_has_yet_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(str(tmp_path), [300], 16)
    asked: list[PoolRequest] = []

    def await_pools(_: Settings, pools: Sequence[PoolRequest], watch: Callable[[], None]) -> None:
        asked.extend(pools)
        raise NodesWereAwaited

    monkeypatch.setattr(job, "await_pools", await_pools)
    settings = parse_settings(None, [f"output.uri={tmp_path}", "index.factory=Flat", "index.gpus_per_task=1"])
    with pytest.raises(NodesWereAwaited):
        build_index(settings)
    assert [(pool.key, pool.count, pool.gpus) for pool in asked] == [("index.gpus_per_task", 1, 1.0)]


def test_an_instruction_for_the_users_queries_is_in_the_key(tmp_path: Path) -> None:
    """It makes other vectors of them, and with them another effort."""
    root, queries = str(tmp_path / "out"), tmp_path / "q.jsonl"
    queries.write_text('{"_id": "1", "text": "?"}\n')
    dataset = make_dataset(root, [300], 16).dataset

    def key(*more: str) -> str:
        keys = [f"output.uri={root}", "index.factory=Flat", *more]
        return read_inputs(dataset, parse_settings(None, keys)).key

    given, other = f"index.queries={queries}", "model.query_instruction=find: "
    assert len({key(), key(given), key(given, other)}) == 3
    assert key(other) == key()  # without queries of the user's nobody is given one
