"""A small data set: its spec, one unit of it, and the rows that unit brings."""

import dataclasses

import numpy as np
import pyarrow as pa

from bge_ray.dataset.commit import ShardWriter
from bge_ray.records.columns import Columns, ColumnType
from bge_ray.records.dataset import DatasetSpec, FileFact, Marker
from bge_ray.records.ids import vector_ids
from bge_ray.records.model import EMBEDDING, ModelSpec
from bge_ray.records.outputs import Output
from bge_ray.records.plan import Unit
from bge_ray.records.schemas import REJECTED_SCHEMA, embedding_schema, hash_texts
from bge_ray.storage.objects import Storage

DIM = 8
UNIT = Unit(object_no=3, first_row=100, n_rows=10)
FINGERPRINT = "f" * 64


def make_spec(
    dtype: str = "float32", kept: dict[str, pa.DataType] | None = None, **model: object
) -> DatasetSpec:
    facts = ModelSpec(
        name="a/model", revision="abc", weights_sha256="0" * 64, family="dense",
        outputs=(Output("embedding", "dense", DIM, dtype),), pooling="cls", max_length=16,
        normalize=True, dtype="float32", query_instruction="query: ", passage_instruction="",
    )  # fmt: skip
    types = {name: ColumnType.of(kind) for name, kind in (kept or {}).items()}
    return DatasetSpec(dataclasses.replace(facts, **model), Columns("id", "text", "title", types))


def make_vectors(seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(UNIT.n_rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_tables(
    spec: DatasetSpec, bad: tuple[int, ...] = (), vectors: np.ndarray | None = None
) -> tuple[pa.Table, pa.Table]:
    """Return the shard and the rejected rows of UNIT, with the rows at ``bad`` rejected."""
    good = np.array([i for i in range(UNIT.n_rows) if i not in bad], np.int64)
    kept = {
        field.name: pa.array([None if i % 4 == 0 else f"{field.name} {i}" for i in good], pa.string())
        if field.type == pa.string()
        else pa.array(good).cast(field.type)
        for field in spec.columns.kept_schema()
    }
    schema = embedding_schema(spec.model.outputs, spec.columns.kept_schema())
    some = (make_vectors() if vectors is None else vectors)[good].astype(spec.model.output(EMBEDDING).dtype)
    kind = schema.field(EMBEDDING).type
    columns = {
        "vector_id": vector_ids(UNIT.object_no, UNIT.first_row + good),
        "passage_id": [f"p{i}" for i in good],
        "text_hash": hash_texts(f"text {i}" for i in good),
        "n_tokens": (good % 5 + 2).astype(np.int32),
        "truncated": good % 3 == 0,
        EMBEDDING: pa.FixedSizeListArray.from_arrays(pa.array(some.reshape(-1), kind.value_type), type=kind),
        **kept,
    }
    shard = pa.table([columns[name] for name in schema.names], schema=schema)
    places = vector_ids(UNIT.object_no, UNIT.first_row + np.array(bad, np.int64))
    rejected = [
        {"vector_id": place, "passage_id": f"p{i}", "reason": "empty_text" if i % 2 else "null_text"}
        for i, place in zip(bad, places.tolist(), strict=True)
    ]
    return shard, pa.Table.from_pylist([{**row, "detail": "why"} for row in rejected], schema=REJECTED_SCHEMA)


def make_writer(storage: Storage, root: str, spec: DatasetSpec | None = None) -> ShardWriter:
    return ShardWriter(storage, root, spec or make_spec(), "zstd")


def make_marker(unit: Unit, *files: FileFact) -> Marker:
    return Marker(unit, FINGERPRINT, unit.n_rows, 0, unit.n_rows, 5, 0, {}, files[0] if files else None, None)
