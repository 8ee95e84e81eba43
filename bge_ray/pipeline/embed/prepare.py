"""Before anything is written: what the data set is, what its plan is, and what is left to do."""

import dataclasses
import logging
from dataclasses import dataclass

import pyarrow as pa
import ray

from bge_ray.dataset.folder import Dataset
from bge_ray.formats.corpus import resolve_columns
from bge_ray.model.source import fetch_model, read_config, resolve_model
from bge_ray.pipeline.embed.planning import extend_plan, find_changes, scan_objects
from bge_ray.pipeline.embed.tasks import SpanTask
from bge_ray.pipeline.engine.cluster import cluster_sizes, connect
from bge_ray.pipeline.engine.payload import UnitTask
from bge_ray.pipeline.engine.tasks import run_tasks
from bge_ray.records.columns import Columns, ColumnType
from bge_ray.records.dataset import (
    DatasetSpec,
    Marker,
    ModelSpec,
    Plan,
    UnitLimits,
    span_units,
    unit_fingerprint,
)
from bge_ray.records.ids import VALUE_BYTES
from bge_ray.settings.sections import Settings
from bge_ray.storage.objects import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """All that is known before anything is written: the data set, its plan, and what is to do."""

    dataset: Dataset
    spec: DatasetSpec
    plan: Plan
    previous_number: int
    finished: dict[str, Marker]
    todo: tuple[SpanTask, ...]

    @property
    def todo_units(self) -> list[UnitTask]:
        """The units to do, in plan order."""
        return [task for span in self.todo for task in span.todo]

    @property
    def todo_rows(self) -> int:
        """Rows of the units to do."""
        return sum(task.unit.n_rows for task in self.todo_units)


def prepare(settings: Settings) -> Work:
    """Resolve, list, scan and plan; reads only."""
    settings.require("corpus.uri", "output.uri")
    storage = Storage(settings.output.storage_timeout_s)
    dataset = Dataset(storage, str(settings.output.uri))
    spec_there = dataset.read_spec()
    number, previous = dataset.latest_plan()
    listed, changed = find_changes(storage, settings.corpus, previous)
    model = _resolve_model(settings, spec_there)
    dtype = _output_dtype(settings, spec_there, model)
    limits = UnitLimits(
        settings.batching.unit_rows, settings.batching.unit_bytes, model.dim * VALUE_BYTES[dtype]
    )
    scanned = []
    if changed:
        _check_loads(settings, model, spec_there)
        connect(settings.resources)
        logger.info("scanning %d of %d corpus objects", len(changed), len(listed))
        tasks = min(len(changed), max(1, int(ray.cluster_resources().get("CPU", 1))))
        scanned = scan_objects(storage, changed, settings.corpus, limits, tasks)
    if spec_there is not None:
        columns = _same_columns(settings, spec_there.columns)
    else:
        columns = resolve_columns(scanned, settings.corpus)
    spec = DatasetSpec(model, columns, dtype)
    if spec_there is not None:
        spec.check_same(spec_there, dataset.root)
    plan = extend_plan(listed, previous, scanned, columns)
    finished = dataset.finished()
    todo, still_finished = _subtract(spec, plan, finished)
    if todo and settings.index.build:
        _check_index(settings, storage, spec, plan)
    if todo and not changed:
        _check_loads(settings, model, spec_there)
    return Work(dataset, spec, plan, number, still_finished, todo)


def _check_index(settings: Settings, storage: Storage, spec: DatasetSpec, plan: Plan) -> None:
    """Refuse here what the index job would refuse after hours of embedding."""
    from bge_ray.pipeline.index.inputs import settle_spec  # takes faiss
    from bge_ray.pipeline.index.queries import given_queries

    settle_spec(spec, sum(unit.n_rows for unit in plan.units()), settings.index)
    given_queries(storage, settings.index)


def _subtract(
    spec: DatasetSpec, plan: Plan, finished: dict[str, Marker]
) -> tuple[tuple[SpanTask, ...], dict[str, Marker]]:
    """Return the spans with something to do, and the markers that the plan still wants."""
    todo: list[SpanTask] = []
    wanted: dict[str, Marker] = {}
    dataset_fingerprint = spec.fingerprint
    for corpus_object in plan.objects:
        bare = dataclasses.replace(corpus_object, spans=())
        for span in corpus_object.spans:
            tasks = []
            for unit in span_units(corpus_object.object_no, span):
                fingerprint = unit_fingerprint(dataset_fingerprint, corpus_object, unit)
                marker = finished.get(unit.name)
                if marker is not None and marker.fingerprint == fingerprint:
                    wanted[unit.name] = marker
                else:
                    tasks.append(UnitTask(unit, fingerprint, corpus_object.uri))
            if tasks:
                todo.append(SpanTask(bare, span, tuple(tasks)))
    return tuple(todo), wanted


def _resolve_model(settings: Settings, there: DatasetSpec | None) -> ModelSpec:
    model = settings.model
    if there is not None and model.dtype == "auto":
        # A data set keeps its dtype wherever a later run happens to execute.
        model = model.model_copy(update={"dtype": there.model.dtype})
    on_gpu = model.dtype == "auto" and cluster_sizes(settings.resources).encoder_gpus > 0
    return resolve_model(model, on_gpu=on_gpu)


def _check_loads(settings: Settings, model: ModelSpec, there: DatasetSpec | None) -> None:
    """Refuse here, before anything is written, what an encoder would refuse to load."""
    if there is not None and "auto_map" not in read_config(fetch_model(model.name, model.revision)[0]):
        return  # the run that made this data set has tried the same files, which hold no code
    connect(settings.resources)
    # In a task, because it takes torch: seconds, and more memory than all else that a driver holds.
    arguments = [(model.name, model.revision, settings.model.trust_remote_code)]
    list(run_tasks(_load_config, arguments, at_once=1, watch=lambda: None, num_cpus=0))


def _load_config(name: str, revision: str | None, trust_remote_code: bool) -> None:
    from bge_ray.model.run.load import load_config

    load_config(fetch_model(name, revision)[0], trust_remote_code=trust_remote_code)


def _output_dtype(settings: Settings, there: DatasetSpec | None, model: ModelSpec) -> str:
    if settings.output.dtype != "auto":
        return settings.output.dtype
    if there is not None:
        return there.dtype
    return "float32" if model.dtype == "float32" else "float16"


def _same_columns(settings: Settings, there: Columns) -> Columns:
    """Return the columns of the data set, changed where the settings name others."""
    corpus = settings.corpus
    return Columns(
        id=there.id if corpus.id_column == "auto" else corpus.id_column,
        text=corpus.text_column,
        title=there.title if corpus.title_column == "auto" else corpus.title_column,
        kept={name: there.kept.get(name, ColumnType.of(pa.string())) for name in corpus.keep_columns},
    )
