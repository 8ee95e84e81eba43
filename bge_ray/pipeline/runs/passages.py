"""Texts of passages as they were embedded, out of a span of the corpus or out of kept columns."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from bge_ray.formats.corpus import read_units
from bge_ray.formats.rows import Passages, RawRows, check_rows
from bge_ray.records.columns import Columns
from bge_ray.records.ids import IdArray, id_range, vector_ids
from bge_ray.records.plan import CorpusObject, Span, Unit, span_units
from bge_ray.storage.objects import Storage

TEXT_SCHEMA = pa.schema(
    [
        pa.field("vector_id", pa.int64(), nullable=False),
        pa.field("passage_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("body_start", pa.int64(), nullable=False),
    ]
)


def text_columns(columns: Columns) -> list[str]:
    """Return the columns that a text is made of."""
    return [columns.text] if columns.title is None else [columns.text, columns.title]


def kept_texts(table: pa.Table, columns: Columns) -> pa.Table:
    """Put texts together as they were embedded, from what shards keep of them.

    Args:
        table: ``vector_id``, ``passage_id`` and `text_columns`.
        columns: of the corpus.

    Returns:
        TEXT_SCHEMA rows.
    """
    titles = None if columns.title is None else table[columns.title].to_pylist()
    rows = RawRows(table["passage_id"].to_pylist(), table[columns.text].to_pylist(), titles, {}, {})
    passages, _ = check_rows(rows)
    there = table["vector_id"].to_numpy()[passages.rows]
    return pa.table([there, passages.passage_ids, passages.texts, _body_starts(passages)], schema=TEXT_SCHEMA)


def span_texts(
    storage: Storage, corpus_object: CorpusObject, span: Span, columns: Columns
) -> Iterator[tuple[Unit, pa.Table]]:
    """Yield the texts of each unit of a span of a corpus object, checked and put together as embedded.

    Tables are TEXT_SCHEMA rows by ascending id.

    Raises:
        CorpusError: the object is not what was embedded any more.
        StorageError: it cannot be fetched.
    """
    bare = replace(columns, kept={})
    todo = {unit.first_row for unit in span_units(corpus_object.object_no, span)}
    for unit, rows in read_units(storage, corpus_object, span, bare, todo):
        passages, _ = check_rows(rows)
        there = vector_ids(unit.object_no, unit.first_row + passages.rows)
        columns_of = [there, passages.passage_ids, passages.texts, _body_starts(passages)]
        yield unit, pa.table(columns_of, schema=TEXT_SCHEMA)


def _body_starts(passages: Passages) -> list[int]:
    """Return where in each text of passages the text of the corpus begins; see `Text`."""
    starts = []
    for text, body, title in zip(passages.texts, passages.bodies, passages.titles, strict=True):
        joined = f"{title} {body}"
        starts.append(0 if text == body else len(title) + 1 - (len(joined) - len(joined.lstrip())))
    return starts


def spans_of(objects: Sequence[CorpusObject], ids: IdArray) -> Iterator[tuple[CorpusObject, Span, IdArray]]:
    """Yield each span that holds some of the ascending ids, under its object without the other spans."""
    starts, stops, spans = _span_map(tuple(objects))
    places = np.searchsorted(starts, ids, side="right") - 1
    inside = (places >= 0) & (ids < stops[np.maximum(places, 0)])
    for place, group in itertools.groupby(np.flatnonzero(inside), key=lambda i: int(places[i])):
        corpus_object, span = spans[place]
        yield replace(corpus_object, spans=()), span, ids[list(group)]


@functools.lru_cache(maxsize=2)
def _span_map(
    objects: tuple[CorpusObject, ...],
) -> tuple[IdArray, IdArray, list[tuple[CorpusObject, Span]]]:
    spans = [(o, s) for o in sorted(objects, key=lambda o: o.object_no) for s in o.spans]
    ranges = [id_range(o.object_no, s.first_row, sum(s.unit_rows)) for o, s in spans]
    edges = np.array(ranges, np.int64).reshape(-1, 2)
    return edges[:, 0].copy(), edges[:, 1].copy(), spans
