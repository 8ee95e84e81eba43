"""Encoders with one vector a text: any bare model of transformers, a pooling, and what follows that."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bge_ray.errors import ModelError
from bge_ray.model.cards import ModelCard, find_card
from bge_ray.model.family import (
    Role,
    check_length,
    packing_config_of_folder,
    refuse_code,
    settle_dtype,
    settle_kernels,
    task_prompts,
)
from bge_ray.model.feed.pipeline import Expected
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.folder import ModelFolder
from bge_ray.model.modules import pooled_dim
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
# Encoders with a decoder, also where config.json is of the encoder alone: the published ones hold both, and
# of those who made such a folder only some say so.
_WITH_DECODER = {"longt5", "mt5", "t5", "umt5"}


def recognises(folder: ModelFolder) -> bool:  # noqa: ARG001 - the last of the table takes what is left
    """Take every folder: which encoders transformers knows is its own business."""
    return True


def resolve(folder: ModelFolder, settings: ModelSettings, *, on_gpu: bool) -> ModelSpec:
    """Settle pooling, length, instructions, dtypes and kernels as asked, else as the folder or its card says.

    Raises:
        ModelError: a module of the folder is not run here, its code would decide the vectors, or something
            that is asked for does not fit.
    """
    card = find_card(settings.name)
    _refuse_kind(folder, card)
    refuse_code(folder, card, "model", settings.name, trusted=settings.trust_remote_code)
    modules = folder.modules
    pooling = _pooling(folder, settings, card)
    if modules is not None:
        dim = modules.dim(folder.hidden_size, pooling, folder.path)
    else:
        dim = pooled_dim(folder.hidden_size, pooling)
    if card is not None and card.dim != dim:
        logger.warning("%s: its vectors have %d dimensions, %s has %s", folder.path, dim, card.id, card.dim)
    dim = _kept(dim, folder, settings)
    normalize = settings.normalize
    if normalize == "auto":
        normalize = modules is None or modules.ends_normalized
        if not normalize:
            logger.warning(
                "%s: its modules do not scale vectors to unit norm, so they are not; an index needs them so: "
                "set model.normalize=true",
                settings.name,
            )
    dtype = settle_dtype(settings.dtype, on_gpu=on_gpu)
    if on_gpu and settings.dtype == "auto" and card is not None:
        dtype = card.dtype
    kernels = settle_kernels(
        settings.kernels,
        folder,
        dtype,
        setting="model.kernels",
        on_gpu=on_gpu,
        trusted=settings.trust_remote_code,
    )
    query, passage = _instructions(folder, settings, card)
    return ModelSpec(
        name=settings.name,
        revision=folder.revision,
        weights_sha256=hash_model(folder.path),
        family=NAME,
        outputs=(Output(EMBEDDING, "dense", dim, "float32" if dtype == "float32" else "float16"),),
        pooling=pooling,
        max_length=_max_length(folder, settings, card),
        normalize=normalize,
        dtype=dtype,
        query_instruction=query,
        passage_instruction=passage,
        kernels=kernels,
    )


def feeder(spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> TextFeeder:
    """Load the tokenizer, with the spec's instructions."""
    opened, card = ModelFolder(folder), find_card(spec.name)
    return TextFeeder(
        folder,
        spec.max_length,
        query_instruction=spec.query_instruction,
        passage_instruction=spec.passage_instruction,
        lower_case=opened.lower_cases,
        pools_prompt=opened.modules is None or opened.modules.pools_prompt,
        expected=Expected(
            special_first="cls" in spec.pooling.split("+"),
            last_token=card.last_token if card is not None else None,
            vocab_size=opened.vocab_size,
        ),
        trust_remote_code=trust_remote_code,
    )


packing_config = packing_config_of_folder


def load(spec: ModelSpec, folder: Path, how: "Loading") -> "tuple[torch.nn.Module, Sequence[Head]]":
    """Load the encoder, the pooling and what follows it."""
    from bge_ray.model.run.load import load_encoder

    return load_encoder(folder, how), (embedding_head(spec, folder, how),)


def embedding_head(spec: ModelSpec, folder: Path, how: "Loading") -> "Head":
    """Load what makes the embedding of states."""
    from bge_ray.model.heads import Pooled
    from bge_ray.model.run.steps import load_steps

    modules = ModelFolder(folder).modules
    return Pooled(
        spec.output(EMBEDDING),
        spec.pooling,
        normalize=spec.normalize,
        steps=load_steps(modules.inner_steps, how.dtype) if modules else (),
        pools_prompt=modules is None or modules.pools_prompt,
    )


def _refuse_kind(folder: ModelFolder, card: ModelCard | None) -> None:
    """Refuse what is another kind of model than one that makes one vector of a text."""
    kind = folder.config.get("model_type")
    if card is not None and card.refused is not None:
        raise ModelError(f"{folder.path}: {card.id} is not run: {card.refused}")
    if folder.config.get("is_encoder_decoder") or kind in _WITH_DECODER:
        raise ModelError(f"{folder.path}: is an encoder with a decoder ({kind}), which is not supported")
    if kind == "big_bird" and folder.config.get("attention_type", "block_sparse") == "block_sparse":
        raise ModelError(
            f"{folder.path}: its attention is block_sparse, by blocks drawn at random; write "
            '"attention_type": "original_full" into its config.json'
        )


def _kept(dim: int, folder: ModelFolder, settings: ModelSettings) -> int:
    """Return how many numbers of a vector are kept: as asked for, or as the folder says of itself."""
    asked = settings.truncate_dim
    if asked is not None and asked > dim:
        raise ModelError(
            f"model.truncate_dim {asked}: vectors of {settings.name} have {dim} numbers; take fewer, or "
            "leave it out"
        )
    return asked or min(dim, folder.truncate_dim or dim)


def _pooling(folder: ModelFolder, settings: ModelSettings, card: ModelCard | None) -> str:
    if settings.pooling != "auto":
        return settings.pooling
    pooling = folder.pooling() or (card.pooling if card else None)
    if pooling is None:
        raise ModelError(
            f"{folder.path}: neither modules.json nor 1_Pooling/config.json nor a model card says how to "
            "pool; set model.pooling"
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
    query, passage = folder.instructions()
    if card is not None:
        query, passage = query or card.query_prefix(), passage or card.passage_instruction
    if (of_task := task_prompts(settings.task, settings.name)) is not None:
        query, passage = of_task.query, of_task.passage
    return (
        query if settings.query_instruction is None else settings.query_instruction,
        passage if settings.passage_instruction is None else settings.passage_instruction,
    )
