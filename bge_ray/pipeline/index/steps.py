"""The steps of an index build on the driver: train, add, merge, finish. Each skips what is there already.

Parts and pieces are named by what went into them, so "is it there" is the whole question.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import ray

from bge_ray.dataset.commit import ROW_GROUP_ROWS
from bge_ray.errors import DatasetMismatchError, IncompleteRunError
from bge_ray.index.drift import drift
from bge_ray.index.factory import IndexSpec, Kind, index_bytes
from bge_ray.index.header import HeaderFormatError, ivf_header
from bge_ray.index.merge import ListRange, plan_ranges, total_sizes
from bge_ray.pipeline.engine.progress import Step
from bge_ray.pipeline.engine.tasks import largest_node, run_tasks
from bge_ray.pipeline.index.heldout import held_rows
from bge_ray.pipeline.index.searchers import RangePiece
from bge_ray.pipeline.index.tasks import (
    StoredPart,
    TrainedFile,
    WrittenFile,
    add_task,
    complete_graph_task,
    facts_task,
    finish_task,
    flat_task,
    is_sound_task,
    open_stored,
    piece_task,
    read_sizes,
    rebuild_task,
    sample_task,
    set_effort_task,
    shard_index_task,
    train_task,
    write_sizes,
)
from bge_ray.records.canonical import digest, from_json, to_json
from bge_ray.records.dataset import FileFact, Manifest
from bge_ray.records.ids import IdArray
from bge_ray.records.index import Training
from bge_ray.report.facts import RunFacts
from bge_ray.settings.sections import IndexSettings
from bge_ray.storage.concatenate import Piece
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder

logger = logging.getLogger(__name__)

# What a task takes beside its data: Python, NumPy, Arrow, FAISS, one embedding shard.
TASK_BYTES = 500_000_000
# A sample takes at most this share of a row group, so that it touches four times as many places.
SAMPLED_SHARE = 0.25
SEED = 20260101


@dataclass(frozen=True)
class Build:
    """What a build works on: inputs, the checked factory, and where its files go.

    ``k``, ``rescore`` and ``per_row`` are what searches will ask for, which the effort is tuned for; see
    `Inputs`.
    """

    folder: OwnedFolder
    root: str
    manifest: Manifest
    spec: IndexSpec
    k: int
    rescore: int
    per_row: bool
    settings: IndexSettings
    at_once: int
    watch: Callable[[], None]
    did: RunFacts
    log_interval_s: float

    @property
    def storage(self) -> Storage:
        """For all requests."""
        return self.folder.storage

    @property
    def results(self) -> Literal["vectors", "passages"]:
        """What a result is."""
        return "passages" if self.per_row else "vectors"

    @property
    def shards(self) -> list[FileFact]:
        """The embedding shards, in order of place."""
        return [marker.shard for marker in self.manifest.shards if marker.shard is not None]

    def is_fresh(self, trained: TrainedFile) -> bool:
        """Tell whether an index was trained on the shards as they are now."""
        return trained.uri == self.uri(trained_path(self.spec, [fact.sha256 for fact in self.shards]))

    def graph_groups(self) -> list[tuple[FileFact, ...]]:
        """Return the shards of each graph of an index that cannot be merged."""
        return group_shards(self.shards, max(1, self.settings.range_bytes // self.spec.code_size))

    def uri(self, *parts: str) -> str:
        """Return the URI of a file of the index."""
        return join(self.folder.uri, *parts)

    def there(self, *parts: str) -> dict[str, int]:
        """Return the sizes of the files of a folder by name; each is written whole or not at all."""
        return {i.uri.rpartition("/")[2]: i.size for i in self.storage.list_files(self.uri(*parts))}

    def run(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        *,
        step: str,
        things: str,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        memory_bytes: int = 0,
        fetch: bool = True,
    ) -> list[Any]:
        """Run tasks and return their results in the order of the arguments; see `run_tasks` and `step`."""
        results: list[Any] = [None] * len(arguments)
        if not arguments:
            return results
        with self.step(step, things, len(arguments)) as told:
            for number, result in run_tasks(
                function,
                arguments,
                at_once=self.at_once,
                watch=self.watch,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                memory_bytes=memory_bytes,
                fetch=fetch,
            ):
                results[number] = result
                told.advance()
        return results

    def step(self, name: str, things: str, total: int | None) -> Step:
        """Return a step of the build, which is told while it lasts and booked when it ends; see `Step`."""
        return Step(name, things, total, self.log_interval_s, at_once=self.at_once, facts=self.did)


def key_of(*parts: object) -> str:
    """Return a short name for anything JSON can hold; different things get different names."""
    return digest(*parts)[:16]


def get_trained(build: Build, *, reuse: bool) -> TrainedFile:
    """Return the stored trained index if it is of this factory, else train one on a sample of all shards.

    Args:
        build: whose shards.
        reuse: whether one that was trained on other shards than there are now will do.

    Raises:
        DatasetMismatchError: training.json is damaged, or not ours.
    """
    spec = build.spec
    what = (build.manifest.vector_fingerprint, spec.factory, spec.metric.value, spec.dim)
    path = trained_path(spec, [fact.sha256 for fact in build.shards])
    there = read_training(build.storage, build.folder.uri)
    same = there is not None and (there.vector_fingerprint, there.factory, there.metric, there.dim) == what
    if there is not None and same and (reuse or there.path == path):
        trained = TrainedFile(build.uri(there.path), there.sha256, spec.factory, spec.metric.value, spec.dim)
        if build.storage.info(trained.uri) is None:
            logger.warning("%s is gone: training anew", trained.uri)
        elif build.settings.verify and not trained.is_sound(build.storage):
            logger.warning("%s is damaged: training anew", trained.uri)
        else:
            return trained
    if spec.training_rows:
        rows = min(spec.training_rows, build.manifest.vectors)
        logger.info("training %s on %s rows", spec.factory, f"{rows:,}")
    else:
        logger.info("%s needs no training", spec.factory)
    cpus = max(1, int(largest_node("CPU")))
    sample = _draw_sample(build, spec.training_rows)
    gpus = build.settings.gpus_per_task if spec.kind is Kind.IVF else 0.0
    arguments = (build.storage, build.uri(path), spec, cpus, "cuda" if gpus else None, *sample)
    memory = TASK_BYTES + 16 * spec.training_rows * spec.dim
    [sha256] = build.run(
        train_task,
        [arguments],
        step="training",
        things="indexes",
        num_cpus=cpus,
        num_gpus=gpus,
        memory_bytes=memory,
    )
    build.folder.put("training.json", to_json(Training(*what, path, sha256)))
    return TrainedFile(build.uri(path), sha256, spec.factory, spec.metric.value, spec.dim)


def trained_path(spec: IndexSpec, shard_hashes: Sequence[str]) -> str:
    """Return where an index that was trained on just these shards has its place."""
    return f"trained/{key_of(spec.factory, spec.metric.value, list(shard_hashes))}.faiss"


def note_ceiling(build: Build, trained: TrainedFile, ceiling: float) -> None:
    """Note beside a training what the first index with it recalls at most, to hold later ones against."""
    there = read_training(build.storage, build.folder.uri)
    if there is not None and there.sha256 == trained.sha256 and there.ceiling is None:
        build.folder.put("training.json", to_json(replace(there, ceiling=ceiling)))


def add_parts(build: Build, trained: TrainedFile) -> list[StoredPart]:
    """Encode all shards into parts, in order of place."""
    groups = group_shards(build.shards, build.settings.part_bytes // (build.spec.code_size + 8))
    names = [f"{key_of(trained.sha256, [f.sha256 for f in group])}.part" for group in groups]
    there = build.there("parts")
    if build.settings.verify:
        there = _sound_parts(build, [name for name in names if name in there], there)
    # An HNSW quantizer answers nearly right, and a search asks the same one: it must not differ.
    on_gpu = build.spec.kind is Kind.IVF and "HNSW" not in build.spec.factory
    gpus = build.settings.gpus_per_task if on_gpu else 0.0
    todo = [
        (build.storage, build.root, trained, group, build.uri("parts", name), "cuda" if gpus else None)
        for group, name in zip(groups, names, strict=True)
        if name not in there
    ]
    logger.info("adding: %d of %d parts are to do", len(todo), len(names))
    memory = TASK_BYTES + 2 * build.settings.part_bytes + 2 * index_bytes(build.spec, 0)
    build.run(add_task, todo, step="adding", things="parts", num_gpus=gpus, memory_bytes=memory)
    return open_stored(build.storage, [build.uri("parts", name) for name in names])


def _sound_parts(build: Build, names: Sequence[str], there: dict[str, int]) -> dict[str, int]:
    """Read parts, remove those that are damaged, and return the others."""
    arguments = [(build.storage, build.uri("parts", name)) for name in names]
    sound = build.run(is_sound_task, arguments, step="verifying", things="parts", memory_bytes=TASK_BYTES)
    damaged = [name for name, good in zip(names, sound, strict=True) if not good]
    for name in damaged:
        logger.warning("%s is damaged, and is made anew", build.uri("parts", name))
        build.storage.delete([build.uri("parts", name)])
    return {name: size for name, size in there.items() if name not in damaged}


def list_sizes(build: Build, trained: TrainedFile, parts: Sequence[StoredPart]) -> IdArray:
    """Add up the (nlist,) list sizes of all parts.

    Raises:
        IndexBuildError: the parts do not belong together.
        IncompleteRunError: they do not hold each vector of the data set once.
    """
    sizes = total_sizes(trained.load(build.storage), [part.open(build.storage) for part in parts])
    check_count(build, int(sizes.sum()))
    return sizes


def check_count(build: Build, ntotal: int) -> None:
    """Make sure that an index of ``ntotal`` vectors holds every vector of the data set.

    Raises:
        IncompleteRunError: it does not.
    """
    if ntotal != build.manifest.vectors:
        raise IncompleteRunError(
            f"the index would hold {ntotal:,} vectors, the data set has {build.manifest.vectors:,}; "
            f"remove {build.uri('parts')} and run again"
        )


def measure_drift(build: Build, trained: TrainedFile, sizes: IdArray) -> float:
    """Return the share of vectors that lie elsewhere than when the index was trained; see `index.drift`.

    The list sizes of the first build with a training are stored beside it; this writes them.
    """
    uri = sizes_uri(trained)
    if build.storage.info(uri) is None:
        write_sizes(build.storage, uri, sizes)
        return 0.0
    return drift(read_sizes(build.storage, uri), sizes)


def sizes_uri(trained: TrainedFile) -> str:
    """Return where the list sizes at the time of the training are kept."""
    return trained.uri.removesuffix(".faiss") + ".sizes"


def merge_parts(
    build: Build, trained: TrainedFile, parts: Sequence[StoredPart], sizes: IdArray, folder: str
) -> list[RangePiece]:
    """Merge the parts of an IVF index by ranges of lists balanced by bytes; headers come later."""
    ranges = plan_ranges(trained.load(build.storage), sizes, build.settings.range_bytes)
    names = [f"piece-{lists.start:07d}-{lists.stop:07d}" for lists in ranges]
    there = build.there(folder)
    sizes_at = build.uri(folder, "sizes")
    write_sizes(build.storage, sizes_at, sizes)
    shared = ray.put(list(parts))
    todo = [
        (build.storage, shared, lists, build.uri(folder, name))
        for lists, name in zip(ranges, names, strict=True)
        if there.get(name) != lists.n_bytes
    ]
    logger.info("merging: %d of %d ranges are to do", len(todo), len(ranges))
    longest = max(lists.n_bytes for lists in ranges)
    build.run(piece_task, todo, step="merging", things="ranges", memory_bytes=TASK_BYTES + longest)
    return [
        RangePiece(trained, build.uri(folder, name), lists, sizes_at)
        for lists, name in zip(ranges, names, strict=True)
    ]


def knows_header(build: Build, trained: TrainedFile) -> bool:
    """Tell whether FAISS writes the file layout known here; if not, FAISS itself must merge."""
    try:
        ivf_header(trained.load(build.storage), np.zeros(build.spec.nlist, np.int64))
    except HeaderFormatError as error:
        logger.warning("%s: merging by FAISS itself, which takes three times the memory", error)
        return False
    return True


def finish_ivf(
    build: Build, trained: TrainedFile, pieces: Sequence[RangePiece], nprobe: int, folder: str
) -> list[WrittenFile]:
    """Put headers with the tuned nprobe in front, and make the file or files to be published."""
    groups = [[piece] for piece in pieces] if build.settings.layout == "ranges" else [list(pieces)]
    names = file_names(build, len(groups))
    return build.run(
        finish_task,
        [
            (
                build.storage,
                trained,
                pieces[0].sizes_uri,
                ListRange(group[0].lists.start, group[-1].lists.stop, 0),
                [Piece(piece.uri, piece.lists.n_bytes) for piece in group],
                nprobe,
                build.uri(folder, name),
            )
            for group, name in zip(groups, names, strict=True)
        ],
        step="finishing",
        things="files",
        memory_bytes=TASK_BYTES + 4 * index_bytes(build.spec, 0),
    )


def finish_flat(
    build: Build, trained: TrainedFile, parts: Sequence[StoredPart], folder: str
) -> list[WrittenFile]:
    """Merge an index without lists into one file, or into files of at most about range_bytes."""
    groups = [list(parts)]
    if build.settings.layout == "ranges":
        groups, held = [], 0
        for part in parts:
            size = part.head.rows * part.head.entry_bytes
            if not groups or held + size > build.settings.range_bytes:
                groups.append([])
                held = 0
            groups[-1].append(part)
            held += size
    return build.run(
        flat_task,
        [
            (build.storage, trained, group, build.settings.range_bytes, build.uri(folder, name))
            for group, name in zip(groups, file_names(build, len(groups)), strict=True)
        ],
        step="merging",
        things="files",
        memory_bytes=TASK_BYTES + 3 * build.settings.range_bytes,
    )


def rebuild_files(
    build: Build, trained: TrainedFile, parts: Sequence[StoredPart], sizes: IdArray, folder: str
) -> list[WrittenFile]:
    """Merge the parts of an IVF index by FAISS itself, where its file layout is not known here."""
    most = build.settings.range_bytes if build.settings.layout == "ranges" else 1 << 62
    ranges = plan_ranges(trained.load(build.storage), sizes, most)
    longest = max(lists.n_bytes for lists in ranges)
    return build.run(
        rebuild_task,
        [
            (build.storage, trained, list(parts), lists, build.uri(folder, f"untuned-{number:05d}"))
            for number, lists in enumerate(ranges)
        ],
        step="merging",
        things="ranges",
        memory_bytes=TASK_BYTES + 3 * longest,
    )


def build_shards(build: Build, trained: TrainedFile) -> list[WrittenFile]:
    """Build HNSW indexes side by side, to be searched together; those that are there are kept.

    They lack the rows that they are measured with; `complete_graphs` adds those.
    """
    groups = build.graph_groups()
    names = [f"{key_of('graph', trained.sha256, [f.sha256 for f in group])}.shard" for group in groups]
    there = build.there("parts")
    if build.settings.verify:
        # A graph has no checksum of its own: its links may be damaged where its vectors are not.
        build.storage.delete([build.uri("parts", name) for name in names if name in there])
        there = {}
    todo = [
        (build.storage, build.root, trained, group, build.uri("parts", name))
        for group, name in zip(groups, names, strict=True)
        if name not in there
    ]
    logger.info("building: %d of %d index shards are to do", len(todo), len(names))
    memory = TASK_BYTES + 3 * build.settings.range_bytes
    build.run(shard_index_task, todo, step="building", things="index shards", memory_bytes=memory)
    return build.run(
        facts_task,
        [
            (
                build.storage,
                build.uri("parts", name),
                sum(fact.rows for fact in group) - sum(map(len, held_rows(group))),
            )
            for group, name in zip(groups, names, strict=True)
        ],
        step="hashing",
        things="index shards",
    )


def complete_graphs(
    build: Build, files: Sequence[WrittenFile], effort: int, folder: str
) -> list[WrittenFile]:
    """Copy graphs with the rows that they lack, and with the tuned efSearch, which plain FAISS then uses."""
    return build.run(
        complete_graph_task,
        [
            (build.storage, build.root, file, group, effort, build.uri(folder, f"shard-{number:05d}.faiss"))
            for number, (file, group) in enumerate(zip(files, build.graph_groups(), strict=True))
        ],
        step="finishing",
        things="files",
        memory_bytes=TASK_BYTES + 3 * max(file.bytes for file in files),
    )


def set_effort(build: Build, files: Sequence[WrittenFile], effort: int, folder: str) -> list[WrittenFile]:
    """Copy files with the tuned nprobe in them, which plain FAISS then uses."""
    names = file_names(build, len(files))
    return build.run(
        set_effort_task,
        [
            (build.storage, file, effort, build.uri(folder, target))
            for file, target in zip(files, names, strict=True)
        ],
        step="finishing",
        things="files",
        memory_bytes=TASK_BYTES + 3 * max(file.bytes for file in files),
    )


def file_names(build: Build, count: int) -> list[str]:
    """Return the names of the files to publish."""
    if build.settings.layout == "single":
        return ["index.faiss"]
    return [f"range-{number:05d}.faiss" for number in range(count)]


def group_shards(facts: Sequence[FileFact], max_rows: int) -> list[tuple[FileFact, ...]]:
    """Group neighbouring shards, of at most so many rows together, so that a change stays local.

    A group ends behind a shard whose hash says so, which is half a group's rows on average; so the
    groups after a shard that came, changed or went are mostly the same as before, and so are their parts.
    """
    groups: list[list[FileFact]] = []
    rows, ended = 0, True
    for fact in facts:
        if ended or rows + fact.rows > max_rows:
            groups.append([])
            rows = 0
        groups[-1].append(fact)
        rows += fact.rows
        ended = int(fact.sha256[:8], 16) / 2**32 < 2 * fact.rows / max_rows
    return [tuple(group) for group in groups]


def read_training(storage: Storage, folder: str) -> Training | None:
    """Read training.json below the folder of an index; None if there is none.

    Raises:
        DatasetMismatchError: it is damaged, or not ours.
    """
    uri = join(folder, "training.json")
    stored = storage.read_optional(uri)
    if stored is None:
        return None
    try:
        return from_json(Training, stored)
    except ValueError as error:
        raise DatasetMismatchError(
            f"{uri}: not a training of ours, or damaged ({error}); move it away to train anew"
        ) from error


def _draw_sample(build: Build, wanted: int) -> list[Any]:
    """Draw rows uniformly over all shards, by row groups; returns references, since a sample may be large."""
    if not wanted:
        return []
    rng = np.random.default_rng(SEED)
    facts = build.shards
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
    return build.run(
        sample_task,
        [(build.storage, build.root, facts[shard], where) for shard, where in sorted(chosen.items())],
        step="sampling",
        things="shards",
        memory_bytes=TASK_BYTES,
        fetch=False,
    )
