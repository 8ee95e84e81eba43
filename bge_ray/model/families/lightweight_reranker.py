"""bge-reranker-v2.5-gemma2-lightweight: a Gemma2 with a head a layer, which merges states of the passage.

None of the Python code in its folder is run: the layers are transformers' own.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_ray.errors import ModelError
from bge_ray.model.family import Role
from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.feed.prompts import PREDICT
from bge_ray.model.folder import ModelFolder
from bge_ray.model.llm_rerankers import (
    check_heads,
    config_number,
    layer_outputs,
    prompt_feeder,
    resolve_pairs,
    settle_layers,
)
from bge_ray.records.model import ModelSpec, as_reranker
from bge_ray.settings.sections import RerankSettings

if TYPE_CHECKING:
    import torch
    from transformers import Gemma2Config

    from bge_ray.model.heads import Head
    from bge_ray.model.run.load import Loading

NAME = "lightweight_reranker"
ROLE: Role = "reranker"
# FlagEmbedding's own, where only a ratio is given.
DEFAULT_COMPRESS_LAYERS = (8,)


def recognises(folder: ModelFolder) -> bool:
    """Tell it by the type that its authors gave it."""
    return folder.config.get("model_type") == "cost_wise_gemma"


def resolve(folder: ModelFolder, settings: RerankSettings, *, on_gpu: bool) -> ModelSpec:
    """Settle length, prompt and dtype, which layers score by which heads, and what is merged where.

    Raises:
        ModelError: the model has no head a layer, a layer that was asked for has none, or nothing would be
            merged where that was asked for.
    """
    if folder.config.get("layer_wise") is not True:
        raise ModelError(
            f"rerank.model {settings.model}: layer_wise is not true in its config.json; lightweight "
            "rerankers are known with a head a layer only"
        )
    first, last = config_number(folder, "start_layer"), config_number(folder, "num_hidden_layers")
    step = config_number(folder, "layer_sep")
    layers = settle_layers(settings, range(first, last + 1, step))
    if settings.head_choice == "position":
        heads = tuple(range(len(layers)))
    else:
        heads = tuple((layer - first) // step for layer in layers)
    check_heads(folder, heads, settings.model)
    spec = resolve_pairs(folder, settings, family=NAME, prompt=PREDICT, half="bfloat16", on_gpu=on_gpu)
    return replace(
        spec,
        outputs=layer_outputs(layers),
        layers=layers,
        heads=heads,
        compress_ratio=settings.compress_ratio,
        compress_layers=_merging_layers(settings, layers[-1]),
    )


def feeder(spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> PairFeeder:
    """Load the tokenizer, which joins pairs by the prompt; what merges is told where the passage begins."""
    merges = as_reranker(spec).compress_ratio > 1
    return prompt_feeder(
        spec, folder, beginning="always", has_types=merges, trust_remote_code=trust_remote_code
    )


def packing_config(spec: ModelSpec, folder: Path) -> "Gemma2Config":
    """Return the configuration that its layers are built with."""
    return _gemma2_config(ModelFolder(folder).config, as_reranker(spec).layers[-1])


def load(spec: ModelSpec, folder: Path, how: "Loading") -> "tuple[torch.nn.Module, Sequence[Head]]":
    """Load the layers up to the last that scores, and the heads of those that do."""
    from bge_ray.model.feed.prompts import prompt_template
    from bge_ray.model.feed.texts import load_tokenizer
    from bge_ray.model.run.layers import UNCAPPED, LayerByLayer, Merging, load_layer_heads, register_uncapped
    from bge_ray.model.run.load import load_decoder

    reranker = as_reranker(spec)
    config = packing_config(spec, folder)
    register_uncapped()
    attention = how.attention or UNCAPPED
    decoder = load_decoder(folder, config, replace(how, attention=attention, trust_remote_code=False))
    cap = ModelFolder(folder).config.get("final_logit_softcapping", 30.0)
    heads = load_layer_heads(reranker, folder, config.hidden_size, cap)
    if reranker.compress_ratio == 1:
        return LayerByLayer(decoder, reranker.layers), heads
    tokenizer = load_tokenizer(folder, trust_remote_code=how.trust_remote_code)
    template = prompt_template(tokenizer, reranker.prompt, folder, beginning="always")
    merging = Merging(reranker.compress_layers, reranker.compress_ratio, len(template.tail))
    return LayerByLayer(decoder, reranker.layers, merging), heads


def _merging_layers(settings: RerankSettings, last: int) -> tuple[int, ...]:
    """Return the layers in front of which states are merged."""
    if settings.compress_ratio == 1:
        return ()
    asked = settings.compress_layers or DEFAULT_COMPRESS_LAYERS
    merging = tuple(sorted({layer for layer in asked if layer < last}))
    if not merging:
        raise ModelError(
            f"rerank.compress_ratio {settings.compress_ratio}: does nothing, as none of "
            f"rerank.compress_layers {list(asked)} lies in front of layer {last}, the last that is run"
        )
    return merging


def _gemma2_config(raw: dict[str, Any], n_layers: int) -> "Gemma2Config":
    """Return the first layers as a Gemma2, without a cap on its attention (decision 23)."""
    from transformers import Gemma2Config

    own = {"model_type", "architectures", "auto_map", "start_layer", "layer_sep", "layer_wise", "layer_types"}
    own |= {"transformers_version", "torch_dtype", "dtype", "attn_logit_softcapping", "num_hidden_layers"}
    kept = {key: value for key, value in raw.items() if key not in own}
    return Gemma2Config(**kept, num_hidden_layers=n_layers, attn_logit_softcapping=None)
