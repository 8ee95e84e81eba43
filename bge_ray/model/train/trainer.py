"""sentence-transformers' Trainer with our batches: a step follows from its number, so it can be resumed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.base.trainer import BaseTrainer
from sentence_transformers.base.training_args import BaseTrainingArguments
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback

from bge_ray.errors import ModelError
from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.feed.texts import load_tokenizer
from bge_ray.model.spec import family_of
from bge_ray.model.train.base import Base
from bge_ray.model.train.batches import Collator, PairTokens, TextTokens
from bge_ray.model.train.build import TRAINED, load_trained, save_trained
from bge_ray.model.train.examples import Schedule
from bge_ray.model.train.gather import world
from bge_ray.model.train.losses import Contrast
from bge_ray.model.train.objective import Embedding, Objective, Reranking, Unified
from bge_ray.settings.sections import TrainSettings


@dataclass(frozen=True)
class Hooks:
    """What a training tells of itself: each step's number and figures, and the folder of each checkpoint."""

    on_step: Callable[[int, dict[str, float]], None]
    on_checkpoint: Callable[[int, Path], None]


@dataclass(frozen=True)
class Setup:
    """What a trainer is made of beside the model and the examples.

    ``folder`` has the files of the ``base``, ``work`` takes checkpoints; both are on this machine.
    """

    base: Base
    folder: Path
    asked: TrainSettings
    schedule: Schedule
    work: Path
    on_gpu: bool = False


def make_trainer(model: Any, table: pa.Table, setup: Setup, hooks: Hooks) -> "Trainer":
    """Return what trains a model; each worker has one.

    Args:
        model: as `build.build_model` made it.
        table: the examples.
        setup: the rest.
        hooks: called as it goes.
    """
    objective = _objective(model, setup.asked)
    trainer = Trainer(
        model=model,
        args=_arguments(setup),
        train_dataset=_positions(setup.schedule.positions),
        loss=objective,
        data_collator=_collator(table, setup),
        callbacks=[_Callback(objective, setup.asked.seed, hooks)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _positions(count: int) -> Dataset:
    """Return what the library goes through: places in the schedule, in order."""
    table = InMemoryTable(pa.table({"position": np.arange(count)}))
    # With a fingerprint of its own none is computed, for which functions would be taken apart, and printed.
    return Dataset(table, fingerprint=f"positions-{count}")


def _collator(table: pa.Table, setup: Setup) -> Collator:
    base, folder, asked = setup.base, setup.folder, setup.asked
    spec = base.spec
    tokenise: TextTokens | PairTokens
    if asked.kind == "reranker":
        feeder = family_of(spec).feeder(spec, folder, trust_remote_code=base.trusted)
        if not isinstance(feeder, PairFeeder):
            raise TypeError(f"{spec.name}: is no reranker")
        tokenise = PairTokens(feeder)
    else:
        query = asked.query_max_length or spec.max_length
        lengths = (query, asked.passage_max_length or query)
        tokenise = TextTokens(spec, folder, lengths, trusted=base.trusted)
    pad = load_tokenizer(folder, trust_remote_code=base.trusted).pad_token_id
    learns = asked.distill != "none"
    return Collator(table, setup.schedule, asked.group, tokenise, 0 if pad is None else pad, learns)


def _objective(model: Any, asked: TrainSettings) -> Objective:
    if asked.kind == "reranker":
        return Reranking(model, asked.group, asked.cached_rows)
    how = Contrast(asked.temperature, asked.negatives, asked.distill, asked.dims)
    if asked.unified:
        return Unified(model, how, asked.self_distill_after, asked.cached_rows)
    return Embedding(model, how, asked.cached_rows)


def _arguments(setup: Setup) -> BaseTrainingArguments:
    asked, steps = setup.asked, setup.schedule.steps
    return BaseTrainingArguments(
        output_dir=str(setup.work),
        max_steps=steps,
        per_device_train_batch_size=asked.batch_queries // world()[1],
        learning_rate=asked.learning_rate,
        warmup_steps=round(asked.warmup * steps),
        lr_scheduler_type="linear",
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        bf16=asked.dtype == "bfloat16",
        use_cpu=not setup.on_gpu,
        seed=asked.seed,
        save_strategy="steps",
        save_steps=asked.checkpoint_steps,
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=setup.on_gpu,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
    )


class Trainer(BaseTrainer):  # type: ignore[misc]
    """Takes batches in the order of their positions, and keeps of a model the weights that are trained."""

    def get_default_loss(self, model: Any) -> torch.nn.Module:
        """Refuse: there always is a loss."""
        raise NotImplementedError(f"no loss is given for {model}")

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Leave out the library's own card."""

    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
        """Return batches in the order of the data set."""
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        """Return the loss of a batch.

        Raises:
            ModelError: it is no finite number.
        """
        loss = super().compute_loss(*given, **named)
        value = loss[0] if isinstance(loss, tuple) else loss
        if not torch.isfinite(value):
            raise ModelError(
                f"step {self.state.global_step + 1}: the loss is {value.item()}; lower "
                "train.learning_rate, or train in float32"
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.model, folder / TRAINED)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        load_trained(self.model, Path(checkpoint_path) / TRAINED)


class _Callback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, objective: Objective, seed: int, hooks: Hooks) -> None:
        self._objective, self._seed, self._hooks = objective, seed, hooks

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Draw what is dropped out by the number of the step, so that a resumed run drops the same."""
        torch.manual_seed(_seed_of(self._seed, state.global_step, world()[0]))
        if isinstance(self._objective, Unified):
            self._objective.step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:  # noqa: ARG002
        """Hand the figures of a step on."""
        if "loss" in logs and state.is_world_process_zero:
            self._hooks.on_step(state.global_step, logs)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Hand the folder of a checkpoint on."""
        if state.is_world_process_zero:
            step = state.global_step
            self._hooks.on_checkpoint(step, Path(args.output_dir) / f"checkpoint-{step}")


def _seed_of(*numbers: Sequence[int] | int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])
