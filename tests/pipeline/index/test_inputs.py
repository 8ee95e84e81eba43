"""What an index is made from is settled, or refused with what can be had instead."""

import re

import pytest

from bge_ray.errors import SettingsError
from bge_ray.pipeline.index.inputs import settle_spec
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec
from bge_ray.settings.sections import parse_settings
from tests.support.vectors import MODEL

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
