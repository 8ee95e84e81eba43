"""The index job: embedding shards to a FAISS index whose recall was measured.

Train once, add in parts, merge by ranges of lists, tune, publish. Parts and merged pieces are named by
what went into them, so a rerun, or a run over a data set that has changed a little, does what is
missing and no more. What was published last stays whole until `index.json` names its successor.
"""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import ray

from bge_ray.dataset.folder import PARALLEL_REQUESTS, Dataset
from bge_ray.errors import RecallError, SettingsError, StorageError
from bge_ray.index.drift import imbalance
from bge_ray.index.factory import Kind, index_bytes
from bge_ray.index.tune import Measurement
from bge_ray.pipeline.engine.cluster import connect
from bge_ray.pipeline.engine.stopping import StopRequest, make_watch
from bge_ray.pipeline.engine.tasks import largest_node
from bge_ray.pipeline.index.inputs import Inputs, read_inputs
from bge_ray.pipeline.index.queries import encode_given
from bge_ray.pipeline.index.recall import HeldOut, Quality, hold_out, tune, tuned_recall
from bge_ray.pipeline.index.steps import (
    Build,
    add_parts,
    build_shards,
    check_count,
    finish_flat,
    finish_ivf,
    get_trained,
    key_of,
    knows_header,
    list_sizes,
    measure_drift,
    merge_parts,
    rebuild_files,
    set_effort,
    sizes_uri,
)
from bge_ray.pipeline.index.tasks import StoredPart, TrainedFile, WrittenFile
from bge_ray.records.dataset import FileFact, from_json, to_json
from bge_ray.records.ids import IdArray
from bge_ray.records.index import INDEX_FORMAT_VERSION, CurvePoint, IndexDescription, Recall, TrainedOn
from bge_ray.records.reports import IndexReport
from bge_ray.report.advice import advise_index
from bge_ray.report.facts import RunFacts, Workers, summarise
from bge_ray.report.index_page import index_page
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings
from bge_ray.storage.concatenate import remove_unfinished
from bge_ray.storage.lease import Lease, is_leased
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.reports import write_report

logger = logging.getLogger(__name__)


# What FAISS calls the effort of a search.
PARAMETERS: dict[Kind, Literal["nprobe", "efSearch"] | None] = {
    Kind.IVF: "nprobe",
    Kind.SHARDS: "efSearch",
    Kind.FLAT: None,
}


def build_index(settings: Settings, stop: StopRequest | None = None) -> IndexDescription:
    """Build the index of a data set, doing only what is not done yet.

    Args:
        settings: needs output.uri, a data set that embed.py completed.
        stop: asked between tasks whether to stop.

    Returns:
        What index.json says; ``reached`` says whether the recall target was.

    Raises:
        SettingsError, CorpusError, DatasetMismatchError: there is no complete data set, or the factory is not
            supported, or the queries are no texts; nothing was written.
        OutputBusyError: another run is building this index.
        IncompleteRunError, IndexBuildError, StorageError: an input or a part is damaged or missing; what was
            published before is as it was.
    """
    settings.require("output.uri")
    facts = RunFacts("index", run_id())
    storage = Storage(settings.output.storage_timeout_s)
    root = str(settings.output.uri)
    inputs = read_inputs(Dataset(storage, root), settings.index)
    current = _current(storage, root, inputs)
    # A run that was cut off after it published has left its lease, and things to sweep.
    if current is not None and not is_leased(storage, join(root, "index")):
        return current
    connect(settings.resources)
    if settings.index.gpus_per_task > largest_node("GPU"):
        raise SettingsError(
            f"index.gpus_per_task {settings.index.gpus_per_task:g}: no node of the cluster has so many GPUs; "
            "set 0 to build on CPUs"
        )
    stop = stop or StopRequest()
    with stop.deferred(), Lease(storage, join(root, "index")) as lease:
        watch = make_watch(lease, stop)
        # The run that held the lease before may have built just this, or embedded more.
        inputs = read_inputs(Dataset(storage, root), settings.index)
        current = _current(storage, root, inputs)
        if current is not None:
            _sweep(storage, root, current)
            return current
        at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
        facts.plan(units=0, rows=inputs.manifest.rows_out)  # its tasks are counted step by step
        facts.start(_workers(settings, at_once), time.time())
        build = Build(
            storage=storage,
            root=root,
            manifest=inputs.manifest,
            spec=inputs.spec,
            settings=settings.index,
            at_once=at_once,
            watch=watch,
            did=facts,
            log_interval_s=settings.report.log_interval_s,
        )
        description, sizes = _build(build, inputs, settings)
        lease.check()
        report = _report(settings, root, facts, description)
        page = index_page(report, sizes)
        write_report(storage, join(root, "index"), page, to_json(report))
        storage.write(build.uri("index.json"), to_json(description))
        _sweep(storage, root, description)
    return description


def plan_index(settings: Settings) -> str:
    """Say what `build_index` would build, without building (``--dry-run``)."""
    settings.require("output.uri")
    dataset = Dataset(Storage(settings.output.storage_timeout_s), str(settings.output.uri))
    inputs = read_inputs(dataset, settings.index)
    manifest, spec = inputs.manifest, inputs.spec
    fresh = _current(dataset.storage, dataset.root, inputs) is not None
    return (
        f"{spec.factory}: {manifest.rows_out:,} vectors in {len(manifest.shards):,} shards, "
        f"{min(spec.training_rows, manifest.rows_out):,} training rows, about "
        f"{index_bytes(spec, manifest.rows_out) / 1e6:,.0f} MB, "
        + ("up to date: nothing to do" if fresh else "to be built")
    )


def index_outcome(settings: Settings, index: IndexDescription) -> str:
    """Say in one line what `build_index` came to.

    Raises:
        RecallError: the index is published, and misses its recall target.
    """
    recall = index.tuned_recall
    effort = f" at {index.parameter} {index.effort}" if index.parameter else ""
    line = (
        f"{index.factory}: {index.ntotal:,} vectors, "
        f"recall@{recall.k} {recall.value:.4f}{effort}, "
        f"{index.recall_after_exact_reranking.value:.4f} with exact re-ranking; "
        f"see {join(str(settings.output.uri), 'index', 'report.html')}"
    )
    if not index.reached:
        raise RecallError(
            f"{line}; index.recall_target {index.recall_target:g} was not reached: the index is "
            "published, search it with exact re-ranking, or build one with a larger code"
        )
    return line


def read_index(storage: Storage, root: str) -> IndexDescription | None:
    """Return the description of the published index, or None.

    Raises:
        StorageError: index.json is damaged, or of another version.
    """
    uri = join(root, "index", "index.json")
    data = storage.read_optional(uri)
    if data is None:
        return None
    try:
        # The version comes first: a description of another version need not look like ours at all.
        version = from_json(_Versioned, data).format_version
        if version != INDEX_FORMAT_VERSION:
            raise StorageError(
                f"{uri}: is of format {version}, this version reads {INDEX_FORMAT_VERSION}; remove it to "
                "build the index anew"
            )
        return from_json(IndexDescription, data)
    except ValueError as error:
        first = " ".join(str(error).split())[:300]
        raise StorageError(f"{uri}: is damaged ({first}); remove it to build the index anew") from error


@dataclass(frozen=True)
class _Versioned:
    """The part of index.json that every version has."""

    format_version: int


def index_files(root: str, index: IndexDescription) -> list[WrittenFile]:
    """Return the files of a published index, with full URIs."""
    return [WrittenFile(join(root, "index", f.path), f.bytes, f.sha256, f.rows) for f in index.files]


def _current(storage: Storage, root: str, inputs: Inputs) -> IndexDescription | None:
    """Return the published index if it is of these inputs and its files are there."""
    current = read_index(storage, root)
    if current is None or current.inputs != inputs.key:
        return None
    for file in index_files(root, current):
        info = storage.info(file.path)
        if info is None or info.size != file.bytes:
            logger.warning("%s: is missing or has another size; building it again", file.path)
            return None
    logger.info("nothing to do: the index of %s is up to date", root)
    return current


def _workers(settings: Settings, at_once: int) -> Workers:
    if settings.index.gpus_per_task:
        gpus = ray.cluster_resources().get("GPU", 0.0)
        return Workers("cuda", gpus, {"tasks": at_once}, model="tasks")
    return Workers("cpu", at_once, {"tasks": at_once}, model="tasks")


def _report(settings: Settings, root: str, facts: RunFacts, index: IndexDescription) -> IndexReport:
    facts.rows_in = facts.rows_out = index.ntotal
    recall = index.tuned_recall
    reached = "reached" if index.reached else "not reached"
    report = IndexReport(
        **summarise(facts, ended=time.time(), price_per_hour=settings.report.price_per_hour),
        key=index.inputs,
        complete=True,
        outcome=f"complete: {index.ntotal:,} vectors; recall@{recall.k} of {index.recall_target:g} {reached}",
        files=index.files,
        settings=settings.model_dump(mode="json"),
        output=root,
        index=index,
    )
    return replace(report, advice=tuple(advise_index(report)))


@dataclass(frozen=True)
class Made:
    """What a build came to; ``kept`` are the URIs of files that the next build starts from."""

    files: list[WrittenFile]
    quality: Quality
    kept: list[str]
    sizes: IdArray | None = None
    drift: float = 0.0


def _build(build: Build, inputs: Inputs, settings: Settings) -> tuple[IndexDescription, IdArray | None]:
    """Build, and return what came of it with the (nlist,) sizes of its lists, if it has lists."""
    started = time.time()
    kind = build.spec.kind
    # First of all, because a model that cannot be loaded should not be noticed after hours.
    given = None
    if inputs.queries is not None:
        with build.step("encoding", "query files", 1) as step:
            given = encode_given(inputs.queries, inputs.dataset.model, settings.model, build.watch)
            step.advance()
    trained = get_trained(build, reuse=True)
    if kind is Kind.SHARDS:
        shards = build_shards(build, trained)
        check_count(build, sum(file.rows for file in shards))
        held_out = hold_out(build, given)
        folder = key_of(inputs.key, trained.sha256)
        quality = tune(build, shards, held_out)
        files = set_effort(build, shards, quality.tuning.chosen.effort, folder, name="shard")
        made = Made(files, quality, [file.path for file in shards])
    else:
        parts = add_parts(build, trained)
        sizes = list_sizes(build, trained, parts)
        drifted = 0.0
        if kind is Kind.IVF:
            drifted = measure_drift(build, trained, sizes)
            if drifted > build.settings.max_drift:
                logger.info("%.0f %% of the vectors are out of place: training anew", 100 * drifted)
                trained = get_trained(build, reuse=False)
                parts = add_parts(build, trained)
                sizes = list_sizes(build, trained, parts)
                measure_drift(build, trained, sizes)
        held_out = hold_out(build, given)
        folder = key_of(inputs.key, trained.sha256)
        made = _merge(build, trained, parts, sizes, held_out, folder)
        made = replace(made, drift=drifted)
    check_count(build, sum(file.rows for file in made.files))
    return _describe(build, inputs, trained, made, len(held_out.queries), time.time() - started), made.sizes


def _merge(
    build: Build,
    trained: TrainedFile,
    parts: list[StoredPart],
    sizes: IdArray,
    held_out: HeldOut,
    folder: str,
) -> Made:
    kept = [part.uri for part in parts]
    if build.spec.kind is Kind.FLAT:
        files = finish_flat(build, trained, parts, folder)
        return Made(files, tune(build, files, held_out), kept)
    if knows_header(build, trained):
        pieces = merge_parts(build, trained, parts, sizes, folder)
        quality = tune(build, pieces, held_out)
        files = finish_ivf(build, trained, pieces, quality.tuning.chosen.effort, folder)
    else:
        untuned = rebuild_files(build, trained, parts, sizes, folder)
        quality = tune(build, untuned, held_out)
        files = set_effort(build, untuned, quality.tuning.chosen.effort, folder, name="index")
    return Made(files, quality, [*kept, sizes_uri(trained)], sizes)


def _describe(
    build: Build, inputs: Inputs, trained: TrainedFile, made: Made, num_queries: int, seconds: float
) -> IndexDescription:
    below = len(build.uri("x")) - 1
    spec, quality, tuning = build.spec, made.quality, made.quality.tuning
    return IndexDescription(
        inputs=inputs.key,
        dataset_fingerprint=build.manifest.dataset_fingerprint,
        factory=spec.factory,
        kind=spec.kind.value,
        metric=spec.metric.value,
        dim=spec.dim,
        ntotal=sum(file.rows for file in made.files),
        nlist=spec.nlist,
        files=tuple(FileFact(f.path[below:], f.bytes, f.sha256, f.rows) for f in made.files),
        training=TrainedOn(trained.uri[below:], trained.sha256),
        parts=tuple(uri[below:] for uri in made.kept),
        parameter=PARAMETERS[spec.kind],
        effort=tuning.chosen.effort,
        recall_target=tuning.target,
        reached=tuning.reached,
        queries=inputs.queries.uri if inputs.queries else "rows of the data set, their own row left out",
        num_queries=num_queries,
        recall=_by_depth(tuning.chosen),
        ceiling=_by_depth(tuning.ceiling) if tuning.ceiling else None,
        ceiling_queries=quality.ceiling_queries,
        recall_after_exact_reranking=quality.rescored,
        gain_of_exact_reranking=quality.rescored.value - tuned_recall(tuning.chosen).value,
        curve=tuple(
            CurvePoint(m.effort, {depth: r.value for depth, r in _by_depth(m).items()}) for m in tuning.curve
        ),
        imbalance=1.0 if made.sizes is None else imbalance(made.sizes),
        drift=made.drift,
        seconds=seconds,
    )


def _by_depth(measured: Measurement) -> dict[str, Recall]:
    return {f"@{recall.k}": recall for recall in measured.recalls}


def _sweep(storage: Storage, root: str, index: IndexDescription) -> None:
    """Remove what the published index does not need, and what killed runs left unfinished."""
    live = {"index.json", "training.json", "report.html", "report.json", "lease.json", index.training.path}
    live |= {*index.parts, *(file.path for file in index.files)}
    # A listing names a local file by its full URI, so only what is below the folder can be compared.
    dead = [
        info.uri
        for info in storage.list_files(join(root, "index"))
        if info.uri.rpartition("/index/")[2] not in live
    ]
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        list(pool.map(lambda uri: storage.delete([uri]), dead))
    remove_unfinished(storage, join(root, "index"))
