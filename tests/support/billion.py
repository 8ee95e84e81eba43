"""What a search of 10^9 vectors asks the store for: the product's own holders over shards that are made up.

    python -m tests.support.billion --shards 15259 --queries 10000 --holders 64

A shard is one that `write_shard` wrote, with the vector ids of another object put into its bytes when a range
of it is read; vectors have two numbers, because what counts is how often, and how much of a file, is read.
Candidates are drawn from all vectors alike, which touches the most row groups: real ones lie closer together.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.spec import AbstractFileSystem

from bge_ray.dataset.held import HeldShards, MappedTables
from bge_ray.dataset.lookup import ShardMap
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import id_range, vector_ids
from bge_ray.storage.objects import Storage

ROWS, GROUP_ROWS, DIM = 65_536, 16_384, 2
COLUMNS = {"passage ids": ["passage_id"], "vectors": ["embedding"]}


@lru_cache(1)
def template() -> bytes:
    """A shard of object 0, whose numbers stand in its bytes as they are."""
    table = pa.table(
        {
            "vector_id": vector_ids(0, np.arange(ROWS)),
            "passage_id": [f"passage-{row:012d}" for row in range(ROWS)],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(np.ones(ROWS * DIM, np.float16)), DIM),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=GROUP_ROWS, compression="none", use_dictionary=False)
    return bytes(sink.getvalue())


@lru_cache(4)
def shard(object_no: int) -> bytes:
    """The same shard of another object: each group's ids, and the smallest and largest of its statistics."""
    data, metadata = bytearray(template()), pq.ParquetFile(pa.BufferReader(template())).metadata
    old, new = vector_ids(0, np.arange(ROWS)), vector_ids(object_no, np.arange(ROWS))
    for group in range(metadata.num_row_groups):
        rows = slice(group * GROUP_ROWS, (group + 1) * GROUP_ROWS)
        place = data.index(old[rows].tobytes())
        data[place : place + 8 * GROUP_ROWS] = new[rows].tobytes()
    footer = len(data) - int.from_bytes(data[-8:-4], "little") - 8
    for group in range(metadata.num_row_groups):
        for row in (group * GROUP_ROWS, (group + 1) * GROUP_ROWS - 1):
            tail = bytes(data[footer:]).replace(b"\x08" + old[row].tobytes(), b"\x08" + new[row].tobytes())
            data[footer:] = tail
    return bytes(data)


class MadeUp(AbstractFileSystem):
    """Shards by their numbers; counts what is read of them."""

    protocol = "madeup"
    read: ClassVar[Counter[str]] = Counter()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        found = shard(int(Path(path).stem))[start:end]
        self.read["requests"] += 1
        self.read["bytes"] += len(found)
        return found


def facts(n_shards: int) -> ShardMap:
    size = len(template())
    ranges = np.array([id_range(number, 0, ROWS) for number in range(n_shards)], np.int64)
    files = (
        FileFact(path=f"{number}.parquet", bytes=size, sha256="0" * 64, rows=ROWS)
        for number in range(n_shards)
    )
    return ShardMap(ranges[:, 0].copy(), ranges[:, 1].copy(), tuple(files))


def drawn(n_shards: int, n_ids: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    objects, rows = rng.integers(0, n_shards, n_ids), rng.integers(0, ROWS, n_ids)
    return np.unique(vector_ids(objects, rows))


def simulate(
    n_shards: int, n_queries: int, candidates: int, groups: int, holders: int
) -> Iterator[dict[str, Any]]:
    """Ask each holder in turn what each group of queries would ask it; yields a line a group."""
    fsspec.register_implementation("madeup", MadeUp, clobber=True)
    shards, total = facts(n_shards), Counter[tuple[int, str, str]]()
    asked = [drawn(n_shards, n_queries * candidates // groups, seed) for seed in range(groups)]
    for number in range(holders):
        held = HeldShards(Storage(30), "madeup://data", shards.every(holders, number), MappedTables())
        for group, ids in enumerate(asked):
            mine = ids[shards.numbers(ids) % holders == number]
            for name, columns in COLUMNS.items():
                MadeUp.read.clear()
                table = held.places(mine, columns)
                assert np.array_equal(table["vector_id"].to_numpy(), mine)
                for kind, count in MadeUp.read.items():
                    total[group, name, kind] += count
        print(f"holder {number + 1} of {holders}", flush=True)
    for group in range(groups):
        line = {"group": group, "ids": len(asked[group])}
        for name in COLUMNS:
            line |= {f"{name}: {kind}": total[group, name, kind] for kind in ("requests", "bytes")}
        yield line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=15_259)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--candidates", type=int, default=400)
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--holders", type=int, default=64)
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        lines = list(simulate(asked.shards, asked.queries, asked.candidates, asked.groups, asked.holders))
    for line in lines:
        print(json.dumps(line))
    size, seconds = len(template()) * asked.shards, time.monotonic() - began
    print(f"{asked.shards * ROWS:,} vectors, {size:,} bytes, {seconds:.0f} s")


if __name__ == "__main__":
    main()
