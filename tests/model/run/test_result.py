"""Lists that Arrow cannot count are refused, not wrapped around."""

import numpy as np
import pytest

from bge_ray.errors import ModelError
from bge_ray.model.run.result import list_offsets


def test_offsets_up_to_what_32_bits_count() -> None:
    lengths = np.array([0, 2**30, 2**30 - 1, 0])
    assert list_offsets(lengths, "colbert").to_pylist() == [0, 0, 2**30, 2**31 - 1, 2**31 - 1]
    assert list_offsets(np.zeros(0, np.int64), "colbert").to_pylist() == [0]
    with pytest.raises(ModelError, match=r"colbert: 4 rows have 2,147,483,648 values.*batching\.unit_bytes"):
        list_offsets(lengths + np.array([1, 0, 0, 0]), "colbert")
