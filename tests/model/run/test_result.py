"""Ragged outputs as columns: what they take of memory, and lists that Arrow cannot count."""

import tracemalloc

import numpy as np
import pytest

from bge_ray.errors import ModelError
from bge_ray.model.run.result import Block, Result, list_offsets
from bge_ray.records.arrays import multi_rows
from bge_ray.records.outputs import Output


def test_offsets_up_to_what_32_bits_count() -> None:
    lengths = np.array([0, 2**30, 2**30 - 1, 0])
    assert list_offsets(lengths, "colbert").to_pylist() == [0, 0, 2**30, 2**31 - 1, 2**31 - 1]
    assert list_offsets(np.zeros(0, np.int64), "colbert").to_pylist() == [0]
    with pytest.raises(ModelError, match=r"colbert: 4 rows have 2,147,483,648 values.*batching\.unit_bytes"):
        list_offsets(lengths + np.array([1, 0, 0, 0]), "colbert")


def test_a_unit_takes_twice_its_bytes_beside_its_blocks() -> None:
    """Blocks come longest first and are put in row order: one copy of all, one of what is taken from it."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 400)
    result = Result([Output("colbert", "multi", 512, "float16")], len(lengths))
    order = np.argsort(-lengths, kind="stable")
    total = 0
    for rows in np.array_split(order, 7):
        vectors = np.repeat(rows, lengths[rows]).astype(np.float16)[:, None] * np.ones(512, np.float16)
        result.put(rows, [Block(vectors, np.ones(len(rows), np.float32), lengths[rows])])
        total += vectors.nbytes
    tracemalloc.start()
    column = result.columns()["colbert"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.2 * total
    found = multi_rows(column, "float16")
    np.testing.assert_array_equal(found.vectors[:, 0], np.repeat(np.arange(400), lengths))
