"""A flipped bit of a shard, which changes no size: whoever reads it sees it, whole or in part."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.dataset.lookup import ShardMap, find_passages, read_places
from bge_ray.dataset.read import read_columns, read_vectors, sample_vectors
from bge_ray.errors import DamagedShardError
from bge_ray.records.dataset import make_manifest
from bge_ray.storage.objects import Storage
from tests.support.records import FINGERPRINT, UNIT, make_spec, make_tables, make_writer


@pytest.mark.parametrize("column", ["vector_id", "passage_id", "embedding"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_flipped_bit_is_seen_by_every_reader(
    storage: Storage, tmp_path: Path, column: str, compression: str
) -> None:
    root, spec = str(tmp_path), make_spec()
    writer = dataclasses.replace(make_writer(storage, root, spec), compression=compression)
    marker = writer.commit(UNIT, FINGERPRINT, *make_tables(spec, bad=()))
    fact = marker.embeddings
    shards = ShardMap.of(make_manifest("f", [marker]))
    path = tmp_path / fact.path
    ids = pq.read_table(path)["vector_id"].to_numpy()

    def readings() -> list:
        return [
            lambda: list(read_vectors(storage, root, fact)),
            lambda: sample_vectors(storage, root, fact, {0: [0, 1]}),
            lambda: read_places(storage, root, shards, ids, ["passage_id", "embedding"]),
            lambda: find_passages(storage, root, fact, pa.array(["p1"])),
        ]

    for reading in readings():
        reading()
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunk = next(
        c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.startswith(column)
    )
    data = bytearray(path.read_bytes())
    # The last byte of the column's pages is one of its values, compressed or not.
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start + chunk.total_compressed_size - 1] ^= 4
    path.write_bytes(bytes(data))
    reads = {"vector_id": [0, 1, 2, 3], "passage_id": [0, 2, 3], "embedding": [0, 1, 2]}[column]
    for number in reads:
        with pytest.raises(DamagedShardError, match=fact.path):
            readings()[number]()


def test_a_whole_shard_of_another_state_is_no_shard_of_this_one(storage: Storage, tmp_path: Path) -> None:
    """Of the same size, with good checksums of its own: what is read in part goes by the file's end."""
    spec, markers = make_spec(), []
    for folder, fingerprint in (("here", FINGERPRINT), ("elsewhere", "e" * 64)):
        writer = make_writer(storage, str(tmp_path / folder), spec)
        markers.append(writer.commit(UNIT, fingerprint, *make_tables(spec, bad=())))
    fact, other = markers[0].shard, markers[1].shard
    assert fact.bytes == other.bytes
    shards, root = ShardMap.of(make_manifest("f", markers[:1])), str(tmp_path / "here")
    ids = pq.read_table(tmp_path / "here" / fact.path)["vector_id"].to_numpy()
    (tmp_path / "here" / fact.path).write_bytes((tmp_path / "elsewhere" / other.path).read_bytes())
    readings = [
        lambda: list(read_vectors(storage, root, fact)),
        lambda: sample_vectors(storage, root, fact, {0: [0, 1]}),
        lambda: list(read_columns(storage, root, fact, ["vector_id"])),
        lambda: read_places(storage, root, shards, ids, ["passage_id"]),
        lambda: find_passages(storage, root, fact, pa.array(["p1"])),
    ]
    for reading in readings:
        with pytest.raises(DamagedShardError, match=fact.path):
            reading()
