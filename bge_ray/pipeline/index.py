"""The index job: embedding shards to a FAISS index whose recall was measured.

Train once, add in parts, merge by ranges of lists, tune, publish. Parts and merged pieces are named by
what went into them, so a rerun, or a run over a data set that has changed a little, does what is
missing and no more. What was published last stays whole until `index.json` names its successor.
"""

import json
import logging
import time
from dataclasses import asdict
from typing import Any

import ray

from bge_ray.errors import IndexBuildError, SettingsError
from bge_ray.index.drift import imbalance
from bge_ray.index.factory import IndexSpec, Kind, Metric, check_factory, choose_factory, index_bytes
from bge_ray.io.dataset import Dataset
from bge_ray.io.lease import Lease
from bge_ray.io.storage import Storage, join
from bge_ray.manifest import Manifest
from bge_ray.pipeline.cluster import connect
from bge_ray.pipeline.index_steps import (
    Build,
    add_parts,
    build_shards,
    finish_flat,
    finish_ivf,
    get_trained,
    key_of,
    measure_drift,
    merge_parts,
)
from bge_ray.pipeline.index_tasks import WrittenFile
from bge_ray.pipeline.recall import hold_out, tune
from bge_ray.pipeline.stopping import StopRequest
from bge_ray.settings import IndexSettings, Settings

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


def build_index(settings: Settings, stop: StopRequest | None = None) -> dict[str, Any]:
    """Build the index of a data set, doing only what is not done yet.

    Args:
        settings: needs output.uri, a data set that embed.py completed.
        stop: asked between tasks whether to stop.

    Returns:
        The content of index.json; ``reached`` says whether the recall target was.

    Raises:
        SettingsError: there is no complete data set, or the factory is not supported.
        OutputBusyError: another run is building this index.
        IndexBuildError, StorageError: an input or a part is damaged.
    """
    settings.require("output.uri")
    storage = Storage(settings.output.storage_timeout_s)
    root = str(settings.output.uri)
    manifest, spec = _inputs(Dataset(storage, root), settings.index)
    current = read_index(storage, root)
    inputs = _inputs_key(manifest, spec, settings.index)
    if current is not None and current["inputs"] == inputs:
        logger.info("nothing to do: the index of %s is up to date", root)
        return current
    connect(settings.resources)
    stop = stop or StopRequest()
    with stop.deferred(), Lease(storage, join(root, "index")) as lease:

        def watch() -> None:
            stop.check()
            if lease.lost.is_set():
                lease.check()

        at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
        build = Build(storage, root, manifest, spec, settings.index, at_once, watch)
        description = _build(build, current, inputs)
        lease.check()
        storage.write(build.uri("index.json"), (json.dumps(description, indent=1) + "\n").encode())
        _sweep(build, description)
    return description


def plan_index(settings: Settings) -> str:
    """Say what `build_index` would build, without building (``--dry-run``)."""
    settings.require("output.uri")
    dataset = Dataset(Storage(settings.output.storage_timeout_s), str(settings.output.uri))
    manifest, spec = _inputs(dataset, settings.index)
    current = read_index(dataset.storage, dataset.root)
    fresh = current is not None and current["inputs"] == _inputs_key(manifest, spec, settings.index)
    return (
        f"{spec.factory}: {manifest.rows_out:,} vectors in {len(manifest.shards):,} shards, "
        f"{spec.training_rows:,} training rows, about {index_bytes(spec, manifest.rows_out) / 1e6:,.0f} MB, "
        + ("up to date: nothing to do" if fresh else "to be built")
    )


def read_index(storage: Storage, root: str) -> dict[str, Any] | None:
    """Return the description of the published index, or None."""
    data = storage.read_optional(join(root, "index", "index.json"))
    return None if data is None else dict(json.loads(data))


def index_files(root: str, description: dict[str, Any]) -> list[WrittenFile]:
    """Return the files of a published index, with full URIs."""
    return [
        WrittenFile(join(root, "index", f["path"]), f["bytes"], f["sha256"], f["rows"])
        for f in description["files"]
    ]


def _inputs(dataset: Dataset, settings: IndexSettings) -> tuple[Manifest, IndexSpec]:
    spec, manifest = dataset.read_spec(), dataset.read_manifest()
    if spec is None or manifest is None:
        raise SettingsError(f"output.uri {dataset.root}: no complete data set there; run embed.py first")
    if not manifest.rows_out:
        raise SettingsError(f"output.uri {dataset.root}: the data set has no vectors")
    if not spec.model.normalize:
        raise SettingsError(
            f"output.uri {dataset.root}: its vectors are not normalised, an index needs model.normalize"
        )
    factory = settings.factory
    if factory == "auto":
        factory = choose_factory(manifest.rows_out, spec.model.dim, settings.memory_bytes)
    try:
        return manifest, check_factory(factory, spec.model.dim, Metric(settings.metric))
    except IndexBuildError as error:
        raise SettingsError(str(error)) from error


def _build(build: Build, current: dict[str, Any] | None, inputs: str) -> dict[str, Any]:
    started = time.time()
    held_out = hold_out(build)
    trained = get_trained(build, reuse=True)
    parts: list[str] = []
    moved, uneven = 0.0, 1.0
    if build.spec.kind is not Kind.SHARDS:
        parts = add_parts(build, trained)
        moved = measure_drift(build, parts, [build.uri(path) for path in current["parts"]] if current else [])
        if moved > build.settings.max_drift:
            logger.info("%.0f %% of the new vectors are out of place: training anew", 100 * moved)
            trained = get_trained(build, reuse=False)
            parts = add_parts(build, trained)
    folder = key_of(inputs, trained.sha256)
    if build.spec.kind is Kind.IVF:
        merged = merge_parts(build, trained, parts, folder)
        uneven = imbalance(merged.sizes)
        tuning, rescored = tune(build, merged.pieces, held_out)
        files = finish_ivf(build, trained, merged, tuning.chosen.effort, folder)
    else:
        flat = build.spec.kind is Kind.FLAT
        files = finish_flat(build, trained, parts, folder) if flat else build_shards(build, trained, folder)
        tuning, rescored = tune(build, files, held_out)
    below = len(build.uri("x")) - 1
    return {
        "format_version": FORMAT_VERSION,
        "inputs": inputs,
        "dataset_fingerprint": build.manifest.dataset_fingerprint,
        "factory": build.spec.factory,
        "kind": build.spec.kind.value,
        "metric": build.spec.metric.value,
        "dim": build.spec.dim,
        "ntotal": sum(file.rows for file in files),
        "nlist": build.spec.nlist,
        "files": [asdict(file) | {"path": file.path[below:]} for file in files],
        "training": {"path": trained.uri[below:], "sha256": trained.sha256},
        "parts": [uri[below:] for uri in parts],
        "nprobe": tuning.chosen.effort,
        "recall_target": tuning.target,
        "reached": tuning.reached,
        "num_queries": len(held_out.own),
        "recall": {f"@{r.k}": asdict(r) for r in tuning.chosen.recalls},
        "ceiling": {f"@{r.k}": asdict(r) for r in tuning.ceiling.recalls} if tuning.ceiling else None,
        "recall_after_exact_reranking": asdict(rescored),
        "curve": [{"nprobe": m.effort, **{f"@{r.k}": r.value for r in m.recalls}} for m in tuning.curve],
        "imbalance": uneven,
        "drift": moved,
        "seconds": time.time() - started,
    }


def _sweep(build: Build, description: dict[str, Any]) -> None:
    """Remove what the published index does not need."""
    live = {
        "index.json",
        "training.json",
        "lease.json",
        description["training"]["path"],
        *description["parts"],
    }
    live |= {file["path"] for file in description["files"]}
    keep = {build.uri(path).rpartition("/index/")[2] for path in live}
    listed = build.storage.list_files(build.uri())
    build.storage.delete(info.uri for info in listed if info.uri.rpartition("/index/")[2] not in keep)


def _inputs_key(manifest: Manifest, spec: IndexSpec, settings: IndexSettings) -> str:
    """Return a name for all that decides the files of the index."""
    shas = [m.embeddings.sha256 for m in manifest.shards if m.embeddings is not None]
    wanted = [settings.layout, settings.range_bytes, settings.recall_target, settings.num_queries]
    return key_of(
        FORMAT_VERSION, manifest.dataset_fingerprint, spec.factory, spec.metric.value, *wanted, shas
    )
