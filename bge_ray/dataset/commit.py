"""Embedding shards: the Parquet file of one unit, and its commit.

The commit of a unit is: its files, each created whole under its final name, then its marker. A
process that dies between any two of these leaves either nothing, files without a marker (the
next attempt adopts or completes them), or a finished unit. Nothing is ever replaced by other
content under the same name, so a slow twin of a task cannot change what a marker vouches for: a
file in the way that is not of the same rows (an earlier attempt may have rejected others, a disk
may have damaged it) stays until the sweep, and ours takes a name with its hash in it.
"""

import hashlib
import io
import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.errors import StorageError
from bge_ray.records.canonical import to_json
from bge_ray.records.dataset import DatasetSpec, FileFact, Marker
from bge_ray.records.ids import split_vector_ids
from bge_ray.records.plan import Unit
from bge_ray.storage.objects import Storage, join

logger = logging.getLogger(__name__)

ROW_GROUP_ROWS = 16_384
FINGERPRINT_KEY = b"bge_ray.unit_fingerprint"
VECTOR_FINGERPRINT_KEY = b"bge_ray.vector_fingerprint"


@dataclass(frozen=True)
class ShardWriter:
    """Encodes and commits units of one data set below ``root``."""

    storage: Storage
    root: str
    spec: DatasetSpec
    compression: str

    def commit(self, unit: Unit, fingerprint: str, shard: pa.Table, rejected: pa.Table) -> Marker:
        """Write the files of a unit, then its marker.

        Args:
            unit: the rows this is about.
            fingerprint: of the unit.
            shard: rows of `embedding_schema`, in row order; may be empty.
            rejected: rows of REJECTED_SCHEMA; may be empty.

        Raises:
            StorageError: a write failed for good; no marker was written.
        """
        rows_out = len(np.unique(split_vector_ids(shard["vector_id"].to_numpy()).row_no))
        counted = rows_out + len(rejected)
        if counted != unit.n_rows:
            raise StorageError(f"unit {unit.name}: {counted} rows to write, {unit.n_rows} were planned")
        embeddings = rejects = None
        if len(shard):
            embeddings = self._create(f"embeddings/{unit.name}", shard, fingerprint)
        if len(rejected):
            rejects = self._create(f"rejected/{unit.name}", rejected, fingerprint)
        reasons = rejected["reason"].value_counts().to_pylist() if len(rejected) else []
        marker = Marker(
            unit=unit,
            fingerprint=fingerprint,
            rows_out=rows_out,
            rows_rejected=len(rejected),
            vectors=len(shard),
            tokens=int(np.sum(shard["n_tokens"].to_numpy(), dtype=np.int64)),
            truncated=int(np.sum(shard["truncated"].to_numpy(), dtype=np.int64)),
            reasons={r["values"]: r["counts"] for r in sorted(reasons, key=lambda r: str(r["values"]))},
            embeddings=embeddings,
            rejected=rejects,
        )
        self.storage.write(join(self.root, marker_path(unit)), to_json(marker))
        return marker

    def _create(self, stem: str, table: pa.Table, fingerprint: str) -> FileFact:
        data = self._encode(table, fingerprint)
        digest = hashlib.sha256(data).hexdigest()
        # A name that is taken, by another state of the unit or by what damage left of one, stays taken.
        others = (f"{stem}-{digest[at : at + 12]}.parquet" for at in range(0, len(digest) - 11, 12))
        for path in (f"{stem}.parquet", *others):
            uri = join(self.root, path)
            if self.storage.create(uri, data):
                return FileFact(path, len(data), digest, len(table))
            # An earlier attempt got as far as this file. On a GPU its last bits may differ from ours;
            # it is kept, because a marker may already vouch for it.
            there = self.storage.read(uri)
            wrong = _why_not_adoptable(there, table, fingerprint)
            if wrong is None:
                return FileFact(path, len(there), hashlib.sha256(there).hexdigest(), len(table))
            # Of the unit with other columns: every unit has such a one when columns change.
            level = logging.INFO if _is_another_state(there, fingerprint) else logging.WARNING
            logger.log(level, "%s: stands in the way and is left alone: %s", uri, wrong)
        raise StorageError(
            f"{uri}: exists and is not what was written there ({wrong}); remove it and run again"
        )

    def _encode(self, table: pa.Table, fingerprint: str) -> bytes:
        model = self.spec.model
        facts = {
            FINGERPRINT_KEY: fingerprint,
            VECTOR_FINGERPRINT_KEY: self.spec.vector_fingerprint,
            b"bge_ray.model": model.name,
            b"bge_ray.weights_sha256": model.weights_sha256,
            b"bge_ray.pooling": model.pooling,
            b"bge_ray.max_length": str(model.max_length),
            b"bge_ray.normalized": str(model.normalize).lower(),
            b"bge_ray.compute_dtype": model.dtype,
        }
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **facts})
        # A dictionary makes the embedding column larger and ten times slower to read (faiss notes, 7).
        unlike = ("passage_id", "chunk_text")  # no two are the same, or hardly
        text = [f.name for f in table.schema if f.name not in unlike and pa.types.is_string(f.type)]
        outputs = {output.name for output in model.outputs}
        buffer = io.BytesIO()
        pq.write_table(
            table,
            buffer,
            compression=self.compression,
            use_dictionary=text,
            write_statistics=[n for n in table.column_names if n not in outputs],
            row_group_size=ROW_GROUP_ROWS,
            # So that a reader of a part, who cannot compare the sha256 of the whole, sees a flipped bit.
            write_page_checksum=True,
        )
        return buffer.getvalue()


def marker_path(unit: Unit) -> str:
    """Return the path of a unit's marker below the data set."""
    return f"done/{unit.name}.json"


def _why_not_adoptable(data: bytes, table: pa.Table, fingerprint: str) -> str | None:
    """Return None if an existing file is of the same unit and holds the same rows, else what differs."""
    try:
        there = pq.read_table(io.BytesIO(data))
    except (OSError, pa.ArrowException) as error:
        return f"it is damaged ({error})"
    found = (there.schema.metadata or {}).get(FINGERPRINT_KEY, b"").decode()
    if found != fingerprint:
        return f"its fingerprint is {found[:12] or 'missing'}, not {fingerprint[:12]}"
    if there.schema.names != table.schema.names or not there["vector_id"].equals(table["vector_id"]):
        return f"its {len(there)} rows are not the {len(table)} rows of this attempt"
    return None


def _is_another_state(data: bytes, fingerprint: str) -> bool:
    """Tell whether a file is a whole shard of ours, under another unit fingerprint."""
    try:
        metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
    except (OSError, pa.ArrowException):
        return False
    return bool(metadata.get(FINGERPRINT_KEY, fingerprint.encode()) != fingerprint.encode())
