"""Before anything is written: what the data set is, what its plan is, and what is left to do."""

import dataclasses
import logging
from dataclasses import dataclass

import pyarrow as pa
import ray

from bge_ray.dataset.folder import Dataset
from bge_ray.errors import CorpusError
from bge_ray.formats.corpus import list_corpus, resolve_columns
from bge_ray.model.folder import ModelFolder
from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
from bge_ray.pipeline.embed.planning import extend_plan, scan_objects, unchanged_objects
from bge_ray.pipeline.embed.tasks import CorpusUnit, SpanTask
from bge_ray.pipeline.engine.pools import await_pools, device_of, encoder_request
from bge_ray.pipeline.engine.tasks import run_tasks
from bge_ray.records.columns import Columns, ColumnType
from bge_ray.records.dataset import DatasetSpec, Marker
from bge_ray.records.model import EMBEDDING, Canary, ModelSpec
from bge_ray.records.plan import Plan, Removal, UnitLimits, find_removal, span_units, unit_fingerprint
from bge_ray.settings.sections import Settings
from bge_ray.storage.folders import refuse_collisions, refuse_own_files
from bge_ray.storage.objects import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """All that is known before anything is written: the data set, its plan, and what is to do."""

    dataset: Dataset
    spec: DatasetSpec
    plan: Plan
    previous_number: int
    finished: dict[str, Marker]
    todo: tuple[SpanTask, ...]
    removal: Removal

    @property
    def todo_units(self) -> list[CorpusUnit]:
        """The units to do, in plan order."""
        return [unit for span in self.todo for unit in span.todo]

    @property
    def todo_rows(self) -> int:
        """Rows of the units to do."""
        return sum(unit.unit.n_rows for unit in self.todo_units)


def prepare(settings: Settings) -> Planned:
    """Resolve, list, scan and plan; reads only."""
    settings.require("corpus.uri", "output.uri")
    refuse_collisions({"output.uri": settings.output.uri}, {"corpus.uri": settings.corpus.uri}, {})
    storage = Storage(settings.output.storage_timeout_s)
    dataset = Dataset(storage, str(settings.output.uri))
    dataset.folder.check_owner()
    spec_there = dataset.read_spec()
    # Not before: a data set of an earlier version has no journal, and its files would count as foreign.
    dataset.folder.refuse_foreign(dataset.folder.names)
    number, previous = dataset.latest_plan()
    listed = list_corpus(storage, settings.corpus)
    unchanged = unchanged_objects(listed, previous, settings.corpus)
    changed = [info for info in listed if info.uri not in unchanged]
    refuse_own_files("corpus.uri", (info.uri for info in listed), {"output.uri": settings.output.uri})
    model = _resolve_model(settings, spec_there)
    canaries = spec_there.canaries if spec_there is not None else ()
    if changed and _must_be_tried(model, spec_there):
        canaries = _try_model(settings, model)
    row_bytes = sum(output.row_bytes for output in model.outputs)
    limits = UnitLimits(settings.batching.unit_rows, settings.batching.unit_bytes, row_bytes)
    scanned = []
    if changed:
        await_pools(settings, [encoder_request(settings, 1)], lambda: None)
        logger.info("scanning %d of %d corpus objects", len(changed), len(listed))
        tasks = min(len(changed), max(1, int(ray.cluster_resources().get("CPU", 1))))
        interval_s = settings.report.log_interval_s
        scanned = scan_objects(storage, changed, settings.corpus, limits, tasks, interval_s)
    if spec_there is not None:
        columns = _same_columns(settings, spec_there.columns)
    else:
        columns = resolve_columns(scanned, settings.corpus)
    spec = DatasetSpec(model, columns, canaries)
    if spec_there is not None:
        spec.check_same(spec_there, dataset.root)
    plan = extend_plan(unchanged, previous, scanned, columns)
    removal = find_removal(previous, plan)
    _refuse_large(removal, settings, dataset.root)
    todo, still_finished = _subtract(spec, plan, dataset.finished())
    if todo and settings.index.build:
        _check_index(settings, storage, spec, plan)
    if todo and not changed and _must_be_tried(model, spec_there):
        _try_model(settings, model)
    return Planned(dataset, spec, plan, number, still_finished, todo, removal)


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
    spec: DatasetSpec, plan: Plan, finished: dict[str, Marker]
) -> tuple[tuple[SpanTask, ...], dict[str, Marker]]:
    """Return the spans with something to do, and the markers that the plan still wants."""
    todo: list[SpanTask] = []
    wanted: dict[str, Marker] = {}
    rows_fingerprint = spec.rows_fingerprint
    for corpus_object in plan.objects:
        bare = dataclasses.replace(corpus_object, spans=())
        for span in corpus_object.spans:
            units = []
            for unit in span_units(corpus_object.object_no, span):
                fingerprint = unit_fingerprint(rows_fingerprint, corpus_object, unit)
                marker = finished.get(unit.name)
                if marker is not None and marker.fingerprint == fingerprint:
                    wanted[unit.name] = marker
                else:
                    units.append(CorpusUnit(unit, fingerprint, corpus_object.uri))
            if units:
                todo.append(SpanTask(bare, span, tuple(units)))
    return tuple(todo), wanted


def _resolve_model(settings: Settings, there: DatasetSpec | None) -> ModelSpec:
    """Return the model, with the dtypes of the data set that is there wherever a later run executes."""
    asked = settings.model
    if there is not None and asked.dtype == "auto":
        asked = asked.model_copy(update={"dtype": there.model.dtype})
    on_gpu = False
    if asked.dtype == "auto":
        on_gpu = device_of(settings, encoder_request(settings, 1), lambda: None) == "cuda"
    model = resolve_encoder(asked, on_gpu=on_gpu)
    if settings.output.dtype != "auto":
        return model.stored_as(settings.output.dtype)
    return model if there is None else model.stored_as(there.model.output(EMBEDDING).dtype)


def _must_be_tried(model: ModelSpec, there: DatasetSpec | None) -> bool:
    """Tell whether nobody has loaded these files yet, or they hold code that may not be run any more."""
    return there is None or "auto_map" in ModelFolder(model_folder(model)).config


def _try_model(settings: Settings, model: ModelSpec) -> tuple[Canary, ...]:
    """Refuse here, before anything is written, what an encoder would refuse to load; return its canaries."""
    await_pools(settings, [encoder_request(settings, 1)], lambda: None)
    # In a task, because it takes torch: seconds, and more memory than all else that a driver holds.
    arguments = [(model, settings.model.trust_remote_code)]
    [(_, canaries)] = run_tasks(try_task, arguments, at_once=1, watch=lambda: None, num_cpus=0)
    found: tuple[Canary, ...] = canaries
    return found


def try_task(spec: ModelSpec, trust_remote_code: bool) -> tuple[Canary, ...]:
    """Load a model on a CPU, and return what it makes of the canary texts."""
    from bge_ray.model.canary import make_canaries
    from bge_ray.model.run.model import Model, Place

    spec = dataclasses.replace(spec, dtype="float32").stored_as("float32")
    model = Model(spec, model_folder(spec), Place(trust_remote_code=trust_remote_code))
    return make_canaries(model, text_feeder(spec, trust_remote_code=trust_remote_code))


def _same_columns(settings: Settings, there: Columns) -> Columns:
    """Return the columns of the data set, changed where the settings name others."""
    corpus = settings.corpus
    return Columns(
        id=there.id if corpus.id_column == "auto" else corpus.id_column,
        text=corpus.text_column,
        title=there.title if corpus.title_column == "auto" else corpus.title_column,
        kept={name: there.kept.get(name, ColumnType.of(pa.string())) for name in corpus.keep_columns},
    )
