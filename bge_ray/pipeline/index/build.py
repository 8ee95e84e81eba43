"""An index build from its inputs to what is published: the steps in their order."""

import logging
import time
from dataclasses import dataclass, replace
from typing import Literal

from bge_ray.index.drift import imbalance
from bge_ray.index.factory import Kind
from bge_ray.index.tune import Measurement
from bge_ray.pipeline.index.candidates import HeldOut
from bge_ray.pipeline.index.inputs import Inputs
from bge_ray.pipeline.index.queries import encode_given
from bge_ray.pipeline.index.recall import Quality, hold_out, tune
from bge_ray.pipeline.index.steps import (
    Build,
    add_parts,
    build_shards,
    check_count,
    complete_graphs,
    finish_flat,
    finish_ivf,
    get_trained,
    key_of,
    knows_header,
    list_sizes,
    measure_drift,
    merge_parts,
    note_ceiling,
    read_training,
    rebuild_files,
    set_effort,
    sizes_uri,
)
from bge_ray.pipeline.index.tasks import StoredPart, TrainedFile, WrittenFile
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import IdArray
from bge_ray.records.index import SHARD_DIGITS, CurvePoint, IndexDescription, Recall, TrainedOn
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

    trained: TrainedFile
    files: list[WrittenFile]
    quality: Quality
    kept: list[str]
    sizes: IdArray | None = None
    drift: float = 0.0


def carry_build(build: Build, inputs: Inputs, settings: Settings) -> tuple[IndexDescription, IdArray | None]:
    """Build, and return what came of it with the (nlist,) sizes of its lists, if it has lists."""
    started = time.time()
    # First of all, because a model that cannot be loaded should not be noticed after hours.
    given = None
    if inputs.queries is not None:
        with build.step("encoding", "query files", 1) as step:
            given = encode_given(inputs.queries, inputs.dataset, settings.model, build.watch)
            step.advance()
    held_out = hold_out(build, given)
    reuse = not build.settings.retrain
    if build.spec.kind is Kind.SHARDS:
        made = _build_graphs(build, inputs.key, held_out, reuse=reuse)
    else:
        made = _build_lists(build, inputs.key, held_out, reuse=reuse)
        if reuse and _is_outworn(build, made):
            logger.info("the target is missed, which the training reached when it was new: training anew")
            made = _build_lists(build, inputs.key, held_out, reuse=False)
    check_count(build, sum(file.rows for file in made.files))
    return _describe(build, inputs, made, held_out, time.time() - started), made.sizes


def _build_graphs(build: Build, key: str, held_out: HeldOut, *, reuse: bool) -> Made:
    trained = get_trained(build, reuse=reuse)
    graphs = build_shards(build, trained)
    quality = tune(build, graphs, held_out)
    files = complete_graphs(build, graphs, quality.tuning.chosen.effort, key_of(key, trained.sha256))
    return Made(trained, files, quality, [file.path for file in graphs])


def _build_lists(build: Build, key: str, held_out: HeldOut, *, reuse: bool) -> Made:
    """Take the training that is there or train, add, merge, tune; train anew if vectors lie elsewhere."""
    trained = get_trained(build, reuse=reuse)
    parts = add_parts(build, trained)
    sizes = list_sizes(build, trained, parts)
    drifted = 0.0
    if build.spec.kind is Kind.IVF:
        drifted = measure_drift(build, trained, sizes)
        if drifted > build.settings.max_drift and _can_retrain(build, trained):
            logger.info("%.0f %% of the vectors are out of place: training anew", 100 * drifted)
            trained = get_trained(build, reuse=False)
            parts = add_parts(build, trained)
            sizes = list_sizes(build, trained, parts)
            measure_drift(build, trained, sizes)
    made = _merge(build, trained, parts, sizes, held_out, key_of(key, trained.sha256))
    ceiling = made.quality.tuning.ceiling
    if ceiling is not None and build.is_fresh(trained):
        note_ceiling(build, trained, ceiling.at(made.quality.k).value)
    return replace(made, drift=drifted)


def _can_retrain(build: Build, trained: TrainedFile) -> bool:
    """Tell whether another training would differ, and there are rows enough for one."""
    if build.is_fresh(trained):
        return False
    if build.manifest.vectors < build.spec.min_training_rows:
        logger.warning(
            "%s needs %s vectors to train anew, there are %s: the old training stays",
            build.spec.factory,
            f"{build.spec.min_training_rows:,}",
            f"{build.manifest.vectors:,}",
        )
        return False
    return True


def _is_outworn(build: Build, made: Made) -> bool:
    """Tell whether a missed target is the training's fault: one that reached it when it was new."""
    if made.quality.tuning.reached or build.spec.kind is not Kind.IVF:
        return False
    there = read_training(build.storage, build.folder.uri)
    was = there.ceiling if there is not None else None
    return (was is None or was >= build.settings.recall_target) and _can_retrain(build, made.trained)


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
        return Made(trained, files, tune(build, files, held_out), kept)
    if knows_header(build, trained):
        pieces = merge_parts(build, trained, parts, sizes, folder)
        quality = tune(build, pieces, held_out)
        files = finish_ivf(build, trained, pieces, quality.tuning.chosen.effort, folder)
    else:
        untuned = rebuild_files(build, trained, parts, sizes, folder)
        quality = tune(build, untuned, held_out)
        files = set_effort(build, untuned, quality.tuning.chosen.effort, folder)
    return Made(trained, files, quality, [*kept, sizes_uri(trained)], sizes)


def _describe(
    build: Build, inputs: Inputs, made: Made, held_out: HeldOut, seconds: float
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
        shards=tuple(fact.sha256[:SHARD_DIGITS] for fact in build.shards),
        training=TrainedOn(made.trained.uri[below:], made.trained.sha256),
        parts=tuple(uri[below:] for uri in made.kept),
        parameter=PARAMETERS[spec.kind],
        effort=tuning.chosen.effort,
        recall_target=tuning.target,
        k=quality.k,
        rescore=build.rescore,
        results=build.results,
        reached=tuning.reached,
        queries=held_out.source,
        num_queries=len(held_out.queries),
        recall=_by_depth(tuning.chosen),
        recall_of_codes=_by_depth(quality.of_codes),
        ceiling=_by_depth(tuning.ceiling) if tuning.ceiling else None,
        ceiling_queries=quality.ceiling_queries,
        recall_after_exact_reranking=quality.rescored,
        reranked_candidates=quality.reranked_candidates,
        gain_of_exact_reranking=quality.rescored.value - quality.of_codes.at(quality.k).value,
        curve=tuple(
            CurvePoint(m.effort, {depth: r.value for depth, r in _by_depth(m).items()}) for m in tuning.curve
        ),
        imbalance=1.0 if made.sizes is None else imbalance(made.sizes),
        drift=made.drift,
        seconds=seconds,
    )


def _by_depth(measured: Measurement) -> dict[str, Recall]:
    return {f"@{recall.k}": recall for recall in measured.recalls}
