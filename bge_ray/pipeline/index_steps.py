"""The steps of an index build on the driver: train, add, merge, finish. Each skips what is there already.

Parts and pieces are named by what went into them, so "is it there" is the whole question.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bge_ray.index.drift import drift
from bge_ray.index.factory import IndexSpec
from bge_ray.index.merge import ListRange, plan_ranges, total_sizes
from bge_ray.index.part import part_sizes
from bge_ray.io.assemble import concatenate
from bge_ray.io.shards import ROW_GROUP_ROWS
from bge_ray.io.storage import Storage, join
from bge_ray.manifest import FileFact, Manifest
from bge_ray.pipeline.index_tasks import (
    TrainedFile,
    WrittenFile,
    add_task,
    file_facts,
    flat_task,
    headed_task,
    open_parts,
    piece_task,
    sample_task,
    shard_index_task,
    train_task,
)
from bge_ray.pipeline.searchers import RangePiece
from bge_ray.pipeline.tasks import run_tasks
from bge_ray.schema import IdArray
from bge_ray.settings import IndexSettings

# Codes and ids that one add task holds, twice.
PART_BYTES = 128_000_000
# Vectors of one HNSW index, in bytes.
SHARD_BYTES = 1_000_000_000
# A sample takes at most this share of a row group, so that it touches four times as many places.
SAMPLED_SHARE = 0.25
SEED = 20260101


@dataclass(frozen=True)
class Build:
    """What a build works on: inputs, the checked factory, and where its files go."""

    storage: Storage
    root: str
    manifest: Manifest
    spec: IndexSpec
    settings: IndexSettings
    at_once: int
    watch: Callable[[], None]

    @property
    def facts(self) -> list[FileFact]:
        """The embedding shards, in order of place."""
        return [marker.embeddings for marker in self.manifest.shards if marker.embeddings is not None]

    def uri(self, *parts: str) -> str:
        """Return the URI of a file of the index."""
        return join(self.root, "index", *parts)

    def exists(self, uri: str) -> bool:
        """Tell whether a file is there; everything is written whole or not at all."""
        return self.storage.info(uri) is not None

    def run(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run tasks and return their results in the order of the arguments."""
        results: list[Any] = [None] * len(arguments)
        for number, result in run_tasks(function, arguments, at_once=self.at_once, watch=self.watch):
            results[number] = result
        return results


@dataclass(frozen=True)
class Merged:
    """Merged ranges of lists, still without headers, and the (nlist,) list sizes of the whole."""

    sizes: IdArray
    pieces: list[RangePiece]


def key_of(*parts: object) -> str:
    """Return a short name for anything JSON can hold; different things get different names."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def get_trained(build: Build, *, reuse: bool) -> TrainedFile:
    """Return the stored trained index if it is of this factory, else train one on a sample of all shards."""
    spec, fingerprint = build.spec, build.manifest.dataset_fingerprint
    stored = build.storage.read_optional(build.uri("training.json"))
    if reuse and stored is not None:
        record = json.loads(stored)
        if record.pop("dataset_fingerprint") == fingerprint:
            trained = TrainedFile(**record)
            if (trained.factory, trained.metric, trained.dim) == (spec.factory, spec.metric.value, spec.dim):
                return trained
    sample = _draw_sample(build, spec.training_rows)
    uri = build.uri(
        "trained", f"{key_of(spec.factory, spec.metric.value, [f.sha256 for f in build.facts])}.faiss"
    )
    [sha256] = build.run(train_task, [(build.storage, uri, spec.factory, spec.metric.value, sample)])
    trained = TrainedFile(uri, sha256, spec.factory, spec.metric.value, spec.dim)
    record = asdict(trained) | {"dataset_fingerprint": fingerprint}
    build.storage.write(build.uri("training.json"), json.dumps(record, indent=1).encode())
    return trained


def add_parts(build: Build, trained: TrainedFile) -> list[str]:
    """Encode all shards into parts; returns the URIs of the parts, in order of place."""
    groups = _group(build.facts, PART_BYTES // (build.spec.code_size + 8))
    uris = [
        build.uri("parts", f"{key_of(trained.sha256, [f.sha256 for f in group])}.part") for group in groups
    ]
    there = {info.uri.rpartition("/")[2] for info in build.storage.list_files(build.uri("parts"))}
    build.run(
        add_task,
        [
            (build.storage, build.root, trained, group, uri)
            for group, uri in zip(groups, uris, strict=True)
            if uri.rpartition("/")[2] not in there
        ],
    )
    return uris


def measure_drift(build: Build, parts: Sequence[str], known: Sequence[str]) -> float:
    """Return how far the parts that are not among the ``known`` ones are out of place; 0 without either."""
    old, new = [uri for uri in parts if uri in known], [uri for uri in parts if uri not in known]
    if not old or not new:
        return 0.0
    before, after = (
        sum(
            (part_sizes(part) for part in open_parts(build.storage, uris)),
            np.zeros(build.spec.nlist, np.int64),
        )
        for uris in (old, new)
    )
    return drift(before, after)


def merge_parts(build: Build, trained: TrainedFile, parts: Sequence[str], folder: str) -> Merged:
    """Merge the parts of an IVF index by ranges of lists balanced by bytes."""
    loaded = trained.load(build.storage)
    sizes = total_sizes(loaded, open_parts(build.storage, parts))
    ranges = plan_ranges(loaded, sizes, build.settings.range_bytes)
    uris = [build.uri(folder, f"piece-{lists.start:07d}-{lists.stop:07d}") for lists in ranges]
    there = {info.uri.rpartition("/")[2]: info.size for info in build.storage.list_files(build.uri(folder))}
    build.run(
        piece_task,
        [
            (build.storage, tuple(parts), lists, uri)
            for lists, uri in zip(ranges, uris, strict=True)
            if there.get(uri.rpartition("/")[2]) != lists.n_bytes
        ],
    )
    pieces = [
        RangePiece(trained, uri, lists.n_bytes, _inside(sizes, lists))
        for lists, uri in zip(ranges, uris, strict=True)
    ]
    return Merged(sizes, pieces)


def finish_ivf(
    build: Build, trained: TrainedFile, merged: Merged, nprobe: int, folder: str
) -> list[WrittenFile]:
    """Put headers with the tuned nprobe in front, and make the file or files to be published."""
    if build.settings.layout == "ranges" or len(merged.pieces) == 1:
        names = [f"range-{n:05d}.faiss" for n in range(len(merged.pieces))]
        if build.settings.layout == "single":
            names = ["index.faiss"]
        return build.run(
            headed_task,
            [
                (build.storage, trained, piece.piece, piece.sizes, nprobe, build.uri(folder, name))
                for piece, name in zip(merged.pieces, names, strict=True)
            ],
        )
    head = build.uri(folder, "piece-head")
    build.run(headed_task, [(build.storage, trained, merged.pieces[0].piece, merged.sizes, nprobe, head)])
    uri = build.uri(folder, "index.faiss")
    concatenate(build.storage, [head, *(piece.piece for piece in merged.pieces[1:])], uri)
    return build.run(file_facts, [(build.storage, uri, uri, int(merged.sizes.sum()))])


def finish_flat(build: Build, trained: TrainedFile, parts: Sequence[str], folder: str) -> list[WrittenFile]:
    """Merge an index without lists into one file."""
    uri = build.uri(folder, "index.faiss")
    arguments = (build.storage, trained, tuple(parts), build.settings.range_bytes, build.uri(folder, "piece"))
    [pieces] = build.run(flat_task, [arguments])
    concatenate(build.storage, pieces, uri)
    return build.run(file_facts, [(build.storage, uri, uri, sum(fact.rows for fact in build.facts))])


def build_shards(build: Build, trained: TrainedFile, folder: str) -> list[WrittenFile]:
    """Build HNSW indexes side by side, to be searched together."""
    groups = _group(build.facts, max(1, SHARD_BYTES // build.spec.code_size))
    return build.run(
        shard_index_task,
        [
            (build.storage, build.root, trained, group, build.uri(folder, f"shard-{number:05d}.faiss"))
            for number, group in enumerate(groups)
        ],
    )


def _draw_sample(build: Build, wanted: int) -> np.ndarray:
    """Draw rows uniformly over all shards, by row groups; returns (n, dim) float32."""
    empty = np.empty((0, build.spec.dim), np.float32)
    if not wanted:
        return empty
    rng = np.random.default_rng(SEED)
    facts = build.facts
    groups = [(s, g) for s, fact in enumerate(facts) for g in range(-(-fact.rows // ROW_GROUP_ROWS))]
    rows_of = [min(ROW_GROUP_ROWS, facts[s].rows - g * ROW_GROUP_ROWS) for s, g in groups]
    share = max(SAMPLED_SHARE, min(1.0, wanted / sum(rows_of)))
    chosen: dict[int, dict[int, list[int]]] = {}
    left = wanted
    for number in rng.permutation(len(groups)).tolist():
        if left <= 0:
            break
        take = min(left, max(1, round(share * rows_of[number])))
        shard, group = groups[number]
        chosen.setdefault(shard, {})[group] = sorted(
            rng.choice(rows_of[number], take, replace=False).tolist()
        )
        left -= take
    found = build.run(
        sample_task,
        [(build.storage, build.root, facts[shard], where) for shard, where in sorted(chosen.items())],
    )
    return np.concatenate([empty, *(vectors for vectors, _ in found)])


def _group(facts: Sequence[FileFact], max_rows: int) -> list[tuple[FileFact, ...]]:
    """Group neighbouring shards while they have at most so many rows together."""
    groups: list[list[FileFact]] = []
    rows = 0
    for fact in facts:
        if not groups or rows + fact.rows > max_rows:
            groups.append([])
            rows = 0
        groups[-1].append(fact)
        rows += fact.rows
    return [tuple(group) for group in groups]


def _inside(sizes: IdArray, lists: ListRange) -> IdArray:
    inside = np.zeros_like(sizes)
    inside[lists.start : lists.stop] = sizes[lists.start : lists.stop]
    return inside
