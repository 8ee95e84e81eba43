"""An index build from its inputs to what is published: the steps in their order."""

import logging
import time
from dataclasses import dataclass, replace
from typing import Literal

from bge_ray.index.drift import imbalance
from bge_ray.index.factory import Kind
from bge_ray.index.tune import Measurement
from bge_ray.pipeline.index.inputs import Inputs
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
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import IdArray
from bge_ray.records.index import CurvePoint, IndexDescription, Recall, TrainedOn
from bge_ray.settings.sections import Settings

logger = logging.getLogger(__name__)

# What FAISS calls the effort of a search.
PARAMETERS: dict[Kind, Literal["nprobe", "efSearch"] | None] = {
    Kind.IVF: "nprobe",
    Kind.SHARDS: "efSearch",
    Kind.FLAT: None,
}


@dataclass(frozen=True)
class Made:
    """What a build came to; ``kept`` are the URIs of files that the next build starts from."""

    files: list[WrittenFile]
    quality: Quality
    kept: list[str]
    sizes: IdArray | None = None
    drift: float = 0.0


def carry_build(build: Build, inputs: Inputs, settings: Settings) -> tuple[IndexDescription, IdArray | None]:
    """Build, and return what came of it with the (nlist,) sizes of its lists, if it has lists."""
    started = time.time()
    kind = build.spec.kind
    # First of all, because a model that cannot be loaded should not be noticed after hours.
    given = None
    if inputs.queries is not None:
        with build.step("encoding", "query files", 1) as step:
            given = encode_given(inputs.queries, inputs.dataset, settings.model, build.watch)
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
        vector_fingerprint=build.manifest.vector_fingerprint,
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
