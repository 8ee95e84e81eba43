"""Weights of a model folder to a torch module: nothing in their files is run, every weight accounted for."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from bge_ray.errors import ModelError, in_a_line
from bge_ray.model.run.pickled import read_pickled
from bge_ray.model.weights import weight_files


@dataclass(frozen=True)
class Loading:
    """How a family is to load its model.

    ``attention`` is a name registered with `transformers.AttentionInterface`, by which the model takes packed
    batches; None takes transformers' choice, and batches are padded. ``trust_remote_code`` runs Python code
    found in the folder.
    """

    dtype: torch.dtype
    attention: str | None = None
    trust_remote_code: bool = False


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
        said = in_a_line(error)
        if "custom code" in said:
            said = "its code lies in the folder; set model.trust_remote_code=true if you trust its author"
        raise ModelError(f"{folder}: its configuration cannot be loaded: {said}") from error


def load_encoder(folder: Path, how: Loading) -> torch.nn.Module:
    """Load a bare encoder in evaluation mode, without the pooler on CLS, which is no part of an embedding.

    Raises:
        ModelError: the files cannot be read, or a weight is missing from them and would stay random.
    """
    config = load_config(folder, trust_remote_code=how.trust_remote_code)
    options: dict[str, Any] = {}
    remote = how.trust_remote_code and bool(getattr(config, "auto_map", None))
    if not remote and _has_pooler_switch(config):
        options["add_pooling_layer"] = False
    # A pooler that could not be switched off is computed and never looked at.
    return _load(AutoModel, folder, config, how, options, unused="pooler.")


def load_decoder(folder: Path, config: PretrainedConfig, how: Loading) -> torch.nn.Module:
    """Load a language model without its head, in evaluation mode, as a configuration says.

    Layers beyond those of the configuration are not read.

    Raises:
        ModelError: as `load_encoder`.
    """
    return _load(AutoModel, folder, config, how, {})


def load_cross_encoder(folder: Path, how: Loading) -> torch.nn.Module:
    """Load a cross-encoder with its classification head, in evaluation mode.

    Raises:
        ModelError: as `load_encoder`, or it has another number of outputs than one.
    """
    config = load_config(folder, trust_remote_code=how.trust_remote_code)
    if config.num_labels != 1:
        raise ModelError(f"{folder}: has {config.num_labels} outputs where a reranker has 1")
    return _load(AutoModelForSequenceClassification, folder, config, how, {})


def load_linear(path: Path, dtype: torch.dtype) -> torch.nn.Linear:
    """Load the one linear layer of a file, safetensors or pickled, that holds its weight and its bias.

    Raises:
        ModelError: the file cannot be read, or holds anything else.
    """
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else read_pickled(path, "cpu")
        n_out, n_in = tensors["weight"].shape
        linear = torch.nn.Linear(n_in, n_out)
        linear.load_state_dict(tensors)
    except (*LOAD_ERRORS, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be loaded as a linear layer: {error}") from error
    return linear.to(dtype).eval().requires_grad_(False)


def _load(
    loader: Any,
    folder: Path,
    config: PretrainedConfig,
    how: Loading,
    options: dict[str, Any],
    unused: str | None = None,
) -> torch.nn.Module:
    from transformers.utils import logging as transformers_logging

    # Its table of unused weights (the pooler, a masked-language head) reads like an error and is none.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if getattr(config, "use_cache", False):
        config.use_cache = False  # nothing is generated, and the keys of a batch are as large as its states
    if how.attention is not None:
        options["attn_implementation"] = how.attention
    weights = weight_files(folder)
    if weights.pickled:
        for path in weights.files:
            read_pickled(path, "meta")  # which refuses by name what the restricted reader does
    try:
        model, info = loader.from_pretrained(
            folder,
            config=config,
            dtype=how.dtype,
            use_safetensors=not weights.pickled,
            weights_only=True,
            output_loading_info=True,
            trust_remote_code=how.trust_remote_code,
            local_files_only=True,
            **options,
        )
    except (*LOAD_ERRORS, SafetensorError) as error:
        if "ignore_mismatched_sizes" in str(error):  # What it names is no setting of ours.
            raise ModelError(
                f"{folder}: its weights have other shapes than config.json says; fetch both again"
            ) from error
        raise ModelError(f"{folder}: cannot be loaded: {in_a_line(error)}") from error
    missing = sorted(key for key in info["missing_keys"] if unused is None or not key.startswith(unused))
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights are not in its files and would be random, such as {missing[0]}"
        )
    loaded: torch.nn.Module = model.eval()
    return loaded


def _has_pooler_switch(config: PretrainedConfig) -> bool:
    """Tell whether transformers' own class of an encoder can be built without its pooler."""
    found = MODEL_MAPPING.get(type(config), None)
    return isinstance(found, type) and "add_pooling_layer" in inspect.signature(found).parameters
