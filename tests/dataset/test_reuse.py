"""Texts found again in shards, by brute force; and what proves that a vector is theirs."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bge_ray.dataset.reuse import KnownTexts, hash_array, read_hashes, take_known
from bge_ray.records.dataset import FileFact
from bge_ray.records.plan import Unit
from bge_ray.records.schemas import REJECTED_SCHEMA, hash_texts
from bge_ray.storage.objects import Storage
from tests.support.records import make_spec, make_tables, make_writer

STORAGE = Storage(1)
SPEC = make_spec()


def write(root: Path, number: int, texts: list[str], spec=SPEC) -> tuple[FileFact, pa.Table]:
    """Write a shard whose rows have the given texts; returns it as it was written, too."""
    shard, _ = make_tables(spec)
    table = pa.concat_tables([shard] * (len(texts) // len(shard) + 1)).slice(0, len(texts))
    rng = np.random.default_rng(number)
    ids = np.arange(len(texts), dtype=np.int64) << 13
    flat = pa.array(rng.normal(size=len(texts) * 8).astype(np.float32))
    columns = {
        "vector_id": pa.array(ids + (number << 41)),
        "text_hash": hash_texts(texts),
        "n_tokens": pa.array(np.asarray([len(text) for text in texts], np.int32)),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, type=shard.schema.field("embedding").type),
    }
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), shard.schema.field(name), values)
    unit = Unit(number, 0, len(texts))
    marker = make_writer(STORAGE, str(root), spec).commit(unit, "f", table, REJECTED_SCHEMA.empty_table())
    assert marker.embeddings is not None
    return marker.embeddings, table


def test_what_is_found_is_what_looking_at_every_row_finds(tmp_path: Path) -> None:
    # 40,000 rows: more than one row group.
    texts = [[f"text {n % 37_000}" for n in range(40_000)], ["text 3", "only here", "text 3"]]
    shards = [write(tmp_path, number, some) for number, some in enumerate(texts)]
    facts = [fact for fact, _ in shards]
    hashes = read_hashes(STORAGE, str(tmp_path), facts)
    assert [len(some) for some in hashes] == [40_000, 3]
    known = KnownTexts.of(facts, hashes)
    wanted = ["text 3", "nowhere", "only here", "text 36999", "text 17000", "text 3"]
    at, found = take_known(STORAGE, str(tmp_path), SPEC, known, hash_array(hash_texts(wanted)))
    assert at.tolist() == [0, 2, 3, 4, 5]
    assert found.schema.names == ["embedding", "n_tokens", "truncated"]
    rows = pa.concat_tables([table for _, table in shards])
    stands = [text for some in texts for text in some]
    for place, row in zip(at.tolist(), found.to_pylist(), strict=True):
        [expected] = rows.slice(stands.index(wanted[place]), 1).select(found.schema.names).to_pylist()
        assert row == expected


def test_nothing_known_finds_nothing(tmp_path: Path) -> None:
    known = KnownTexts.of((), ())
    assert known.find(hash_array(hash_texts(["a", "b"]))).tolist() == [-1, -1]
    at, table = take_known(STORAGE, str(tmp_path), SPEC, known, hash_array(hash_texts(["a"])))
    assert (len(at), len(table)) == (0, 0)
    assert len(hash_array(hash_texts([]))) == 0


@pytest.mark.parametrize("fault", ["flipped", "gone", "foreign model", "another text"])
def test_a_shard_that_fails_its_proofs_gives_nothing_and_is_named(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"text {n}" for n in range(30)]
    fact, _ = write(tmp_path, 0, texts)
    good, _ = write(tmp_path, 1, ["text 40"])
    hashes = read_hashes(STORAGE, str(tmp_path), [fact, good])
    path, spec = tmp_path / fact.path, SPEC
    if fault == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    elif fault == "gone":
        path.unlink()
    elif fault == "foreign model":
        other = make_spec(max_length=8)
        fact, _ = write(tmp_path, 2, texts, other)
    else:
        hashes[0] = hashes[0][::-1]  # as if the index of texts were of another file
    known = KnownTexts.of([fact, good], hashes)
    with caplog.at_level(logging.WARNING):
        at, table = take_known(
            STORAGE, str(tmp_path), spec, known, hash_array(hash_texts([*texts[:9], "text 40"]))
        )
    assert (at.tolist(), len(table)) == ([9], 1)
    if fault != "another text":
        [record] = caplog.records
        assert fact.path in record.message and "embedded anew" in record.message
        assert "remove it" not in record.message  # this run has what it needs
    assert (
        read_hashes(STORAGE, str(tmp_path), [dataclasses.replace(fact, path="embeddings/none.parquet")])[
            0
        ].size
        == 0
    )
