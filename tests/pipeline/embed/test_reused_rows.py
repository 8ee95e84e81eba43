"""What travels past the encoder: where outputs come from, row by row, against a plain loop."""

import numpy as np
import pyarrow as pa
import pytest

from bge_ray.pipeline.embed.reuse import (
    KNOWN,
    LIKE,
    OBJECT,
    REPEATED,
    Reused,
    count_reused,
    settle_reused,
    with_reused,
)
from bge_ray.pipeline.embed.write import split_rows
from bge_ray.pipeline.engine.rows import spread, with_faults
from bge_ray.records.ids import vector_ids
from bge_ray.records.model import EMBEDDING
from tests.support.records import DIM, make_spec

SPEC = make_spec()
OUTPUT = SPEC.model.output(EMBEDDING)


def vectors(values: list[float]) -> pa.Array:
    flat = pa.array(np.repeat(np.asarray(values, np.float32), DIM))
    return pa.FixedSizeListArray.from_arrays(flat, type=OUTPUT.type())


@pytest.mark.parametrize("seed", range(8))
def test_every_row_has_the_outputs_and_the_fate_of_the_row_that_it_is_like(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_rows = 40
    at = np.sort(rng.choice(n_rows, 30, replace=False)).astype(np.int64)  # the others were rejected before
    m = len(at)
    texts = rng.integers(0, 12, m)
    like = np.array([int(np.flatnonzero(texts == text)[0]) for text in texts], np.int64)
    firsts = np.unique(like)
    places = np.sort(rng.choice(firsts, 4, replace=False)).astype(np.int64)
    known = pa.table({EMBEDDING: vectors([1000.0 + p for p in places])})
    origin = [OBJECT if like[i] in places else REPEATED if like[i] != i else None for i in range(m)]
    reused = Reused(like, places, known, pa.array(origin, pa.string()))
    assert reused.to_encode.tolist() == [i for i in firsts if i not in places]
    lengths = np.asarray([10 + i for i in reused.to_encode], np.int32)
    with_lengths = Reused(like, places, pa.table({"n_tokens": pa.array([7] * 4, pa.int32())}), reused.origin)
    settled = with_lengths.settled("n_tokens", reused.to_encode, lengths)
    assert settled.tolist() == [7 if like[i] in places else 10 + like[i] for i in range(m)]

    table = pa.table({"vector_id": pa.array(vector_ids(3, np.arange(n_rows)))})
    before = {int(row): ("empty_text", "nothing") for row in np.setdiff1d(np.arange(n_rows), at)}
    table = with_faults(with_reused(table, at, reused, SPEC), before)
    # Some of those that were encoded could not be.
    lost = set(rng.choice(reused.to_encode, 2, replace=False).tolist())
    encoded = vectors([float(i) for i in reused.to_encode])
    table = table.append_column(EMBEDDING, spread(encoded, at[reused.to_encode], n_rows))
    table = with_faults(table, {int(at[i]): ("killed_worker", f"row {i}") for i in lost})
    done = settle_reused(table, SPEC)
    reasons, values = done["reason"].to_pylist(), done[EMBEDDING].to_pylist()
    for i, row in enumerate(at.tolist()):
        first = int(like[i])
        if first in lost:
            assert reasons[row] == "killed_worker"
        else:
            assert reasons[row] is None
            assert values[row] == [1000.0 + first if first in places else float(first)] * DIM
    assert [reasons[row] for row in before] == ["empty_text"] * len(before)

    facts = {
        "passage_id": pa.array([str(n) for n in range(n_rows)]),
        "text_hash": pa.array([b"0" * 16] * n_rows, pa.binary(16)),
        "n_tokens": pa.array([5] * n_rows, pa.int32()),
        "truncated": pa.array([False] * n_rows),
    }
    for name, column in facts.items():
        done = done.append_column(name, column)
    shard, rejected = split_rows(SPEC, done)
    assert len(shard) + len(rejected) == n_rows
    kept = [i for i in range(m) if like[i] not in lost]
    counted = [origin[i] for i in kept if origin[i] is not None]
    assert count_reused(done, [shard["vector_id"]]) == {
        "rows_reused": len(counted),
        "tokens_reused": 5 * len(counted),
        **{f"vectors_{name}": counted.count(name) for name in (OBJECT, REPEATED) if name in counted},
    }


def test_a_table_of_which_nothing_is_reused_stays_as_it_is() -> None:
    table = pa.table({"vector_id": pa.array([0, 1])})
    nothing = Reused(np.arange(2), np.arange(0), pa.table({}), pa.nulls(2, pa.string()))
    at = np.arange(2)
    assert with_reused(table, at, nothing, SPEC) is table
    assert settle_reused(table, SPEC) is table
    assert count_reused(table, []) == {}
    assert not {LIKE, KNOWN + EMBEDDING} & set(table.column_names)


def test_a_corpus_row_counts_as_reused_if_none_of_its_chunks_was_encoded() -> None:
    ids = np.concatenate([vector_ids(0, np.full(2, row), np.arange(2)) for row in range(3)])
    origin = pa.array([OBJECT, REPEATED, OBJECT, None, None, None], pa.string())
    table = pa.table(
        {"vector_id": ids, "reuse:origin": origin, "n_tokens": pa.array([1, 2, 4, 8, 16, 32], pa.int32())}
    )
    counted = count_reused(table, [pa.chunked_array([ids[:4]]), pa.chunked_array([ids[4:]])])
    assert counted == {"rows_reused": 1, "tokens_reused": 7, "vectors_object": 2, "vectors_repeated": 1}
    assert count_reused(table, [pa.chunked_array([ids[2:]])])["tokens_reused"] == 4
