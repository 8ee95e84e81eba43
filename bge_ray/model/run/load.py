"""Weights of a model folder to a torch module: safetensors only, every weight accounted for."""

from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PretrainedConfig

from bge_ray.errors import ModelError

Kind: TypeAlias = Literal["encoder", "cross_encoder"]

# Models whose classes take add_pooling_layer; the layer on top of CLS is not part of an embedding.
HAS_POOLER_SWITCH = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet"}


# What transformers raises on a folder that is not what it claims to be.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the configuration of a model folder.

    Raises:
        ModelError: it cannot be read, or is of a kind whose code would have to come from the folder.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except LOAD_ERRORS as error:
        raise ModelError(f"{folder}: its configuration cannot be loaded: {error}") from error


def load_model(
    folder: Path, dtype: torch.dtype, kind: Kind, *, trust_remote_code: bool, attention: str | None = None
) -> torch.nn.Module:
    """Load a bare encoder or a cross-encoder in evaluation mode.

    Args:
        folder: a folder that `fetch_model` returned.
        dtype: what the weights are converted to.
        kind: a cross-encoder has one classification output.
        trust_remote_code: run Python code found in the folder.
        attention: a name registered with `transformers.AttentionInterface`; None takes its choice.

    Raises:
        ModelError: the files cannot be read, a weight is missing from them and would stay random, or
            a cross-encoder has another number of outputs than one.
    """
    from transformers.utils import logging as transformers_logging

    # Its table of unused weights (the pooler, a masked-language head) reads like an error and is none.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    config = load_config(folder, trust_remote_code=trust_remote_code)
    try:
        remote = trust_remote_code and bool(getattr(config, "auto_map", None))
        if kind == "encoder" and config.model_type in HAS_POOLER_SWITCH and not remote:
            options["add_pooling_layer"] = False
        if kind == "cross_encoder" and config.num_labels != 1:
            raise ModelError(f"{folder}: has {config.num_labels} outputs where a reranker has 1")
        if attention is not None:
            options["attn_implementation"] = attention
        loader = AutoModel if kind == "encoder" else AutoModelForSequenceClassification
        model, info = loader.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (*LOAD_ERRORS, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if kind == "encoder":  # a pooler that could not be switched off is computed and never looked at
        missing = [key for key in missing if not key.startswith("pooler.")]
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights are not in its files and would be random, such as {missing[0]}"
        )
    loaded: torch.nn.Module = model.eval()
    return loaded
