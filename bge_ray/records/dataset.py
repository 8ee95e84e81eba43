"""What is to do, what is done, and with which model and settings: the facts of one data set.

Plain frozen records and their JSON, no storage. `DatasetSpec` says what the data set is,
`Plan` which corpus objects and units it consists of, `Marker` that one unit is finished, and
`Manifest` what a reader may use. A unit's fingerprint covers all that decides its vectors.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter

from bge_ray.errors import DatasetMismatchError
from bge_ray.records.columns import Columns
from bge_ray.records.ids import FORMAT_VERSION

R = TypeVar("R")


@dataclass(frozen=True)
class ModelSpec:
    """The model as it was resolved: everything about it that decides a vector."""

    name: str
    revision: str | None
    weights_sha256: str
    dim: int
    pooling: str
    max_length: int
    normalize: bool
    dtype: str
    query_instruction: str
    passage_instruction: str


# Where a model lies and what is put before queries change no vector of the data set.
NOT_DECISIVE = ("model.name", "model.revision", "model.query_instruction")


@dataclass(frozen=True)
class DatasetSpec:
    """What a data set is; two runs may share an output only if theirs agree in what decides vectors."""

    model: ModelSpec
    columns: Columns
    dtype: str
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over all that decides a vector."""
        return _digest(self.decisive())

    def decisive(self) -> dict[str, Any]:
        """Return all that decides a vector, by dotted name."""
        facts = dataclasses.asdict(self)
        # The name says all of a type, the same in every version of Arrow.
        facts["columns"]["kept"] = {name: kind.name for name, kind in self.columns.kept.items()}
        flat = _flatten(facts)
        return {key: value for key, value in flat.items() if key not in NOT_DECISIVE}

    def check_same(self, other: "DatasetSpec", uri: str) -> None:
        """Refuse to mix two data sets.

        Raises:
            DatasetMismatchError: names each field that differs, with both values.
        """
        mine, theirs = self.decisive(), other.decisive()
        differ = [
            f"{key}: there {theirs.get(key)!r}, now {mine.get(key)!r}"
            for key in sorted(mine | theirs)
            if mine.get(key) != theirs.get(key)
        ]
        if differ:
            raise DatasetMismatchError(
                f"{uri} holds a data set made with other settings ({'; '.join(differ)}); "
                "choose another output.uri, or go back to those settings"
            )


@dataclass(frozen=True, order=True)
class Unit:
    """A fixed range of rows of one corpus object: what is committed, retried and resumed."""

    object_no: int
    first_row: int
    n_rows: int

    @property
    def name(self) -> str:
        """File stem of everything that belongs to the unit; sorts by place."""
        return f"{self.object_no:08d}-{self.first_row:010d}"


@dataclass(frozen=True)
class UnitLimits:
    """When a unit is full: by rows, or by bytes of text plus ``vector_bytes`` a row."""

    max_rows: int
    max_bytes: int
    vector_bytes: int


@dataclass(frozen=True)
class Span:
    """The smallest piece of an object that can be read on its own, and the units in it.

    ``start`` and ``stop`` are row groups for Parquet and bytes for plain lines; a format that can
    only be streamed from its beginning has one span over the whole object.
    """

    start: int
    stop: int
    first_row: int
    unit_rows: tuple[int, ...]


@dataclass(frozen=True)
class CorpusObject:
    """One input file under its number."""

    object_no: int
    uri: str
    size: int
    etag: str
    format: str
    compression: str
    spans: tuple[Span, ...]

    @property
    def n_rows(self) -> int:
        """Rows of the object."""
        return sum(sum(span.unit_rows) for span in self.spans)

    def units(self) -> list[Unit]:
        """All units, in row order."""
        return [unit for span in self.spans for unit in span_units(self.object_no, span)]


@dataclass(frozen=True)
class Plan:
    """The corpus of one run: every object with its number. ``next_object_no`` is never given twice."""

    objects: tuple[CorpusObject, ...]
    next_object_no: int

    def units(self) -> list[Unit]:
        """All units of all objects, in order of their names."""
        return [unit for corpus_object in self.objects for unit in corpus_object.units()]


@dataclass(frozen=True)
class FileFact:
    """One written file, as it can be checked."""

    path: str
    bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True)
class Marker:
    """A finished unit: written after its files, so its presence means that they are complete."""

    unit: Unit
    fingerprint: str
    rows_out: int
    rows_rejected: int
    tokens: int
    truncated: int
    reasons: dict[str, int]
    embeddings: FileFact | None
    rejected: FileFact | None


@dataclass(frozen=True)
class Manifest:
    """What a reader may use: the live shards of a complete run."""

    dataset_fingerprint: str
    rows_in: int
    rows_out: int
    rows_rejected: int
    tokens: int
    truncated: int
    shards: tuple[Marker, ...]
    format_version: int = FORMAT_VERSION


def span_units(object_no: int, span: Span) -> list[Unit]:
    """Return the units of one span, in row order."""
    units, first = [], span.first_row
    for n_rows in span.unit_rows:
        units.append(Unit(object_no, first, n_rows))
        first += n_rows
    return units


def unit_fingerprint(dataset_fingerprint: str, corpus_object: CorpusObject, unit: Unit) -> str:
    """Return the hex sha256 of all that decides the vectors of one unit."""
    place = [
        corpus_object.uri,
        corpus_object.size,
        corpus_object.etag,
        unit.object_no,
        unit.first_row,
        unit.n_rows,
    ]
    return _digest([dataset_fingerprint, *place])


def make_manifest(dataset_fingerprint: str, markers: Iterable[Marker]) -> Manifest:
    """Fold the markers of finished units into a manifest, in order of their place."""
    shards = tuple(sorted(markers, key=lambda m: m.unit))
    return Manifest(
        dataset_fingerprint=dataset_fingerprint,
        rows_in=sum(m.unit.n_rows for m in shards),
        rows_out=sum(m.rows_out for m in shards),
        rows_rejected=sum(m.rows_rejected for m in shards),
        tokens=sum(m.tokens for m in shards),
        truncated=sum(m.truncated for m in shards),
        shards=shards,
    )


def to_json(record: Any) -> bytes:
    """Return a record as indented UTF-8 JSON with sorted keys: same record, same bytes."""
    return (
        json.dumps(dataclasses.asdict(record), sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    ).encode()


def from_json(kind: type[R], data: bytes | str) -> R:
    """Rebuild a record of the given kind from its JSON.

    Raises:
        ValueError: not JSON, or not this kind of record (pydantic's ValidationError is one).
    """
    return TypeAdapter(kind).validate_json(data)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
