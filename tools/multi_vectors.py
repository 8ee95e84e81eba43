"""How fast a column of several float16 vectors a row writes to Parquet and reads back, by its Arrow type.

`python tools/multi_vectors.py [MB]` prints the table that decision 21 rests on: best of three, from Arrow in
memory to a Parquet file in memory and from there to numpy, for each compression.
"""

import io
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

DIM = 1024
TOKENS = 100
HALF = pa.field("element", pa.float16(), nullable=False)
Halves = npt.NDArray[np.float16]


def of_binary(flat: Halves, offsets: pa.Array) -> pa.Array:
    """Return vectors as the bytes of their numbers."""
    kind = pa.binary(2 * DIM)
    vectors = pa.Array.from_buffers(kind, len(flat) // DIM, [None, pa.py_buffer(flat)])
    field = pa.field("element", kind, nullable=False)
    return pa.ListArray.from_arrays(offsets, vectors, type=pa.list_(field))


def of_lists(flat: Halves, offsets: pa.Array) -> pa.Array:
    """Return vectors as lists of numbers."""
    kind = pa.list_(HALF, DIM)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind)
    field = pa.field("element", kind, nullable=False)
    return pa.ListArray.from_arrays(offsets, vectors, type=pa.list_(field))


def of_rows(flat: Halves, offsets: pa.Array) -> pa.Array:
    """Return one binary a row, of any length."""
    borders = offsets.to_numpy().astype(np.int64) * 2 * DIM
    cells = [None, pa.py_buffer(borders), pa.py_buffer(flat)]
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, cells)


def from_binary(column: pa.Array) -> Halves:
    """Return (total, dim) of `of_binary`, a view."""
    return np.frombuffer(column.values.buffers()[1], np.float16).reshape(-1, DIM)


def from_lists(column: pa.Array) -> Halves:
    """Return (total, dim) of `of_lists`, a view."""
    halves: Halves = column.values.values.to_numpy().reshape(-1, DIM)
    return halves


def from_rows(column: pa.Array) -> Halves:
    """Return (total, dim) of `of_rows`, a view."""
    return np.frombuffer(column.buffers()[2], np.float16).reshape(-1, DIM)


TYPES: dict[str, tuple[Callable[[Halves, pa.Array], pa.Array], Callable[[pa.Array], Halves]]] = {
    "list<fixed_size_binary[2048]>": (of_binary, from_binary),
    "list<fixed_size_list<half not null>[1024]>": (of_lists, from_lists),
    "large_binary a row": (of_rows, from_rows),
}


def write(column: pa.Array, compression: str) -> bytes:
    """Return a column as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(
        pa.table({"x": column}), buffer, compression=compression, use_dictionary=False, write_statistics=False
    )
    return buffer.getvalue()


def read(data: bytes, view: Callable[[pa.Array], Halves]) -> Halves:
    """Return (total, dim) of a Parquet file."""
    column = pq.read_table(pa.BufferReader(data), use_threads=False)["x"].combine_chunks()
    return view(column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks))


def best_s(do: Callable[[], object]) -> float:
    """Return the seconds of the best of three calls."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        do()
        times.append(time.perf_counter() - started)
    return min(times)


def tell(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(megabytes: int) -> None:
    """Measure, and print the table."""
    rows = megabytes * 1_000_000 // (2 * DIM * TOKENS)
    states = np.random.default_rng(0).standard_normal((rows * TOKENS, DIM), np.float32)
    vectors = (states / np.linalg.norm(states, axis=1, keepdims=True)).astype(np.float16)
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * np.int32(TOKENS))
    size = vectors.nbytes / 1e6
    tell(f"{rows} rows of {TOKENS} vectors, {size:,.0f} MB; MB/s\n")
    tell("| column | compression | write | read | stored |\n|---|---|---|---|---|")
    for name, (build, view) in TYPES.items():
        column = build(vectors.reshape(-1), offsets)
        for compression in ("none", "zstd"):
            data = write(column, compression)
            if not np.array_equal(read(data, view), vectors):
                raise ValueError(f"{name}: what was read is not what was written")
            writing = size / best_s(partial(write, column, compression))
            reading = size / best_s(partial(read, data, view))
            share = len(data) / vectors.nbytes
            tell(f"| `{name}` | {compression} | {writing:,.0f} | {reading:,.0f} | {share:.0%} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
