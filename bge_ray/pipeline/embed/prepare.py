"""Before anything is written: what the data set is, what its plan is, and what is left to do."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from bge_ray.dataset.changes import check_changes
from bge_ray.dataset.folder import Dataset
from bge_ray.dataset.pointer import refuse_pointer
from bge_ray.errors import CorpusError, DatasetMismatchError, ModelError, SettingsError, in_a_line
from bge_ray.formats.corpus import list_corpus, resolve_columns
from bge_ray.model.families import dense
from bge_ray.model.feed.chunks import Chunker, splitting_rules
from bge_ray.model.folder import ModelFolder
from bge_ray.model.spec import bytes_of, for_trial, model_folder, resolve_encoder, text_feeder
from bge_ray.model.uncollected import uncollected
from bge_ray.pipeline.embed.planning import (
    extend_plan,
    scan_objects,
    seen_again,
    settle_limits,
    unchanged_objects,
)
from bge_ray.pipeline.embed.sources import NEAR_ROWS, Places, earlier_shards, nearest, shareable
from bge_ray.pipeline.embed.tasks import CorpusUnit, ReadTask, Source, SpanTask
from bge_ray.pipeline.engine.pools import await_pools, cluster_sizes, device_of, encoder_request
from bge_ray.pipeline.engine.tasks import run_tasks
from bge_ray.pipeline.work import refuse_taken
from bge_ray.records.chunking import Chunking
from bge_ray.records.columns import Columns, ColumnType
from bge_ray.records.dataset import DatasetSpec, Manifest, Marker
from bge_ray.records.model import EMBEDDING, Canary, ModelSpec
from bge_ray.records.plan import Plan, Removal, find_removal, span_units, unit_fingerprint
from bge_ray.settings.sections import ChunkingSettings, Settings
from bge_ray.storage.folders import absolute, refuse_collisions, refuse_own_files
from bge_ray.storage.objects import Storage

logger = logging.getLogger(__name__)

# More than any cluster has room for: how many it has is what is asked.
MOST_ENCODERS = 1_000_000
# Weights that every GPU holds, and every node beside what else is at work there.
SURELY_FITS_BYTES = 2_000_000_000
# What the code of a model raises that does not work: transformers' own, or its folder's.
MODEL_FAILURES = (RuntimeError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Planned:
    """All that is known before anything is written: the data set, its plan, and what is to do.

    ``places`` may share texts, with `output.reuse: corpus`.
    """

    dataset: Dataset
    spec: DatasetSpec
    plan: Plan
    previous_number: int
    finished: dict[str, Marker]
    todo: tuple[ReadTask, ...]
    removal: Removal
    places: Places | None = None

    @property
    def todo_units(self) -> list[CorpusUnit]:
        """The units to do, in plan order."""
        return [unit for task in self.todo for unit in task.todo]

    @property
    def todo_rows(self) -> int:
        """Rows of the units to do."""
        return sum(unit.unit.n_rows for unit in self.todo_units)


def prepare(settings: Settings) -> Planned:
    """Resolve, list, scan and plan; reads only."""
    settings.require("corpus.uri", "output.uri")
    inputs = {"corpus.uri": settings.corpus.uri, "model.name": settings.model.name}
    refuse_collisions({"output.uri": settings.output.uri}, inputs, {})
    storage = Storage(settings.output.storage_timeout_s)
    refuse_pointer(storage, settings.output.uri, "output.uri")
    dataset = Dataset(storage, str(settings.output.uri))
    dataset.folder.check_owner()
    spec_there = dataset.read_spec()
    # Not before: a data set of an earlier version has no journal, and its files would count as foreign.
    refuse_taken([dataset.folder])
    check_changes(storage, dataset.root)
    number, previous = dataset.latest_plan()
    if spec_there is None:
        if dataset.read_manifest() is not None:
            raise DatasetMismatchError(
                f"{dataset.root}: dataset.json is gone, and without it nobody knows what the vectors there "
                "are; restore it, or choose another output.uri"
            )
        # A run that died between its plan and its dataset.json has done no unit of it.
        previous = None
    dataset.check_numbers()
    listed = list_corpus(storage, settings.corpus)
    unchanged = unchanged_objects(listed, previous, settings.corpus)
    changed = [info for info in listed if info.uri not in unchanged]
    refuse_own_files("corpus.uri", (info.uri for info in listed), {"output.uri": settings.output.uri})
    model = _resolve_model(settings, spec_there)
    chunking = settle_chunking(settings.chunking, model)
    canaries = spec_there.canaries if spec_there is not None else ()
    if changed and _must_be_tried(model, spec_there):
        canaries = _try_model(settings, model, chunking)
    # A column that no shard has: its type is looked for in all objects, and in the paths of those that stay.
    new_columns = spec_there is not None and set(settings.corpus.keep_columns) - set(spec_there.columns.kept)
    again = [info for info in listed if info.uri in unchanged] if new_columns else []
    scanned = []
    encoders = 1
    if changed:
        sizes = cluster_sizes(settings, [encoder_request(settings, MOST_ENCODERS)], [], lambda: None)
        encoders = sizes.pools["encoders"].count
    limits = settle_limits(settings.batching, changed, encoders, model, chunking)
    if to_scan := [*changed, *again]:
        logger.info("scanning %d of %d corpus objects", len(to_scan), len(listed))
        scanned = scan_objects(storage, to_scan, settings.corpus, limits, settings.report.log_interval_s)
    if spec_there is not None:
        found = resolve_columns(scanned, settings.corpus).kept if new_columns else {}
        columns = _same_columns(settings, spec_there.columns, found)
        unchanged |= seen_again(unchanged, scanned[len(changed) :], columns)
    else:
        columns = resolve_columns(scanned, settings.corpus)
    spec = DatasetSpec(model, columns, canaries, chunking)
    if spec_there is not None:
        spec.check_same(spec_there, dataset.root)
    plan = extend_plan(unchanged, previous, scanned[: len(changed)], columns, limits)
    plan = dataclasses.replace(plan, corpus=absolute(str(settings.corpus.uri)))
    removal = find_removal(previous, plan)
    _refuse_emptied(previous, plan, settings, dataset.root)
    _refuse_large(removal, settings, dataset.root)
    finished = dataset.finished()
    _check_given(dataset, number, previous, finished)
    shards: Mapping[int, list[Source]] = {}
    manifest = dataset.read_manifest()
    if settings.output.reuse != "off":
        shards = earlier_shards(manifest, finished, plan, spec.vector_fingerprint)
    todo, still_finished = _subtract(spec, plan, finished, shards)
    places = None
    if todo and settings.output.reuse == "corpus":
        places = _places(spec, plan, _published(manifest, finished), shards)
    if todo and settings.index.build:
        _check_index(settings, storage, spec, plan)
    if todo and not changed and _must_be_tried(model, spec_there):
        _try_model(settings, model, chunking)
    return Planned(dataset, spec, plan, number, still_finished, todo, removal, places)


def _published(manifest: Manifest | None, finished: Mapping[str, Marker]) -> dict[str, Marker]:
    """Return the markers of the last complete run whose files are there."""
    markers = {marker.unit.name: marker for marker in manifest.shards} if manifest is not None else {}
    return {name: marker for name, marker in markers.items() if finished.get(name) == marker}


def _places(
    spec: DatasetSpec, plan: Plan, published: dict[str, Marker], shards: Mapping[int, list[Source]]
) -> Places:
    """Return who may share texts: all that is not published, be it finished by now or not, and all shards."""
    fresh, _ = _subtract(spec, plan, published, shards)
    return Places.of(shareable(shards, fresh), fresh)


def _check_given(
    dataset: Dataset, number: int, previous: Plan | None, finished: Mapping[str, Marker]
) -> None:
    """Refuse a plan that is older than what was made by a later one: it would give numbers a second time."""
    given = max((marker.unit.object_no for marker in finished.values()), default=-1)
    if previous is None or given < previous.next_object_no:
        return
    # Another run may have planned meanwhile; the lease settles that.
    if dataset.latest_plan()[0] == number:
        raise DatasetMismatchError(
            f"{dataset.root}: has vectors of object {given}, and the newest file of plan/ knows of "
            f"{previous.next_object_no} objects: a newer one is gone; restore it, or choose another "
            "output.uri"
        )


def _refuse_emptied(previous: Plan | None, plan: Plan, settings: Settings, root: str) -> None:
    """Refuse to leave nothing of a data set, whatever may be removed: a corpus without a row is broken."""
    rows = sum(known.n_rows for known in previous.objects) if previous is not None else 0
    if rows and not any(there.n_rows for there in plan.objects):
        raise CorpusError(
            f"corpus.uri {settings.corpus.uri}: none of its {len(plan.objects):,} objects has a row, and the "
            f"data set {root} has {rows:,}, all of which would go. Mend the corpus; or choose another "
            "output.uri, or delete the data set, if it is no longer wanted"
        )


def _refuse_large(removal: Removal, settings: Settings, root: str) -> None:
    """Refuse to take more out of a data set than allowed: another corpus.uri looks like a shrunken corpus."""
    if not removal:
        return
    allowed = settings.output.max_removed_fraction
    if removal.rows > allowed * removal.rows_before:
        raise CorpusError(
            f"corpus.uri {settings.corpus.uri}: {removal} of the data set {root} are not there any more. "
            f"output.max_removed_fraction allows {allowed:.0%}: raise it if they are to go, mend corpus.uri, "
            "or choose another output.uri"
        )
    logger.warning("gone from the corpus, and with this run from the data set: %s", removal)


def _check_index(settings: Settings, storage: Storage, spec: DatasetSpec, plan: Plan) -> None:
    """Refuse here what the index job would refuse after hours of embedding."""
    from bge_ray.pipeline.index.inputs import settle_spec, trained_factory  # takes faiss
    from bge_ray.pipeline.index.queries import given_queries

    trained = trained_factory(storage, str(settings.output.uri))
    settle_spec(spec, sum(unit.n_rows for unit in plan.units()), settings, trained)
    given_queries(storage, settings)


def _subtract(
    spec: DatasetSpec, plan: Plan, finished: dict[str, Marker], shards: Mapping[int, list[Source]]
) -> tuple[tuple[ReadTask, ...], dict[str, Marker]]:
    """Return what is to be read, and the markers that the plan still wants."""
    spans: dict[tuple[int, int], list[SpanTask]] = {}
    wanted: dict[str, Marker] = {}
    rows_fingerprint = spec.rows_fingerprint
    for corpus_object in plan.objects:
        bare = dataclasses.replace(corpus_object, spans=())
        numbers = (corpus_object.object_no, *corpus_object.earlier)
        planned = [
            (
                span,
                [
                    (unit, unit_fingerprint(rows_fingerprint, corpus_object, unit))
                    for unit in span_units(corpus_object.object_no, span)
                ],
            )
            for span in corpus_object.spans
        ]
        # What these very units have made is no source: the first attempt at them had none of it, and who is
        # encoded in other company differs in the last bits.
        own = {fingerprint for _, units in planned for _, fingerprint in units}
        earlier = [source for number in numbers for source in shards.get(number, ())]
        sources = [source for source in earlier if source.fingerprint not in own]
        for span, fingerprints in planned:
            units = []
            for unit, fingerprint in fingerprints:
                marker = finished.get(unit.name)
                if marker is not None and marker.fingerprint == fingerprint:
                    wanted[unit.name] = marker
                else:
                    units.append(CorpusUnit(unit, fingerprint, corpus_object.uri))
            place = (
                corpus_object.object_no if corpus_object.group is None else corpus_object.group,
                span.first_row,
            )
            n_rows = sum(span.unit_rows)
            near = nearest(sources, span.first_row, n_rows, NEAR_ROWS + 2 * n_rows)
            spans.setdefault(place, []).append(SpanTask(bare, span, tuple(units), tuple(near)))
    tasks = (ReadTask(tuple(together)) for together in spans.values())
    return tuple(task for task in tasks if task.todo), wanted


def _resolve_model(settings: Settings, there: DatasetSpec | None) -> ModelSpec:
    """Return the model, with dtypes and kernels of the data set that is there, wherever this run executes."""
    asked = settings.model
    if there is not None and asked.dtype == "auto":
        asked = asked.model_copy(update={"dtype": there.model.dtype})
    on_gpu, kept = False, there is not None and asked.kernels == "auto"
    if asked.dtype == "auto" or (asked.kernels == "auto" and asked.dtype != "float32" and not kept):
        on_gpu = device_of(settings, encoder_request(settings, 1), lambda: None) == "cuda"
    model = resolve_encoder(asked, on_gpu=on_gpu)
    if there is not None and kept:
        model = model.computed_like(there.model)
    if settings.output.dtype != "auto":
        return model.stored_as(settings.output.dtype)
    return model if there is None else model.stored_like(there.model)


def _must_be_tried(model: ModelSpec, there: DatasetSpec | None) -> bool:
    """Tell whether nobody has loaded these files yet, or they hold code that may not be run any more."""
    return there is None or "auto_map" in ModelFolder(model_folder(model)).config


def settle_chunking(asked: ChunkingSettings, model: ModelSpec) -> Chunking | None:
    """Return how texts are cut; None: not at all.

    Raises:
        SettingsError: chunks are longer than what the model keeps of a text, or the model has no late ones.
    """
    if asked.max_tokens is None:
        return None
    if asked.late:
        _check_late(model)
    if asked.max_tokens > model.max_length:
        raise SettingsError(
            f"chunking.max_tokens {asked.max_tokens}: the model keeps {model.max_length} tokens of a text; "
            "lower it, or raise model.max_length if the model has positions for more"
        )
    return Chunking(
        max_tokens=asked.max_tokens,
        overlap_tokens=asked.overlap_tokens,
        boundary=asked.boundary,
        language=asked.language,
        titles=asked.titles,
        keep_text=asked.keep_text,
        rules=splitting_rules(late=asked.late),
        late=asked.late,
    )


def _check_late(model: ModelSpec) -> None:
    """Refuse late chunks of a model that makes no vector of a span: the mean of its tokens' states."""
    others = [output.name for output in model.outputs if output.name != EMBEDDING]
    if others:
        raise SettingsError(
            f"chunking.late: {', '.join(others)} of model.outputs {'has' if len(others) == 1 else 'have'} no "
            f"late form, {EMBEDDING} alone has; take them out, or set chunking.late=false"
        )
    if model.pooling != "mean" or model.family != dense.NAME:
        raise SettingsError(
            f"chunking.late: is for encoders that pool by the mean of all tokens, and {model.name} (family "
            f"{model.family}) pools by {model.pooling}; set chunking.late=false, or take another model"
        )


def _try_model(settings: Settings, model: ModelSpec, chunking: Chunking | None) -> tuple[Canary, ...]:
    """Refuse here, before anything is written, what an encoder would refuse to load; return its canaries."""
    encoders = encoder_request(settings, 1)
    await_pools(settings, [encoders], lambda: None)
    folder = model_folder(model)
    size = bytes_of(model, folder)
    if size > SURELY_FITS_BYTES and device_of(settings, encoders, lambda: None) == "cuda":
        gpus = 1.0 if encoders.gpus is None else encoders.gpus
        list(run_tasks(room_task, [(model,)], at_once=1, watch=lambda: None, num_cpus=0, num_gpus=gpus))
    trial = for_trial(model, folder)
    needed = bytes_of(trial, folder)
    # In a task, because it takes torch: seconds, and more memory than all else that a driver holds.
    [(_, canaries)] = run_tasks(
        try_task,
        [(trial, chunking, settings.model.trust_remote_code)],
        at_once=1,
        watch=lambda: None,
        num_cpus=0,
        memory_bytes=needed if needed > SURELY_FITS_BYTES else 0,
    )
    found: tuple[Canary, ...] = canaries
    return found


def room_task(spec: ModelSpec) -> None:
    """Refuse a model that is larger than the GPU of this task."""
    import torch

    from bge_ray.model.run.memory import check_room

    check_room(spec, model_folder(spec), torch.device("cuda"))


@uncollected()
def try_task(spec: ModelSpec, chunking: Chunking | None, trust_remote_code: bool) -> tuple[Canary, ...]:
    """Load a model on a CPU and what cuts its texts, and return what it makes of the canary texts.

    Raises:
        ModelError: it cannot be loaded, or fails on them.
    """
    from bge_ray.model.canary import make_canaries
    from bge_ray.model.run.model import Place, open_model

    if chunking is not None:
        Chunker(text_feeder(spec, trust_remote_code=trust_remote_code), chunking)
    try:
        model = open_model(spec, model_folder(spec), Place(trust_remote_code=trust_remote_code))
        return make_canaries(model, text_feeder(spec, trust_remote_code=trust_remote_code))
    except MODEL_FAILURES as error:
        raise ModelError(
            f"{spec.name}: fails on texts of a few words, before anything is written: "
            f"{type(error).__name__}: {in_a_line(error)}"
        ) from error


def _same_columns(settings: Settings, there: Columns, new: Mapping[str, ColumnType]) -> Columns:
    """Return the columns of the data set, changed where the settings name others; ``new`` ones by type."""
    corpus = settings.corpus
    return Columns(
        id=there.id if corpus.id_column == "auto" else corpus.id_column,
        text=corpus.text_column,
        title=there.title if corpus.title_column == "auto" else corpus.title_column,
        kept={name: there.kept[name] if name in there.kept else new[name] for name in corpus.keep_columns},
    )
