"""Reading a finished data set back, and checking the guarantees that hold for every one."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.records.canonical import from_json
from bge_ray.records.dataset import Manifest
from bge_ray.storage.objects import Storage, join


def read_manifest(root: str) -> Manifest:
    return from_json(Manifest, Storage(10).read(join(root, "manifest.json")))


def read_shards(root: str, folder: str = "embeddings") -> pa.Table:
    """Read every shard of the manifest in order, checking size and sha256 of each file."""
    storage = Storage(10)
    tables = []
    for marker in read_manifest(root).shards:
        fact = marker.embeddings if folder == "embeddings" else marker.rejected
        if fact is None:
            continue
        data = storage.read(join(root, fact.path))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (fact.bytes, fact.sha256), fact.path
        tables.append(pq.read_table(pa.BufferReader(data)).replace_schema_metadata(None))
    return pa.concat_tables(tables) if tables else pa.table({})


def vectors_by_id(root: str) -> dict[str, np.ndarray]:
    """Return the vector of each passage id; ids must be distinct over the data set."""
    table = read_shards(root)
    flat = table["embedding"].combine_chunks()
    vectors = flat.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    ids = table["passage_id"].to_pylist()
    assert len(set(ids)) == len(ids)
    assert len(set(table["vector_id"].to_pylist())) == len(ids)
    return dict(zip(ids, vectors, strict=True))


def check_nothing_left_over(root: str) -> None:
    """No file is there that the manifest does not need, and no marker or lease is left."""
    manifest = read_manifest(root)
    live = {f.path for m in manifest.shards for f in (m.embeddings, m.rejected) if f}
    storage = Storage(10)
    for folder in ("embeddings", "rejected"):
        there = {f"{folder}/{i.uri.rpartition('/')[2]}" for i in storage.list_files(join(root, folder))}
        assert there == {p for p in live if p.startswith(folder)}
    assert storage.list_files(join(root, "done")) == []
    assert storage.read_optional(join(root, "lease.json")) is None
