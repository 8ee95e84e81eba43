"""Columns that rows on their way have in every job: their token ids, and why some cannot be done.

A row with a ``reason`` stays in its table and is passed by; so rows in equal rows out at every stage.
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.records.arrays import whole
from bge_ray.records.ids import IdArray
from bge_ray.records.tokens import PackedTokens, TokenSpans

# Reason and detail of a row that is left out.
Fault: TypeAlias = tuple[str, str]
# Numbers that some models need of each row, by the name of the array of `PackedTokens`.
_ROW_NUMBERS = {"type_start": "type_starts", "prompt_tokens": "prompt_tokens"}
# Where rows share tokens: the span of each among those of the row that has them, itself or the last one
# before.
_SPAN = ("span_start", "span_stop")
TOKEN_COLUMNS = ("input_ids", *_ROW_NUMBERS, *_SPAN)


def spread(values: pa.Array, rows: IdArray, n_rows: int) -> pa.Array:
    """Return (n,) values with (m,) given ones at their rows and null elsewhere; as they are if m = n."""
    if len(rows) == n_rows:
        return values
    places, missing = np.zeros(n_rows, np.int64), np.ones(n_rows, np.bool_)
    places[rows], missing[rows] = np.arange(len(rows)), False
    return values.take(pa.array(places, mask=missing))


def with_tokens(table: pa.Table, rows: IdArray, tokens: PackedTokens) -> pa.Table:
    """Add token ids to some rows of a table; the other rows have none.

    Args:
        table: n rows.
        rows: (m,) ascending numbers of the rows that were tokenised.
        tokens: with m results. Its values are taken over, not copied.

    Returns:
        The table with ``input_ids`` and, where texts have a second segment, ``type_start``, and where a
        prompt is left out, ``prompt_tokens``; where results are of spans, the first row of each text has the
        ids, and every row ``span_start`` and ``span_stop``.
    """
    if tokens.spans is not None:
        for column, borders in zip(_SPAN, tokens.spans.borders.T, strict=True):
            table = table.append_column(column, spread(pa.array(borders), rows, len(table)))
        rows = rows[tokens.spans.offsets[:-1]]
    lengths = np.zeros(len(table), np.int32)
    lengths[rows] = tokens.lengths
    offsets = np.zeros(len(table) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    missing = np.ones(len(table), np.bool_)
    missing[rows] = False
    ids = pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(tokens.input_ids), mask=pa.array(missing) if missing.any() else None
    )
    table = table.append_column("input_ids", ids)
    for column, field in _ROW_NUMBERS.items():
        given = getattr(tokens, field)
        if given is not None:
            numbers = np.zeros(len(table), np.int32)
            numbers[rows] = given
            table = table.append_column(column, pa.array(numbers, mask=missing))
    return table


def packed_tokens(table: pa.Table) -> tuple[IdArray, PackedTokens]:
    """Return the (m,) numbers of the rows that results are of, and their tokens, as views of the buffers."""
    ids = whole(table["input_ids"])
    if ids.offset or (len(ids) and ids.offsets[0].as_py()):
        ids = pa.concat_arrays([ids.slice(0, 0), ids.take(pa.array(np.arange(len(ids))))])
    there = pc.is_valid(ids).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(there).astype(np.int64)
    # A row without token ids is empty, so that the others still lie end to end.
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(np.diff(ids.offsets.to_numpy())[rows], out=offsets[1:])
    numbers = {
        field: whole(table[column]).take(pa.array(rows)).to_numpy().astype(np.int32)
        for column, field in _ROW_NUMBERS.items()
        if column in table.column_names and len(rows)
    }
    values = ids.values.to_numpy()[: offsets[-1]]
    tokens = PackedTokens(values, offsets, np.zeros(len(rows), np.bool_), **numbers)
    if _SPAN[0] not in table.column_names:
        return rows, tokens
    borders = [whole(table[column]) for column in _SPAN]
    pooled = np.flatnonzero(pc.is_valid(borders[0]).to_numpy(zero_copy_only=False)).astype(np.int64)
    taken = np.stack([column.take(pa.array(pooled)).to_numpy() for column in borders], axis=1)
    spans = TokenSpans(np.searchsorted(pooled, [*rows, len(table)]).astype(np.int64), taken.astype(np.int32))
    return pooled, dataclasses.replace(tokens, spans=spans)


def without_tokens(table: pa.Table) -> pa.Table:
    """Return the table without its token ids."""
    return table.drop_columns([name for name in TOKEN_COLUMNS if name in table.column_names])


def with_faults(table: pa.Table, faults: Mapping[int, Fault]) -> pa.Table:
    """Write reason and detail into the rows of the given numbers; both columns are there afterwards."""
    for column, part in (("reason", 0), ("detail", 1)):
        there = column in table.column_names
        if there and not faults:
            continue
        values = table[column].to_pylist() if there else [None] * len(table)
        for row, fault in faults.items():
            values[row] = fault[part]
        array = pa.array(values, pa.string())
        if there:
            place = table.schema.get_field_index(column)
            table = table.set_column(place, table.schema.field(column), array)
        else:
            table = table.append_column(column, array)
    return table
