"""Which rows a graph is measured with follows from its shards alone, and is never all of them."""

import hashlib

import numpy as np
import pytest

from bge_ray.pipeline.index.heldout import SHARE, held_rows
from bge_ray.records.dataset import FileFact


def fact(number: int, rows: int) -> FileFact:
    return FileFact(f"{number}", 1, hashlib.sha256(str(number).encode()).hexdigest(), rows)


def test_a_twentieth_of_the_rows_stays_out_and_other_shards_change_nothing() -> None:
    shards = [fact(number, 10_000) for number in range(4)]
    chosen = held_rows(shards)
    assert sum(map(len, chosen)) / 40_000 == pytest.approx(SHARE, abs=0.005)
    for rows in chosen:
        assert (np.diff(rows) > 0).all()
        assert rows.max() < 10_000
    (alone,) = held_rows(shards[2:3])
    np.testing.assert_array_equal(alone, chosen[2])
    assert not np.array_equal(chosen[0], chosen[1])


def test_many_shards_of_one_row_give_queries_too_and_one_row_alone_stays_in() -> None:
    ones = [fact(number, 1) for number in range(2000)]
    assert sum(map(len, held_rows(ones))) / 2000 == pytest.approx(SHARE, abs=0.02)
    assert all(not len(rows) for one in ones for rows in held_rows([one]))
