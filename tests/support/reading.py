"""Reads whole objects through plan and units, as a run does."""

import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from bge_ray.formats.corpus import ScannedObject, read_units, resolve_columns, scan_object
from bge_ray.formats.rows import RawRows
from bge_ray.records.columns import Columns
from bge_ray.records.plan import CorpusObject, UnitLimits, span_units
from bge_ray.settings.sections import CorpusSettings
from bge_ray.storage.objects import Storage

LARGE = UnitLimits(max_rows=50_000, max_bytes=96_000_000, vector_bytes=0)


def scan(
    storage: Storage, uri: str, limits: UnitLimits = LARGE, **settings: Any
) -> tuple[ScannedObject, CorpusObject]:
    info = storage.info(uri)
    scanned = scan_object(storage, info, CorpusSettings(uri=uri, **settings), limits)
    return scanned, scanned.under(0)


def resolve(scanned: ScannedObject | Sequence[ScannedObject], **settings: Any) -> Columns:
    many = [scanned] if isinstance(scanned, ScannedObject) else list(scanned)
    return resolve_columns(many, CorpusSettings(uri="anything", **settings))


def read(
    storage: Storage, corpus_object: CorpusObject, columns: Columns, wanted: Iterable[int] | None = None
) -> dict[int, RawRows]:
    """Return the rows of the units whose first row is wanted (all by default), by first row."""
    found: dict[int, RawRows] = {}
    for span in corpus_object.spans:
        planned = {u.first_row for u in span_units(0, span)}
        todo = planned if wanted is None else planned & set(wanted)
        if not todo:
            continue
        for unit, rows in read_units(storage, corpus_object, span, columns, todo):
            assert len(rows) == unit.n_rows
            found[unit.first_row] = rows
    assert list(found) == sorted(found), "units come in order"
    return found


def read_all(storage: Storage, uri: str, limits: UnitLimits = LARGE, **settings: Any) -> RawRows:
    """Return all rows of an object as one."""
    scanned, corpus_object = scan(storage, uri, limits, **settings)
    parts = list(read(storage, corpus_object, resolve(scanned, **settings)).values())
    faults: dict[int, tuple[str, str]] = {}
    first = 0
    for part in parts:
        faults |= {first + row: fault for row, fault in part.faults.items()}
        first += len(part)
    return RawRows(
        ids=[i for p in parts for i in p.ids],
        texts=[t for p in parts for t in p.texts],
        titles=None if parts[0].titles is None else [t for p in parts for t in p.titles],
        kept={name: pa.concat_arrays([p.kept[name] for p in parts]) for name in parts[0].kept},
        faults=faults,
    )


def jsonl_bytes(records: Iterable[Any], newline: str = "\n") -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + newline for r in records).encode()


def csv_bytes(records: Sequence[dict[str, str]], delimiter: str = ",") -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return sink.getvalue().encode()


def parquet_bytes(table: pa.Table | list[dict[str, Any]], **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table), sink, **options)
    return sink.getvalue()


def compress(data: bytes, ending: str, members: int = 1) -> bytes:
    """Compress as .gz or .zst, cut into several members or frames."""
    step = -(-len(data) // members) or 1
    pieces = [data[i : i + step] for i in range(0, len(data), step)] or [b""]
    one = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[
        ending
    ]
    return b"".join(one(piece) for piece in pieces)
