"""bge-reranker-v2-minicpm-layerwise: a MiniCPM of which each layer from some on has a head, and so a score.

MiniCPM is transformers' Granite with three multipliers, so that none of the Python code in its folder is run.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_ray.errors import ModelError
from bge_ray.model.family import MERGE_SETTINGS, Role, refuse_settings
from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.feed.prompts import YES_OR_NO
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
    from transformers import GraniteConfig

    from bge_ray.model.heads import Head
    from bge_ray.model.run.load import Loading

NAME = "layerwise_reranker"
ROLE: Role = "reranker"


def recognises(folder: ModelFolder) -> bool:
    """Tell a MiniCPM whose config.json says from which layer on it scores."""
    return folder.config.get("model_type") == "minicpm" and "start_layer" in folder.config


def resolve(folder: ModelFolder, settings: RerankSettings, *, on_gpu: bool) -> ModelSpec:
    """Settle length, prompt and dtype, and which layers score.

    Raises:
        ModelError: the heads are of another kind than the published model's or not there, its positions are
            scaled, or a layer that was asked for has no head.
    """
    refuse_settings(settings, MERGE_SETTINGS, "is no lightweight reranker, and has none")
    config = folder.config
    for key, only in (("head_type", "simple"), ("head_multi", True), ("rope_scaling", None)):
        if config.get(key, only) != only:
            raise ModelError(
                f"rerank.model {settings.model}: {key} is {config[key]!r} in its config.json; layer-wise "
                f"rerankers are known with {only!r} only"
            )
    first, last = config_number(folder, "start_layer"), config_number(folder, "num_hidden_layers")
    layers = settle_layers(settings, range(first, last + 1))
    heads = tuple(layer - first for layer in layers)
    check_heads(folder, heads, settings.model)
    spec = resolve_pairs(folder, settings, family=NAME, prompt=YES_OR_NO, half="float16", on_gpu=on_gpu)
    return replace(spec, outputs=layer_outputs(layers), layers=layers, heads=heads)


def feeder(spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> PairFeeder:
    """Load the tokenizer, which joins pairs by the prompt."""
    return prompt_feeder(spec, folder, beginning="always", trust_remote_code=trust_remote_code)


def packing_config(spec: ModelSpec, folder: Path) -> "GraniteConfig":
    """Return the configuration that its layers are built with."""
    return _granite_config(ModelFolder(folder).config, as_reranker(spec).layers[-1])


def load(spec: ModelSpec, folder: Path, how: "Loading") -> "tuple[torch.nn.Module, Sequence[Head]]":
    """Load the layers up to the last that scores, and the heads of those that do."""
    from bge_ray.model.run.layers import LayerByLayer, load_layer_heads
    from bge_ray.model.run.load import load_decoder

    reranker = as_reranker(spec)
    config = packing_config(spec, folder)
    decoder = load_decoder(folder, config, replace(how, trust_remote_code=False))
    return LayerByLayer(decoder, reranker.layers), load_layer_heads(reranker, folder, config.hidden_size)


def _granite_config(minicpm: dict[str, Any], n_layers: int) -> "GraniteConfig":
    """Return the first layers of a MiniCPM as a Granite; what config.json leaves out is MiniCPM's default."""
    from transformers import GraniteConfig

    hidden, heads = minicpm["hidden_size"], minicpm["num_attention_heads"]
    return GraniteConfig(
        vocab_size=minicpm["vocab_size"],
        hidden_size=hidden,
        intermediate_size=minicpm["intermediate_size"],
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=minicpm.get("num_key_value_heads") or heads,
        hidden_act=minicpm.get("hidden_act", "silu"),
        max_position_embeddings=minicpm.get("max_position_embeddings", 2048),
        rms_norm_eps=minicpm.get("rms_norm_eps", 1e-6),
        attention_bias=minicpm.get("attention_bias", False),
        rope_parameters={"rope_type": "default", "rope_theta": minicpm.get("rope_theta", 10000.0)},
        embedding_multiplier=minicpm.get("scale_emb", 1),
        # Of the whole model, however many of its layers are run.
        residual_multiplier=minicpm.get("scale_depth", 1) / math.sqrt(minicpm["num_hidden_layers"]),
        attention_multiplier=(hidden // heads) ** -0.5,
    )
