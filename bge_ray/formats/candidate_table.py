"""A Parquet table with one candidate a row, by columns: the form of our own runs.

They are read by the hundred million, on the driver.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.records.schemas import SPAN_COLUMNS

QUERY_ID_COLUMNS = ("query_id", "qid", "_id", "id")
PASSAGE_ID_COLUMNS = ("passage_id", "docid", "pid")
# Of tables with one query a row.
LIST_COLUMNS = ("passages", "pos", "neg", "pos_id", "neg_id")


@dataclass(frozen=True)
class Listed:
    """Consecutive rows of one query; a column that the table does not have, or has empty, is None."""

    query_id: str
    first_row: int
    passage_ids: list[str]
    query: str | None
    texts: list[str] | None
    scores: list[float] | None
    vector_ids: list[int] | None
    spans: list[tuple[int | None, int | None, int | None]] | None


class _NotPlainError(Exception):
    """A column has gaps, or values that have to be looked at one by one."""


def split(batch: pa.RecordBatch, first_row: int) -> list[Listed] | None:
    """Return the rows of a batch by query, in their order; None where each row has to be looked at by itself.

    Args:
        batch: of a table; names and types are whatever the file has.
        first_row: number of its first row in the file.
    """
    names = set(batch.schema.names)
    query_id = next((name for name in QUERY_ID_COLUMNS if name in names), None)
    passage_id = next((name for name in PASSAGE_ID_COLUMNS if name in names), None)
    if query_id is None or passage_id is None or names.intersection(LIST_COLUMNS) or not batch.num_rows:
        return None
    try:
        query_ids = _ids(batch[query_id])
        passage_ids = _ids(batch[passage_id]).to_pylist()
        queries = _column(batch, "query", pa.types.is_string)
        texts = _values(_column(batch, "text", pa.types.is_string))
        scores = _scores(_column(batch, "score", _is_number))
        vector_ids = _vector_ids(_column(batch, "vector_id", pa.types.is_signed_integer))
        spans = _spans(batch)
    except _NotPlainError:
        return None
    runs = pc.run_end_encode(query_ids)
    found, start = [], 0
    for name, stop in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
        found.append(
            Listed(
                name,
                first_row + start,
                passage_ids[start:stop],
                None if queries is None else queries[start].as_py(),
                None if texts is None else texts[start:stop],
                None if scores is None else scores[start:stop],
                None if vector_ids is None else vector_ids[start:stop],
                None if spans is None else spans[start:stop],
            )
        )
        start = stop
    return found


def _ids(column: pa.Array) -> pa.Array:
    """Return ids as strings: whole numbers as Python writes them."""
    if column.null_count or not (pa.types.is_string(column.type) or pa.types.is_integer(column.type)):
        raise _NotPlainError
    return column.cast(pa.string())


def _column(batch: pa.RecordBatch, name: str, is_plain: Any) -> pa.Array | None:
    if name not in batch.schema.names or batch[name].null_count == batch.num_rows:
        return None
    column = batch[name]
    if column.null_count or not is_plain(column.type):
        raise _NotPlainError
    return column


def _values(column: pa.Array | None) -> list[Any] | None:
    return None if column is None else column.to_pylist()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _scores(column: pa.Array | None) -> list[float] | None:
    if column is None:
        return None
    if pa.types.is_floating(column.type) and pc.any(pc.is_nan(column)).as_py():
        raise _NotPlainError
    return [float(score) for score in column.to_numpy(zero_copy_only=False).tolist()]


def _vector_ids(column: pa.Array | None) -> list[int] | None:
    if column is None:
        return None
    if pc.min(column).as_py() < 0:
        raise _NotPlainError
    return list(column.to_numpy(zero_copy_only=False).tolist())


def _spans(batch: pa.RecordBatch) -> list[tuple[int | None, int | None, int | None]] | None:
    columns = [_column(batch, name, pa.types.is_integer) for name in SPAN_COLUMNS]
    there = [column.to_pylist() for column in columns if column is not None]
    if not there:
        return None
    if len(there) < len(SPAN_COLUMNS):
        raise _NotPlainError
    return list(zip(*there, strict=True))
