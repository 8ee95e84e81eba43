"""Columns of outputs come back as arrays, whole, sliced, in several chunks, or without a row."""

import numpy as np
import pyarrow as pa
import pytest

from bge_ray.records.arrays import dense_rows, multi_rows, sparse_rows
from bge_ray.records.outputs import Output

DENSE, SPARSE = Output("embedding", "dense", 3, "float16"), Output("sparse", "sparse", 99, "float16")
MULTI = Output("colbert", "multi", 3, "float16")
VECTORS = [np.arange(3 * n, dtype=np.float16).reshape(n, 3) + n for n in (2, 0, 1, 4)]
WEIGHTS = [{5: 0.5, 9: 1.5}, {}, {7: 0.25}, {0: 1.0, 98: 2.0}]


def column(output: Output) -> pa.Array:
    values: dict[str, list[object]] = {
        "dense": [[i, i + 1, i + 2] for i in range(4)],
        "sparse": [{"indices": list(w), "values": list(w.values())} for w in WEIGHTS],
        "multi": [[vector.tobytes() for vector in row] for row in VECTORS],
    }
    return pa.array(values[output.kind], output.type())


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (1, 4), (2, 3), (1, 2), (4, 4)])
@pytest.mark.parametrize("chunked", [False, True])
def test_of_slices_and_chunks(start: int, stop: int, chunked: bool) -> None:
    def taken(output: Output) -> pa.Array | pa.ChunkedArray:
        array = column(output)
        if not chunked:
            return array.slice(start, stop - start)
        return pa.chunked_array([array.slice(0, 3), array.slice(3)]).slice(start, stop - start)

    assert dense_rows(taken(DENSE)).tolist() == [[i, i + 1, i + 2] for i in range(start, stop)]
    weights = sparse_rows(taken(SPARSE))
    assert len(weights) == stop - start
    for i, (a, b) in enumerate(zip(weights.offsets[:-1], weights.offsets[1:], strict=True)):
        found = dict(zip(weights.indices[a:b].tolist(), weights.values[a:b].tolist(), strict=True))
        assert found == WEIGHTS[start + i]
    rows = multi_rows(taken(MULTI), "float16")
    assert len(rows) == stop - start
    for i, (a, b) in enumerate(zip(rows.offsets[:-1], rows.offsets[1:], strict=True)):
        np.testing.assert_array_equal(rows.vectors[a:b], VECTORS[start + i])


def test_without_a_chunk() -> None:
    def nothing(output: Output) -> pa.ChunkedArray:
        return pa.chunked_array([], output.type())

    assert dense_rows(nothing(DENSE)).shape == (0, 3)
    assert len(sparse_rows(nothing(SPARSE))) == len(multi_rows(nothing(MULTI), "float16")) == 0


def test_a_whole_column_is_not_copied() -> None:
    array = column(MULTI)
    vectors = multi_rows(array, "float16").vectors
    assert vectors.ctypes.data == array.values.buffers()[1].address


@pytest.mark.parametrize("rows", [[3, 0, 0], [1], [], [2, 1, 3, 0]])
def test_some_rows_in_another_order(rows: list[int]) -> None:
    some = np.array(rows, np.int64)
    weights = sparse_rows(column(SPARSE))[some]
    assert weights.offsets.tolist() == np.cumsum([0, *(len(WEIGHTS[i]) for i in rows)]).tolist()
    pairs = zip(weights.indices.tolist(), weights.values.tolist(), strict=True)
    assert list(pairs) == [pair for i in rows for pair in WEIGHTS[i].items()]
    vectors = multi_rows(column(MULTI), "float16")[some]
    assert vectors.offsets.tolist() == np.cumsum([0, *(len(VECTORS[i]) for i in rows)]).tolist()
    assert vectors.vectors.tolist() == [vector for i in rows for vector in VECTORS[i].tolist()]
