"""Data sets of synthetic embeddings, as the embed job would have left them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from bge_ray.dataset.commit import ShardWriter
from bge_ray.dataset.folder import Dataset
from bge_ray.records.chunking import Chunking
from bge_ray.records.columns import Columns, ColumnType
from bge_ray.records.dataset import DatasetSpec, Manifest, Marker, make_manifest
from bge_ray.records.ids import vector_ids
from bge_ray.records.model import ModelSpec
from bge_ray.records.outputs import Output
from bge_ray.records.plan import Unit
from bge_ray.records.schemas import REJECTED_SCHEMA, embedding_schema, hash_texts
from bge_ray.storage.objects import Storage

OUTPUT = Output("embedding", "dense", 32, "float32")
MODEL = ModelSpec("synthetic", None, "0" * 64, "dense", (OUTPUT,), "cls", 512, True, "float32", "", "")


def clustered(rows: int, dim: int, seed: int, *, clusters: int = 50, centres_seed: int = 0) -> np.ndarray:
    """Return (rows, dim) float32 unit vectors around centres that depend on ``centres_seed`` alone."""
    centres = np.random.default_rng(centres_seed).normal(size=(clusters, dim)).astype(np.float32)
    rng = np.random.default_rng([seed, 1])
    vectors = centres[rng.integers(0, clusters, rows)]
    vectors += np.float32(0.9) * rng.standard_normal((rows, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


CHUNKING = Chunking(
    max_tokens=40,
    overlap_tokens=0,
    boundary="sentence",
    language="en",
    titles="first",
    keep_text=False,
    rules="of a test",
)
# Characters of a chunk in a data set that says it has chunks.
CHUNK_CHARS = 10


class VectorDataset:
    """A data set below ``root`` whose shards a test sets, replaces and removes, until ``publish``."""

    def __init__(
        self,
        root: str,
        dim: int = 32,
        dtype: str = "float32",
        chunking: Chunking | None = None,
        kept: Mapping[str, pa.DataType] | None = None,
        **model: object,
    ) -> None:
        outputs = (dataclasses.replace(OUTPUT, dim=dim, dtype=dtype),)
        made = dataclasses.replace(MODEL, **({"outputs": outputs} | model))
        types = {name: ColumnType.of(kind) for name, kind in (kept or {}).items()}
        self.spec = DatasetSpec(made, Columns("id", "text", None, types), (), chunking)
        self.dataset = Dataset(Storage(30), root)
        self.dataset.create_spec(self.spec)
        self._markers: dict[int, Marker] = {}

    def put(
        self,
        object_no: int,
        vectors: np.ndarray | Mapping[str, pa.Array],
        names: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        state: str = "",
        kept: Mapping[str, pa.Array] | None = None,
    ) -> Marker:
        """Write one shard of (n, dim) vectors, or of n values of each output.

        Their ids are those of rows 0 to n - 1 of the object.

        With ``sizes`` row i has so many of them, as chunks; names and kept columns are of rows. In another
        state, as of other columns, it takes the place of the one that is there.
        """
        marker = write_shard(self.dataset, self.spec, object_no, vectors, names, sizes, state, kept)
        self._markers[object_no] = marker
        return marker

    def adopt(self, marker: Marker) -> None:
        """Take over a shard that another process wrote."""
        self._markers[marker.unit.object_no] = marker

    def remove(self, object_no: int) -> None:
        del self._markers[object_no]

    def publish(self) -> Manifest:
        manifest = make_manifest(self.spec.vector_fingerprint, self._markers.values())
        self.dataset.publish(manifest)
        self.dataset.sweep(self.spec, manifest, 0)
        return manifest


def write_shard(
    dataset: Dataset,
    spec: DatasetSpec,
    object_no: int,
    vectors: np.ndarray | Mapping[str, pa.Array],
    names: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    state: str = "",
    kept: Mapping[str, pa.Array] | None = None,
) -> Marker:
    n = len(vectors) if isinstance(vectors, np.ndarray) else len(next(iter(vectors.values())))
    sizes = sizes or [1] * n
    rows = np.repeat(np.arange(len(sizes)), sizes)
    numbers = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    names = names or [f"{object_no}-{row}" for row in range(len(sizes))]
    schema = embedding_schema(spec.model.outputs, spec.columns.kept_schema(), spec.chunking)
    spans = [numbers, CHUNK_CHARS * numbers, CHUNK_CHARS * (numbers + 1)] if spec.chunking is not None else []
    if isinstance(vectors, np.ndarray):
        flat = pa.array(np.ascontiguousarray(vectors, dtype=spec.model.output("embedding").dtype).reshape(-1))
        kind = schema.field("embedding").type
        vectors = {"embedding": pa.FixedSizeListArray.from_arrays(flat, type=kind)}
    table = pa.table(
        [
            pa.array(vector_ids(object_no, rows, numbers)),
            pa.array([names[row] for row in rows], pa.string()),
            *(pa.array(column, pa.int32()) for column in spans),
            hash_texts(
                f"text {object_no}-{row}" + (f"-{number}" if number else "")
                for row, number in zip(rows, numbers, strict=True)
            ),
            pa.array(np.full(n, 5, np.int32)),
            pa.array(np.zeros(n, bool)),
            *(vectors[output.name] for output in spec.model.outputs),
            *((kept or {})[name].take(pa.array(rows)) for name in spec.columns.kept),
        ],
        schema=schema,
    )
    writer = ShardWriter(dataset.storage, dataset.root, spec, "zstd")
    return writer.commit(
        Unit(object_no, 0, len(sizes)), f"f{object_no}{state}", table, REJECTED_SCHEMA.empty_table()
    )


def make_dataset(
    root: str, rows: Sequence[int], dim: int = 32, dtype: str = "float32", make: Callable = clustered
) -> VectorDataset:
    """Write a complete data set with so many rows in each shard."""
    made = VectorDataset(root, dim, dtype)
    for number, count in enumerate(rows):
        made.put(number, make(count, dim, seed=number))
    made.publish()
    return made
