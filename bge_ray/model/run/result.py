"""Results of n rows on the host: each output in its stored dtype, and why some rows have none. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bge_ray.errors import ModelError
from bge_ray.records.ids import FloatArray, IdArray
from bge_ray.records.outputs import Output

MOST_ENTRIES = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Block:
    """One output of some rows, as a forward pass gave it, in its stored dtype.

    ``values`` is (rows, dim) of a dense output and (rows,) of a scalar. With ``lengths`` (rows,) the rows
    have different amounts: (total, dim) of a multi-vector, (total,) of a sparse output with ``indices``.
    ``largest`` is (rows,) float32, the largest size of a row's numbers before they were stored, NaN if one
    was no number, and 0 of a row that has none.
    """

    values: npt.NDArray[np.floating[Any]]
    largest: FloatArray
    lengths: IdArray | None = None
    indices: npt.NDArray[np.int32] | None = None

    def beyond(self, limit: float) -> npt.NDArray[np.bool_]:
        """(rows,) whether a number of the row is larger than a limit in size, or no number at all."""
        return np.asarray(~(self.largest <= limit))


class Result:
    """Outputs of n rows, filled batch by batch.

    ``faults`` maps a row to its reason and detail: it has no output. ``padded_tokens`` counts what was
    computed, padding included, ``busy_s`` the seconds it took, ``splits`` the batches that did not fit in
    memory and were halved.
    """

    def __init__(self, outputs: Sequence[Output], n_rows: int) -> None:
        self.outputs = tuple(outputs)
        self.faults: dict[int, tuple[str, str]] = {}
        self.batches = 0
        self.padded_tokens = 0
        self.busy_s = 0.0
        self.splits = 0
        self._n_rows = n_rows
        self._fixed = {
            o.name: np.zeros((n_rows, o.dim) if o.kind == "dense" else n_rows, dtype=o.dtype)
            for o in self.outputs
            if o.kind in ("dense", "scalar")
        }
        self._ragged: dict[str, list[tuple[IdArray, Block]]] = {
            o.name: [] for o in self.outputs if o.name not in self._fixed
        }

    def __len__(self) -> int:
        return self._n_rows

    def put(self, rows: IdArray, blocks: Sequence[Block]) -> IdArray:
        """Store one block an output for the given rows.

        A row that is finite and beyond what its stored dtype holds becomes a fault.

        Returns:
            The rows of which an output is not finite, which are left as they were.
        """
        infinite = np.zeros(len(rows), dtype=np.bool_)
        for block in blocks:
            infinite |= block.beyond(float(np.finfo(np.float32).max))
        good = ~infinite
        for output, block in zip(self.outputs, blocks, strict=True):
            if output.dtype == "float32":
                continue
            limit = np.finfo(output.dtype).max
            over = block.beyond(float(limit)) & ~infinite
            for row in rows[over].tolist():
                detail = f"a component of {output.name} exceeds {limit}, the largest {output.dtype}"
                self.faults[row] = ("non_finite", detail)
            good &= ~over
        all_good = bool(good.all())
        for output, block in zip(self.outputs, blocks, strict=True):
            if output.name in self._fixed:
                # Choosing all of them would copy them once more, while a device waits for its next batch.
                places, values = (rows, block.values) if all_good else (rows[good], block.values[good])
                self._fixed[output.name][places] = values
            else:
                self._ragged[output.name].append((rows[good], _of_rows(block, good)))
        return rows[infinite]

    def array(self, name: str) -> npt.NDArray[np.floating[Any]]:
        """Return (n, dim) of a dense output, (n,) of a scalar; zero for rows in ``faults`` or in no batch."""
        return self._fixed[name]

    def columns(self) -> dict[str, pa.Array]:
        """Return each output as a column of n rows; dense ones are views, and rows in ``faults`` are null.

        Rows in no batch are zero, or empty.
        """
        null = np.zeros(self._n_rows, dtype=np.bool_)
        null[list(self.faults)] = True
        mask = pa.array(null) if self.faults else None
        return {o.name: self._column(o, null, mask) for o in self.outputs}

    def _column(self, output: Output, null: npt.NDArray[np.bool_], mask: pa.Array | None) -> pa.Array:
        kind = output.type()
        if output.kind == "scalar":
            return pa.array(self._fixed[output.name], kind, mask=null if mask is not None else None)
        if output.kind == "dense":
            flat = pa.array(self._fixed[output.name].reshape(-1), kind.value_type)
            return pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=mask)
        offsets, values, indices = _gather(self._n_rows, self._ragged[output.name], output, null)
        if output.kind == "multi":
            # Views: an array of binary made of values would be a copy.
            buffers = [None, pa.py_buffer(values)]
            vectors = pa.Array.from_buffers(kind.value_type, len(values), buffers)
            return pa.ListArray.from_arrays(offsets, vectors, type=kind, mask=mask)
        parts = [
            pa.ListArray.from_arrays(offsets, pa.array(part), type=kind.field(name).type)
            for name, part in (("indices", indices), ("values", values))
        ]
        return pa.StructArray.from_arrays(parts, fields=list(kind), mask=mask)


def _of_rows(block: Block, good: npt.NDArray[np.bool_]) -> Block:
    """Return a copy of the good rows of a ragged block, whose memory may be a device's for copying from."""
    lengths = np.asarray(block.lengths)
    kept = np.repeat(good, lengths)
    indices = None if block.indices is None else block.indices[kept]
    return Block(block.values[kept], block.largest[good], lengths[good], indices)


def list_offsets(lengths: IdArray, name: str) -> pa.Array:
    """Return (n + 1,) int32 offsets of lists of (n,) lengths.

    Raises:
        ModelError: together they are more than Arrow's lists can count.
    """
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    if ends[-1] > MOST_ENTRIES:
        raise ModelError(
            f"{name}: {len(lengths):,} rows have {ends[-1]:,} values together, and a column of lists counts "
            f"{MOST_ENTRIES:,}; lower batching.unit_bytes or batching.unit_rows"
        )
    return pa.array(ends.astype(np.int32))


def _gather(
    n_rows: int, blocks: list[tuple[IdArray, Block]], output: Output, null: npt.NDArray[np.bool_]
) -> tuple[pa.Array, npt.NDArray[np.floating[Any]], npt.NDArray[np.int32] | None]:
    """Return (n + 1,) offsets, values and indices of all rows in row order; a row's last block counts."""
    starts, lengths = np.zeros(n_rows, np.int64), np.zeros(n_rows, np.int64)
    at = 0
    for rows, block in blocks:
        amounts = np.asarray(block.lengths)
        starts[rows] = at + np.cumsum(amounts) - amounts
        lengths[rows] = amounts
        at += int(amounts.sum())
    lengths[null] = 0
    ends = np.cumsum(lengths)
    within = np.arange(int(ends[-1]) if n_rows else 0) - np.repeat(ends - lengths, lengths)
    places = np.repeat(starts, lengths) + within
    empty = np.zeros((0, output.dim) if output.kind == "multi" else 0, dtype=output.dtype)
    values = np.concatenate([empty, *(block.values for _, block in blocks)])[places]
    indices = np.concatenate(
        [np.zeros(0, np.int32), *(block.indices for _, block in blocks if block.indices is not None)]
    )
    return list_offsets(lengths, output.name), values, indices[places] if output.kind == "sparse" else None
