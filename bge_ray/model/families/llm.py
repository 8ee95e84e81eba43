"""Decoders as encoders: the state of the last token, a template for queries, and for some also examples."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bge_ray.errors import ModelError
from bge_ray.model.cards import ModelCard, find_card
from bge_ray.model.families import dense
from bge_ray.model.family import Role, packing_config_of_folder, shown
from bge_ray.model.feed.decoder_texts import DecoderFeeder
from bge_ray.model.feed.ends import Ends, settle_ends
from bge_ray.model.folder import ModelFolder
from bge_ray.records.model import ModelSpec
from bge_ray.settings.sections import Auto, ComputeDtype, ModelSettings

if TYPE_CHECKING:
    import torch

    from bge_ray.model.heads import Head
    from bge_ray.model.run.load import Loading

logger = logging.getLogger(__name__)

NAME = "llm"
ROLE: Role = "encoder"
MODEL_TYPES = {"mistral", "qwen2", "qwen3", "gemma", "gemma2", "llama"}
# Their states grow beyond what float16 holds.
WIDE_TYPES = {"gemma", "gemma2"}


def recognises(folder: ModelFolder) -> bool:
    """Tell a decoder by its model type."""
    return folder.config.get("model_type") in MODEL_TYPES


def resolve(folder: ModelFolder, settings: ModelSettings, *, on_gpu: bool) -> ModelSpec:
    """Settle what an encoder settles, and the template, the examples, and what a text ends with.

    Raises:
        ModelError: as of a dense encoder, or the folder's own code may decide its vectors, or its card or its
            tokenizer's files contradict each other.
    """
    card = find_card(settings.name)
    _check_folder(folder, card)
    dtype = _dtype(folder, settings.dtype, card, on_gpu=on_gpu)
    spec = dense.resolve(folder, settings.model_copy(update={"dtype": dtype}), on_gpu=on_gpu)
    template, instruction = _query(folder, settings, card)
    ends = Ends(None, None)
    if spec.pooling == "last_token":
        ends = settle_ends(folder.path, settings.last_token, card.last_token if card else None)
    return dataclasses.replace(
        spec,
        family=NAME,
        query_template=template,
        query_instruction=instruction,
        examples=shown(settings, instruction),
        first_token=ends.first,
        last_token=ends.last,
    )


def feeder(spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> DecoderFeeder:
    """Load the tokenizer, with the spec's template, examples and ends."""
    return DecoderFeeder(
        spec, folder, vocab_size=ModelFolder(folder).vocab_size, trust_remote_code=trust_remote_code
    )


packing_config = packing_config_of_folder


def load(spec: ModelSpec, folder: Path, how: "Loading") -> "tuple[torch.nn.Module, Sequence[Head]]":
    """Load the bare decoder and the pooling."""
    return dense.load(spec, folder, how)


def _check_folder(folder: ModelFolder, card: ModelCard | None) -> None:
    """Refuse what would be run in another way than the folder's authors did.

    Raises:
        ModelError: it disagrees with its card about what a token sees, or pools without the prompt.
    """
    causal = bool(folder.config.get("is_causal", True))
    if card is not None and card.causal not in (None, causal):
        raise ModelError(
            f"{folder.path}: {card.id} is {'causal' if card.causal else 'not causal'}, and its config.json "
            f"says otherwise; set is_causal there to {str(card.causal).lower()}"
        )
    if folder.modules is not None and not folder.modules.pools_prompt:
        raise ModelError(
            f"{folder.path}: pools without the tokens of a prompt, which is not done of a decoder"
        )


def _dtype(
    folder: ModelFolder, asked: ComputeDtype | Auto, card: ModelCard | None, *, on_gpu: bool
) -> ComputeDtype | Auto:
    """Return what to compute in; automatic on a GPU is what the card or the family is known to be safe in."""
    wide = folder.config.get("model_type") in WIDE_TYPES
    if asked == "float16" and wide:
        logger.warning("%s: states of a Gemma may not fit into float16; bfloat16 holds them", folder.path)
    if asked != "auto" or not on_gpu:
        return asked
    trained_in = folder.config.get("dtype", folder.config.get("torch_dtype"))
    if wide or (card.dtype if card is not None else trained_in) == "bfloat16":
        return "bfloat16"
    return "auto"


def _query(folder: ModelFolder, settings: ModelSettings, card: ModelCard | None) -> tuple[str, str]:
    """Return the template of a query and its instruction.

    Raises:
        ModelError: the instruction is the whole text that the template makes of one.
    """
    template = settings.query_template or (card.query_template if card is not None else "")
    start, _, end = template.partition("{query}")[0].partition("{instruction}")
    given = settings.query_instruction
    if given is not None:
        if start and given.startswith(start):
            raise ModelError(
                f"model.query_instruction {given!r}: give the task alone; {settings.name} puts it between "
                f"{start!r} and {end!r}, and model.query_template is another template"
            )
        return template, given
    prompt = folder.instructions()[0]
    if prompt and prompt.startswith(start) and prompt.endswith(end) and template:
        return template, prompt.removeprefix(start).removesuffix(end)
    if prompt and settings.query_template is None:
        return "", prompt  # what the folder says wins over its card
    return template, card.query_instruction if card is not None else ""
