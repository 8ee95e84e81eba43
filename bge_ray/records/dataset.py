"""What a data set is and what of it is there: its spec, the markers of finished units, the manifest.

Two fingerprints. The vector fingerprint covers what makes a vector of a text; the rows fingerprint adds
which columns of the corpus are read. With the version and the rows of a unit it gives the unit's.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bge_ray.errors import DatasetMismatchError
from bge_ray.records.canonical import digest, flatten, reader_of
from bge_ray.records.chunking import Chunking
from bge_ray.records.columns import Columns
from bge_ray.records.ids import FORMAT_VERSION
from bge_ray.records.model import Canary, ModelSpec
from bge_ray.records.plan import Unit

# Of which no vector depends, but the rows of shards do.
ROWS_ONLY = ("columns.", "chunking.keep_text")
# Which of these a data set may change: its vectors stay, its shards are written anew.
MAY_CHANGE = ("columns.kept.", "chunking.keep_text")
# Where a model lies and what is put before queries change no vector of the data set; canaries follow from
# the model.
NOT_DECISIVE = (
    "model.name",
    "model.revision",
    "model.query_instruction",
    "model.query_template",
    "model.examples",
    "canaries",
)
# These came later, and decide nothing where they are what everything was before: a data set stays the same.
OPTIONAL: dict[str, str | bool | None] = {
    "model.first_token": None,
    "model.last_token": None,
    "model.kernels": "plain",
    "chunking.late": False,
}


@dataclass(frozen=True)
class DatasetSpec:
    """What a data set is; two runs may share an output only if theirs agree in what decides its rows."""

    model: ModelSpec
    columns: Columns
    canaries: tuple[Canary, ...] = ()
    chunking: Chunking | None = None
    format_version: int = FORMAT_VERSION

    @property
    def vector_fingerprint(self) -> str:
        """Hex sha256 over all that makes a vector of a text."""
        return digest({k: v for k, v in self.decisive().items() if not k.startswith(ROWS_ONLY)})

    @property
    def rows_fingerprint(self) -> str:
        """Hex sha256 over that, and over which columns of the corpus become text and metadata."""
        return digest(self.decisive())

    def decisive(self) -> dict[str, Any]:
        """Return all that decides the rows of the data set, by dotted name."""
        facts = dataclasses.asdict(self)
        # Without a head there is nothing to say of it, as in data sets made before heads had files.
        facts["model"]["outputs"] = {
            o["name"]: {k: v for k, v in o.items() if k != "head" or v} for o in facts["model"]["outputs"]
        }
        # The name says all of a type, the same in every version of Arrow.
        facts["columns"]["kept"] = {name: kind.name for name, kind in self.columns.kept.items()}
        if self.chunking is None:
            del facts["chunking"]
        flat = flatten(facts)
        absent = {key for key, before in OPTIONAL.items() if flat.get(key, before) == before}
        return {key: value for key, value in flat.items() if key not in NOT_DECISIVE and key not in absent}

    def with_rows_of(self, other: "DatasetSpec") -> "DatasetSpec":
        """Return this data set with the columns of another state of it, and what else may change."""
        return dataclasses.replace(self, columns=other.columns, chunking=other.chunking)

    def check_same(self, other: "DatasetSpec", uri: str) -> None:
        """Refuse to mix two data sets; which columns are carried along beside the vectors may change.

        Raises:
            DatasetMismatchError: names each field that differs, with both values.
        """
        asked, there = ([output.name for output in spec.model.outputs] for spec in (self, other))
        mine, theirs = OPTIONAL | self.decisive(), OPTIONAL | other.decisive()
        differ = [
            f"{key}: there {theirs.get(key)!r}, now {mine.get(key)!r}"
            for key in sorted(mine | theirs)
            if mine.get(key) != theirs.get(key) and not key.startswith(MAY_CHANGE)
        ]
        if asked != there:
            # The family and all that follows from it differs, too, and would hide it.
            differ = [f"model.outputs: there {there}, now {asked}"]
        if differ:
            raise DatasetMismatchError(
                f"{uri} holds a data set made with other settings ({'; '.join(differ)}); "
                "choose another output.uri, or go back to those settings"
            )


@dataclass(frozen=True)
class FileFact:
    """One written file, as it can be checked."""

    path: str
    bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True)
class ShardFact(FileFact):
    """An embedding shard as who reads a part of it can check it: its end names its unit's ``fingerprint``."""

    fingerprint: str


@dataclass(frozen=True)
class Marker:
    """A finished unit: written after its files, so its presence means that they are complete.

    ``rows_out`` are corpus rows that have vectors, ``vectors`` the rows of the shard: one a chunk.
    """

    unit: Unit
    fingerprint: str
    rows_out: int
    rows_rejected: int
    vectors: int
    tokens: int
    truncated: int
    reasons: dict[str, int]
    embeddings: FileFact | None
    rejected: FileFact | None

    @property
    def shard(self) -> ShardFact | None:
        """The embedding shard; None if the unit has no vectors."""
        fact = self.embeddings
        if fact is None:
            return None
        return ShardFact(fact.path, fact.bytes, fact.sha256, fact.rows, self.fingerprint)


@dataclass(frozen=True)
class Manifest:
    """What a reader may use: the live shards of a complete run."""

    vector_fingerprint: str
    rows_in: int
    rows_out: int
    rows_rejected: int
    vectors: int
    tokens: int
    truncated: int
    shards: tuple[Marker, ...]
    format_version: int = FORMAT_VERSION


def marker_of(tree: Mapping[str, Any]) -> Marker:
    """Rebuild a marker from what `dataclasses.asdict` made of it."""
    marker: Marker = reader_of(Marker).validate_python(tree)
    return marker


def make_manifest(vector_fingerprint: str, markers: Iterable[Marker]) -> Manifest:
    """Fold the markers of finished units into a manifest, in order of their place."""
    shards = tuple(sorted(markers, key=lambda m: m.unit))
    return Manifest(
        vector_fingerprint=vector_fingerprint,
        rows_in=sum(m.unit.n_rows for m in shards),
        rows_out=sum(m.rows_out for m in shards),
        rows_rejected=sum(m.rows_rejected for m in shards),
        vectors=sum(m.vectors for m in shards),
        tokens=sum(m.tokens for m in shards),
        truncated=sum(m.truncated for m in shards),
        shards=shards,
    )
