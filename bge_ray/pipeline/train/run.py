"""Ray's part of a training: the workers, replaced where they die, and the measurement of what they made."""

import math
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from bge_ray.errors import IncompleteRunError, ModelError, SettingsError
from bge_ray.formats.training import Example
from bge_ray.model.spec import model_folder, resolve_encoder, resolve_reranker
from bge_ray.model.train.base import Base
from bge_ray.model.train.examples import SCHEMA, HeldOutQuery, Schedule
from bge_ray.pipeline.engine.cluster import connect, is_shared, root_cause
from bge_ray.pipeline.engine.nodes import await_nodes
from bge_ray.pipeline.engine.progress import Progress
from bge_ray.pipeline.engine.stopping import POLL_S
from bge_ray.pipeline.engine.tasks import largest_node, run_tasks
from bge_ray.pipeline.train.loop import Board, TrainingJob, prepare_process, train_loop
from bge_ray.pipeline.train.stored import StoredFolder, restore
from bge_ray.records.model import ModelSpec
from bge_ray.report.facts import RunFacts, Workers
from bge_ray.report.words import clock
from bge_ray.settings.sections import ModelSettings, RerankSettings, Settings
from bge_ray.storage.objects import Storage


@dataclass(frozen=True)
class Team:
    """The workers of a training: how many, and the CPUs and GPUs of each."""

    workers: int
    cpus: int
    gpus: float


def settle_team(settings: Settings, watch: Callable[[], None]) -> Team:
    """Join or start the cluster, and settle what each worker has.

    Raises:
        SettingsError: the cluster is this job's own, and too small.
    """
    asked = settings.train
    connect(settings.resources)
    gpus = asked.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0.0) >= 1 else 0.0
    await_nodes(settings.resources, "train.workers", asked.workers, gpus, watch)
    cpus = ray.cluster_resources().get("CPU", 1.0)
    if cpus < asked.workers and not is_shared(settings.resources):
        raise SettingsError(
            f"train.workers {asked.workers}: this machine has {cpus:g} CPUs; ask for fewer, or join a "
            "cluster (resources.address, RAY_ADDRESS)"
        )
    return Team(asked.workers, max(1, int(min(cpus / asked.workers, largest_node("CPU")))), gpus)


def run_training(
    job: TrainingJob, team: Team, settings: Settings, facts: RunFacts, watch: Callable[[], None]
) -> tuple[int, int]:
    """Have the workers train, until there is a model.

    Returns:
        The step that they began behind, and how often they were begun anew.

    Raises:
        ModelError: what no other attempt mends.
        IncompleteRunError: workers were lost more often than the settings allow.
    """
    board = job.board
    local = Path(tempfile.mkdtemp(prefix="bge-ray-train-"))
    ended: list[Exception] = []

    def fit() -> None:
        try:
            _trainer(job, team, settings, local).fit()
        except Exception as error:  # noqa: BLE001 - raised in the driver's own thread
            ended.append(error)

    thread = threading.Thread(target=fit, name="train", daemon=True)
    began = time.time()
    facts.start(Workers(*_devices(team), {"workers": team.workers}, "workers"), began)
    state: list[Any] = [[], 0, float("nan"), None]
    thread.start()
    try:
        with Progress(lambda: _line(state, job.schedule, began), settings.report.log_interval_s):
            while thread.is_alive():
                watch()
                thread.join(POLL_S)
                state[:] = ray.get(board.state.remote())
                if state[3] is not None:
                    raise state[3]
    finally:
        shutil.rmtree(local, ignore_errors=True)
    state[:] = ray.get(board.state.remote())
    if state[3] is not None:
        raise state[3]
    if ended:
        raise IncompleteRunError(
            f"step {state[1]} of {job.schedule.steps}: the workers were lost {len(state[0])} times, the last "
            f"time because of: {root_cause(ended[0])}; run again to go on from the last checkpoint"
        ) from ended[0]
    starts = state[0]
    facts.book_step("train", job.schedule.steps, job.schedule.steps, (began, time.time()))
    return starts[0] if starts else 0, max(0, len(starts) - 1)


def _trainer(job: TrainingJob, team: Team, settings: Settings, local: Path) -> Any:
    prepare_process()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Without the actor that looks every second, through a dashboard, whether the driver lives."""

        def _create_default_callbacks(self) -> list[Any]:
            found = super()._create_default_callbacks()
            # Of a cluster that is this job's own nothing is left when it ends, and it has no dashboard.
            kept = is_shared(settings.resources)
            return [one for one in found if kept or type(one).__name__ != "PlacementGroupCleanerCallback"]

    resources = {"CPU": float(team.cpus)} | ({"GPU": team.gpus} if team.gpus else {})
    return Trainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=team.workers, use_gpu=team.gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # Checkpoints are ours; what Ray notes of the run is of no use to another.
            name=f"train-{uuid.uuid4().hex[:8]}",
            storage_path=str(local),
            failure_config=FailureConfig(max_failures=settings.train.max_failures),
        ),
    )


def _devices(team: Team) -> tuple[str, float]:
    return ("cuda", team.workers * team.gpus) if team.gpus else ("cpu", float(team.workers * team.cpus))


def _line(state: list[Any], schedule: Schedule, began: float) -> list[str]:
    starts, step, loss, _ = state
    if not starts:
        return [f"starting workers, {clock(time.time() - began)} so far"]
    rate = (step - starts[0]) / max(time.time() - began, 1e-3)
    eta = clock((schedule.steps - step) / rate) if rate > 0 else "unknown"
    parts = [f"step {step:,} of {schedule.steps:,}", f"ETA {eta}"]
    if not math.isnan(loss):  # none yet of a training that goes on
        parts.append(f"loss {loss:.4f}")
    return [*parts, f"workers begun anew {len(starts) - 1} times"] if len(starts) > 1 else parts


def make_job(
    storage: Storage,
    work: str,
    key: str,
    base: Base,
    settings: Settings,
    schedule: Schedule,
    team: Team,
    examples: list[Example],
) -> TrainingJob:
    """Return what the workers get; the examples lie in Ray's store, once a node."""
    # It costs no CPU, and comes back if its process or its node is lost.
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    board = ray.remote(**options)(Board).remote()
    table = ray.put(to_table(examples))
    return TrainingJob(
        storage, work, key, base, settings.train, schedule, team.cpus, team.gpus > 0, table, board
    )


def to_table(examples: list[Example]) -> pa.Table:
    """Return examples as a table of `model.train.examples.SCHEMA`."""
    return pa.Table.from_pydict(
        {
            "query": [example.query for example in examples],
            "prompt": [example.labels.get("prompt") for example in examples],
            "positives": [example.texts for example in examples],
            "negatives": [example.negatives for example in examples],
            "positive_scores": [example.positive_scores for example in examples],
            "negative_scores": [example.negative_scores for example in examples],
        },
        SCHEMA,
    )


@dataclass(frozen=True)
class Measured:
    """A model to be measured, as a task gets it: the base, or what was stored of the trained one."""

    storage: Storage
    work: str
    base: Base
    settings: Settings
    trained: StoredFolder | None
    threads: int


def measure(
    models: list[Measured], team: Team, examples: list[Example], watch: Callable[[], None]
) -> list[dict[str, float]]:
    """Return MRR@10 by held-out query of each model.

    Raises:
        ModelError: a trained model is not read as it was trained.
    """
    held_out = ray.put(
        [HeldOutQuery(e.query_id, e.query, e.labels.get("prompt"), e.texts, e.negatives) for e in examples]
    )
    tasks = run_tasks(
        measure_task,
        [(model, held_out) for model in models],
        at_once=len(models),
        watch=watch,
        num_cpus=team.cpus,
        num_gpus=team.gpus,
    )
    found: dict[int, dict[str, float]] = dict(tasks)
    return [found[number] for number in range(len(models))]


def measure_task(model: Measured, examples: list[HeldOutQuery]) -> dict[str, float]:
    """Measure one model on this node."""
    import torch

    from bge_ray.model.run.model import Place
    from bge_ray.model.train.held_out import measure_held_out

    base = model.base
    device = (
        "cuda"
        if torch.cuda.is_available() and ray.get_runtime_context().get_accelerator_ids().get("GPU")
        else "cpu"
    )
    place = Place(device, model.threads, base.trusted)
    if model.trained is None:
        return measure_held_out(base.spec, model_folder(base.spec), place, examples)
    with tempfile.TemporaryDirectory(prefix="bge-ray-train-") as local:
        folder = Path(local)
        restore(model.storage, model.work, model.trained, folder)
        return measure_held_out(read_back(model.settings, base, folder), folder, place, examples)


def read_back(settings: Settings, base: Base, folder: Path) -> ModelSpec:
    """Return a trained model as `embed` or `rerank` reads its folder without a word about it.

    Raises:
        ModelError: not as it was trained.
    """
    if settings.train.kind == "reranker":
        asked = settings.rerank
        lengths = {"max_length": asked.max_length, "query_max_length": asked.query_max_length}
        instructions = {
            "query_instruction": asked.query_instruction,
            "passage_instruction": asked.passage_instruction,
        }
        return resolve_reranker(
            RerankSettings(model=str(folder), trust_remote_code=base.trusted, **lengths, **instructions),
            on_gpu=False,
        )
    model = settings.model
    asked_again = ModelSettings(
        name=str(folder),
        max_length=model.max_length,
        query_template=model.query_template,
        last_token=model.last_token,
        trust_remote_code=base.trusted,
    )
    spec = resolve_encoder(asked_again, on_gpu=False)
    read, trained = (
        (one.pooling, one.normalize, one.around_query()[0], one.passage_instruction)
        for one in (spec, base.spec)
    )
    if read != trained:
        raise ModelError(
            f"train.output: the trained model is read with {read} (pooling, normalize, what stands before a "
            f"query and a passage), and was trained with {trained}"
        )
    return spec
