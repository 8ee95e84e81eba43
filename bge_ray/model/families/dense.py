"""Encoders with one vector a text: any that transformers loads as a bare model, and a pooling."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bge_ray.errors import ModelError
from bge_ray.model.cards import ModelCard, find_card
from bge_ray.model.family import Role, check_length, settle_dtype, task_prompts
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.folder import ModelFolder
from bge_ray.model.source import hash_model
from bge_ray.records.model import EMBEDDING, ModelSpec
from bge_ray.records.outputs import Output
from bge_ray.settings.sections import ModelSettings

if TYPE_CHECKING:
    import torch

    from bge_ray.model.heads import Head
    from bge_ray.model.run.load import Loading

logger = logging.getLogger(__name__)

NAME = "dense"
ROLE: Role = "encoder"
DEFAULT_MAX_LENGTH = 512


def recognises(folder: ModelFolder) -> bool:  # noqa: ARG001 - the last of the table takes what is left
    """Take every folder: which encoders transformers knows is its own business."""
    return True


def resolve(folder: ModelFolder, settings: ModelSettings, *, on_gpu: bool) -> ModelSpec:
    """Settle pooling, length, instructions and dtypes as asked, else as the folder or its card says."""
    card = find_card(settings.name)
    dim = folder.hidden_size
    if card is not None and card.dim != dim:
        logger.warning("%s: its vectors have %d dimensions, %s has %d", folder.path, dim, card.id, card.dim)
    folder.check_modules()
    dtype = settle_dtype(settings.dtype, on_gpu=on_gpu)
    query, passage = _instructions(folder, settings, card)
    return ModelSpec(
        name=settings.name,
        revision=folder.revision,
        weights_sha256=hash_model(folder.path),
        family=NAME,
        outputs=(Output(EMBEDDING, "dense", dim, "float32" if dtype == "float32" else "float16"),),
        pooling=_pooling(folder, settings, card),
        max_length=_max_length(folder, settings, card),
        normalize=settings.normalize,
        dtype=dtype,
        query_instruction=query,
        passage_instruction=passage,
    )


def feeder(spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> TextFeeder:
    """Load the tokenizer, with the spec's instructions."""
    return TextFeeder(
        folder,
        spec.max_length,
        query_instruction=spec.query_instruction,
        passage_instruction=spec.passage_instruction,
        trust_remote_code=trust_remote_code,
    )


def load(spec: ModelSpec, folder: Path, how: "Loading") -> "tuple[torch.nn.Module, Sequence[Head]]":
    """Load the encoder and the pooling."""
    from bge_ray.model.heads import Pooled
    from bge_ray.model.run.load import load_encoder

    head = Pooled(spec.output(EMBEDDING), spec.pooling, normalize=spec.normalize)
    return load_encoder(folder, how), (head,)


def _pooling(folder: ModelFolder, settings: ModelSettings, card: ModelCard | None) -> str:
    if settings.pooling != "auto":
        return settings.pooling
    pooling = folder.pooling() or (card.pooling if card else None)
    if pooling is None:
        raise ModelError(
            f"{folder.path}: neither 1_Pooling/config.json nor a model card says how to pool; "
            "set model.pooling"
        )
    return pooling


def _max_length(folder: ModelFolder, settings: ModelSettings, card: ModelCard | None) -> int:
    known = card.max_length if card else None
    limit = folder.positions or known or DEFAULT_MAX_LENGTH
    check_length("model.max_length", settings.max_length, limit, settings.name)
    wanted = folder.trained_length() or known or limit
    return settings.max_length or min(wanted, limit)


def _instructions(folder: ModelFolder, settings: ModelSettings, card: ModelCard | None) -> tuple[str, str]:
    """Return what is put before a query and before a passage."""
    prompts = folder.prompts()
    query, passage = settings.query_instruction, settings.passage_instruction
    if (of_task := task_prompts(settings.task, settings.name)) is not None:
        query = of_task.query if query is None else query
        passage = of_task.passage if passage is None else passage
    if query is None:
        # sentence-transformers writes an empty prompt by default, which says nothing about the model.
        query = prompts.get("query") or (card.query_prefix() if card else "")
    if passage is None:
        known = card.passage_instruction if card else ""
        passage = prompts.get("document") or prompts.get("passage") or known
    return query, passage
