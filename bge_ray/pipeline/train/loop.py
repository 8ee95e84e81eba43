"""What each worker of Ray Train does: take the training up where it was left, and store what it makes."""

import logging
import os
import shutil
import tempfile
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from bge_ray.errors import BgeRayError, ModelError, StorageError
from bge_ray.model.source import hash_model
from bge_ray.model.spec import model_folder
from bge_ray.model.train.base import Base
from bge_ray.model.train.examples import Schedule
from bge_ray.pipeline.train.stored import StoredFolder, remove_older, restore, store, stored
from bge_ray.records.reports import TrainStep
from bge_ray.settings.sections import TrainSettings
from bge_ray.storage.objects import Storage

logger = logging.getLogger(__name__)

# Points of a loss curve that are kept; more steps than that are put together.
CURVE_POINTS = 400
# Of a checkpoint of transformers: what resuming reads. Neither pickled settings nor states of random numbers,
# which follow from the number of a step.
_RESUMED = ("trained.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


@dataclass(frozen=True)
class TrainingJob:
    """A training as its workers get it; ``table`` and ``board`` are a reference and an actor of Ray's."""

    storage: Storage
    work: str
    key: str
    base: Base
    asked: TrainSettings
    schedule: Schedule
    threads: int
    on_gpu: bool
    table: Any
    board: Any


class Board:
    """An actor on which workers write how far they are; the driver reads it."""

    def __init__(self) -> None:
        """Begin empty."""
        self._starts: list[int] = []
        self._step, self._loss = 0, float("nan")
        self._error: BgeRayError | None = None

    def begin(self, step: int) -> None:
        """Note that workers begin behind a step."""
        self._starts.append(step)
        self._step = step

    def note(self, step: int, loss: float) -> None:
        """Note a step."""
        self._step, self._loss = step, loss

    def fail(self, error: BgeRayError) -> None:
        """Note an error that no other attempt mends."""
        self._error = error

    def state(self) -> tuple[list[int], int, float, BgeRayError | None]:
        """Return the first steps of all attempts, the last step and its loss, and such an error."""
        return self._starts, self._step, self._loss, self._error


def train_loop(config: dict[str, Any]) -> None:
    """Train as one of the workers.

    Raises:
        ModelError: what no other attempt mends; the board has it, too.
    """
    job: TrainingJob = config["job"]
    local = Path(tempfile.mkdtemp(prefix="bge-ray-train-"))
    try:
        _train(job, local)
    except BgeRayError as error:
        if error.exit_code == ModelError.exit_code:
            ray.get(job.board.fail.remote(error))
        raise
    finally:
        shutil.rmtree(local, ignore_errors=True)


def _train(job: TrainingJob, local: Path) -> None:
    import torch
    from transformers.utils import logging as transformers_logging

    from bge_ray.model.train.build import build_model, refuse_incomplete, save_model
    from bge_ray.model.train.gather import world
    from bge_ray.model.train.trainer import Hooks, Setup, make_trainer

    transformers_logging.disable_progress_bar()
    # What it tells of a missing head is what was asked for; other weights that are missing are refused below.
    transformers_logging.set_verbosity_error()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    torch.set_num_threads(job.threads)
    rank = world()[0]
    folder = model_folder(job.base.spec)
    if hash_model(folder) != job.base.spec.weights_sha256:
        raise ModelError(f"{folder}: differs from the model that the run was planned with")
    if rank == 0:
        refuse_incomplete(job.base, folder)
    attempt = uuid.uuid4().hex[:8]
    found = _agree(_take_up(job, local) if rank == 0 else None)
    if found is not None and rank > 0:
        restore(job.storage, job.work, found, _checkpoint(local, found))
    history: list[TrainStep] = list(found.curve) if found is not None else []
    if rank == 0:
        ray.get(job.board.begin.remote(found.step if found is not None else 0))

    def on_step(step: int, logs: dict[str, float]) -> None:
        history.append(TrainStep(step, logs["loss"], logs["learning_rate"]))
        job.board.note.remote(step, logs["loss"])

    def keep(step: int, path: Path, *, kind: Any) -> None:
        curve = tuple(thinned(history))
        store(job.storage, job.work, path, kind=kind, key=job.key, step=step, attempt=attempt, curve=curve)

    def on_checkpoint(step: int, path: Path) -> None:
        resumable(path)
        keep(step, path, kind="checkpoint")
        remove_older(job.storage, job.work, job.key)

    model = build_model(job.base, folder, job.asked)
    hooks = Hooks(on_step, on_checkpoint)
    table = ray.get(job.table)
    setup = Setup(job.base, folder, job.asked, job.schedule, local, job.on_gpu)
    trainer = make_trainer(model, table, setup, hooks)
    trainer.train(resume_from_checkpoint=str(_checkpoint(local, found)) if found is not None else None)
    if rank == 0:
        made = local / "model"
        save_model(trainer.model, job.base, job.asked, made)
        keep(job.schedule.steps, made, kind="model")


def resumable(checkpoint: Path) -> None:
    """Remove what transformers put into the folder of a checkpoint and resuming does not read."""
    for path in checkpoint.iterdir():
        if path.name not in _RESUMED:
            path.unlink()


def _checkpoint(local: Path, found: StoredFolder) -> Path:
    return local / f"checkpoint-{found.step}"


def _take_up(job: TrainingJob, local: Path) -> StoredFolder | None:
    """Bring the newest checkpoint that is whole to this machine; None if there is none."""
    for folder in stored(job.storage, job.work, "checkpoint", job.key):
        try:
            restore(job.storage, job.work, folder, _checkpoint(local, folder))
        except StorageError as error:
            logger.warning("%s is passed over: %s", folder.name, error)
            continue
        return folder
    return None


def _agree(found: StoredFolder | None) -> StoredFolder | None:
    """Return what the first worker has found."""
    from torch import distributed

    from bge_ray.model.train.gather import world

    said = [found]
    if world()[1] > 1:
        distributed.broadcast_object_list(said)
    return said[0]


def thinned(history: list[TrainStep]) -> list[TrainStep]:
    """Return a curve of at most `CURVE_POINTS`, neighbours put together while there are more."""
    while len(history) > CURVE_POINTS:
        pairs = [history[place : place + 2] for place in range(0, len(history), 2)]
        history = [
            TrainStep(pair[-1].step, sum(one.loss for one in pair) / len(pair), pair[-1].learning_rate)
            for pair in pairs
        ]
    return history


def prepare_process() -> None:
    """Set what Ray Train reads in the driver: workers stay in the folder that relative paths begin with."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
