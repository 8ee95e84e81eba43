"""What LLM rerankers settle alike: lengths, prompt, dtype, and which layers score. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bge_ray.errors import ModelError
from bge_ray.model.family import check_length, settle_dtype
from bge_ray.model.feed.pairs import PairFeeder, query_share
from bge_ray.model.feed.prompts import (
    PASSAGE_LETTER,
    QUERY_LETTER,
    Beginning,
    prompt_limits,
    prompt_template,
)
from bge_ray.model.feed.texts import load_tokenizer
from bge_ray.model.folder import ModelFolder
from bge_ray.model.source import hash_model
from bge_ray.model.weights import weight_files
from bge_ray.records.model import SCORE, ModelSpec, RerankerSpec, as_reranker
from bge_ray.records.outputs import Output
from bge_ray.settings.sections import ComputeDtype, RerankSettings

# FlagLLMReranker's own, as FlagReranker's.
DEFAULT_MAX_LENGTH = 512


def resolve_pairs(
    folder: ModelFolder,
    settings: RerankSettings,
    *,
    family: str,
    prompt: str,
    half: ComputeDtype,
    on_gpu: bool,
) -> RerankerSpec:
    """Settle everything but the layers.

    Args:
        folder: the model's.
        settings: what was asked for.
        family: its name.
        prompt: the question of its authors.
        half: what it is computed in on a GPU, unless asked otherwise.
        on_gpu: whether it will run on GPUs.

    Raises:
        ModelError: fused kernels are asked for; a length is beyond the model's positions, or leaves no room.
    """
    if settings.kernels == "fused":
        raise ModelError(f"rerank.kernels fused: {settings.model} is an LLM reranker, which has plain ones")
    check_length("rerank.max_length", settings.max_length, folder.positions, settings.model)
    max_length = settings.max_length or min(DEFAULT_MAX_LENGTH, folder.positions or DEFAULT_MAX_LENGTH)
    query_max_length = settings.query_max_length or query_share(max_length)
    if query_max_length >= max_length:
        raise ModelError(
            f"rerank.query_max_length {query_max_length}: leaves no room for a passage within "
            f"rerank.max_length {max_length}"
        )
    query, passage = settings.query_instruction, settings.passage_instruction
    return RerankerSpec(
        name=settings.model,
        revision=folder.revision,
        weights_sha256=hash_model(folder.path),
        family=family,
        outputs=(Output(SCORE, "scalar", 1, "float32"),),
        pooling="last_token",
        max_length=max_length,
        normalize=False,
        dtype=settle_dtype(settings.dtype, on_gpu=on_gpu, half=half),
        query_instruction=QUERY_LETTER if query is None else query,
        passage_instruction=PASSAGE_LETTER if passage is None else passage,
        query_max_length=query_max_length,
        prompt=settings.prompt or prompt,
    )


def settle_layers(settings: RerankSettings, able: range) -> tuple[int, ...]:
    """Return the layers that score, ascending: those asked for, else the last.

    Args:
        settings: what was asked for.
        able: the layers that have a head.

    Raises:
        ModelError: one that was asked for has none.
    """
    asked = settings.cutoff_layers or (able[-1],)
    unable = [layer for layer in asked if layer not in able]
    if unable:
        every = "" if able.step == 1 else f", every {able.step}"
        raise ModelError(
            f"rerank.cutoff_layers {list(asked)}: {settings.model} scores after layers {able[0]} to "
            f"{able[-1]}{every}, not after {', '.join(map(str, unable))}"
        )
    return asked


def layer_outputs(layers: Sequence[int]) -> tuple[Output, ...]:
    """Return ``score``, which is the last layer's, and where several layers score one output of each."""
    names = [SCORE, *(f"layer_{layer}" for layer in layers if len(layers) > 1)]
    return tuple(Output(name, "scalar", 1, "float32") for name in names)


def cuts_of(layers: Sequence[int]) -> list[int]:
    """Return for each of `layer_outputs` the place of its layer among the layers."""
    return [len(layers) - 1, *(place for place in range(len(layers)) if len(layers) > 1)]


def head_weight(number: int) -> str:
    """Return the name of the weight, (1, hidden_size), of a layer's head."""
    return f"lm_head.{number}.linear_head.weight"


def check_heads(folder: ModelFolder, heads: Sequence[int], name: str) -> None:
    """Refuse a folder without the weights of some heads, which would have to be random, or with other ones.

    Raises:
        ModelError: names the first that is missing, or not of the shape of a state.
    """
    missing = [head_weight(number) for number in heads if head_weight(number) not in folder.weights]
    if missing:
        raise ModelError(
            f"rerank.model {name}: {len(missing)} heads that score are not in its files, such as "
            f"{missing[0]}; save it again whole, or name another reranker"
        )
    shapes = weight_files(folder.path).shapes()
    for weight in map(head_weight, heads):
        if shapes[weight] != (1, folder.hidden_size):
            raise ModelError(
                f"rerank.model {name}: {weight} has the shape {shapes[weight]}, and a state of the model "
                f"{folder.hidden_size} numbers"
            )


def config_number(folder: ModelFolder, key: str) -> int:
    """Return a positive number of config.json.

    Raises:
        ModelError: it is missing, or is none.
    """
    value = folder.config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{folder.path}/config.json: {key} is {value!r} where a number from 1 on is needed")
    return value


def prompt_feeder(
    spec: ModelSpec, folder: Path, *, beginning: Beginning, has_types: bool = False, trust_remote_code: bool
) -> PairFeeder:
    """Load the tokenizer, which joins pairs by the spec's prompt.

    Raises:
        ModelError: there is no fast tokenizer, or it has no tokens for the prompt.
    """
    reranker = as_reranker(spec)
    tokenizer: Any = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    template = prompt_template(tokenizer, reranker.prompt, folder, beginning=beginning, has_types=has_types)
    return PairFeeder(
        tokenizer,
        template,
        prompt_limits(template, reranker.max_length, reranker.query_max_length),
        query_instruction=reranker.query_instruction,
        passage_instruction=reranker.passage_instruction,
    )
