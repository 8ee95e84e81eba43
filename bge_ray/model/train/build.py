"""Models of sentence-transformers to be trained, and the folders that they become."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bge_ray.errors import ModelError, in_a_line
from bge_ray.model.families.m3 import without_weight
from bge_ray.model.folder import ModelFolder
from bge_ray.model.run.load import LOAD_ERRORS, Loading, load_encoder, load_linear
from bge_ray.model.run.model import Model, Place
from bge_ray.model.train.base import Base
from bge_ray.model.train.objective import TokenHeads
from bge_ray.model.weights import HEAD_FILES, head_file
from bge_ray.records.model import COLBERT, SPARSE, ModelSpec
from bge_ray.settings.sections import TrainSettings

# What sentence-transformers calls the poolings.
_POOLINGS = {
    "last_token": "lasttoken",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weighted_mean": "weightedmean",
}
# The weights of a checkpoint: those that are trained.
TRAINED = "trained.safetensors"
_HEADS = "token_heads"


def refuse_incomplete(base: Base, folder: Path) -> None:
    """Load a model as `embed` and `rerank` do, once: sentence-transformers draws at random what is missing.

    Raises:
        ModelError: the files cannot be loaded, or lack a weight that is no part of a new head.
    """
    if base.fresh_head:
        load_encoder(folder, Loading(torch.float32, trust_remote_code=base.trusted))
    else:
        Model(base.spec, folder, Place(trust_remote_code=base.trusted))


def build_model(base: Base, folder: Path, asked: TrainSettings) -> Any:
    """Return a SentenceTransformer or a CrossEncoder in float32 on the CPU, with what is trained free.

    Args:
        base: what to train.
        folder: its files.
        asked: whether it is a reranker, the heads that it has, and the matrices beside its weights.

    Raises:
        ModelError: the files cannot be loaded.
    """
    # Of a head, and of the matrices of LoRA.
    torch.manual_seed(asked.seed)
    try:
        model = _cross_encoder(base, folder) if asked.kind == "reranker" else _embedder(base, folder)
    except LOAD_ERRORS as error:
        raise ModelError(f"{folder}: cannot be loaded to be trained: {in_a_line(error)}") from error
    if asked.unified:
        model.add_module(_HEADS, _token_heads(base, folder))
    if asked.lora_rank is not None:
        _add_lora(model, asked)
    if asked.kind == "embedder":
        for name, parameter in model.named_parameters():
            # What a vector does not depend on has no gradient, and workers would wait for one.
            if ".pooler." in name:
                parameter.requires_grad_(False)
    return model


def _options(base: Base) -> dict[str, Any]:
    shared = {"local_files_only": True, "trust_remote_code": base.trusted}
    return {
        "model_kwargs": {**shared, "dtype": torch.float32},
        "processor_kwargs": shared,
        "config_kwargs": shared,
    }


def _embedder(base: Base, folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    spec = base.spec
    modes = [_POOLINGS.get(mode, mode) for mode in spec.pooling.split("+")]
    if ModelFolder(folder).modules is None:
        transformer = Transformer(str(folder), max_seq_length=spec.max_length, **_options(base))
        pooling = Pooling(transformer.get_embedding_dimension(), tuple(modes))
        parts = [transformer, pooling, *([Normalize()] if spec.normalize else [])]
        return SentenceTransformer(modules=parts, device="cpu")
    options = _options(base)
    model = SentenceTransformer(
        str(folder),
        device="cpu",
        local_files_only=True,
        trust_remote_code=base.trusted,
        model_kwargs={"dtype": torch.float32, **options["model_kwargs"]},
    )
    if ModelFolder(folder).pooling() != spec.pooling:
        model[1] = Pooling(model[0].get_embedding_dimension(), tuple(modes))
    return model


def _cross_encoder(base: Base, folder: Path) -> Any:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer

    options = _options(base)
    options["config_kwargs"] = {**options["config_kwargs"], "num_labels": 1}
    transformer = Transformer(
        str(folder),
        transformer_task="sequence-classification",
        max_seq_length=base.spec.max_length,
        **options,
    )
    return CrossEncoder(modules=[transformer], device="cpu")


def _token_heads(base: Base, folder: Path) -> TokenHeads:
    heads = []
    for name in (SPARSE, COLBERT):
        path = head_file(folder, name)
        if path is None:
            raise ModelError(f"{folder}: has no {' and no '.join(HEAD_FILES[name])}")
        heads.append(load_linear(path, torch.float32).requires_grad_(True))
    return TokenHeads(heads[0], heads[1], sorted(without_weight(folder, base.trusted)))


def _add_lora(model: Any, asked: TrainSettings) -> None:
    from peft import LoraConfig

    heads = ["classifier", "score"] if asked.kind == "reranker" else None
    config = LoraConfig(
        r=asked.lora_rank,
        lora_alpha=asked.lora_alpha,
        target_modules="all-linear",
        exclude_modules=r".*(pooler|classifier|score)\b.*",
    )
    transformer = model[0].auto_model
    transformer.add_adapter(config)
    for name, parameter in transformer.named_parameters():
        if heads is not None and any(part in (*heads, "pooler") for part in name.split(".")):
            parameter.requires_grad_(True)


def _merge_lora(transformer: Any) -> None:
    """Add the matrices to the weights, and leave a model as it was before there were any."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(transformer.named_modules()):
        if not isinstance(layer, LoraLayer):
            continue
        layer.merge(safe_merge=True)
        outer, _, own = name.rpartition(".")
        setattr(transformer.get_submodule(outer), own, layer.get_base_layer())
    transformer._hf_peft_config_loaded = False
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config


def save_trained(model: torch.nn.Module, path: Path) -> None:
    """Write the weights that are trained.

    Raises:
        ModelError: some are no finite numbers; the step before left a loss that was one.
    """
    _refuse_broken(model)
    found = {name: part.detach().cpu() for name, part in model.named_parameters() if part.requires_grad}
    save_file({name: part.contiguous() for name, part in found.items()}, path)


def _refuse_broken(model: torch.nn.Module) -> None:
    for name, part in model.named_parameters():
        if part.requires_grad and not torch.isfinite(part).all():
            raise ModelError(
                f"the weights {name} are no finite numbers any more; lower train.learning_rate, or train in "
                "float32"
            )


def load_trained(model: torch.nn.Module, path: Path) -> None:
    """Read them again.

    Raises:
        ModelError: they are those of another model.
    """
    tensors = load_file(path)
    wanted = {name for name, part in model.named_parameters() if part.requires_grad}
    if tensors.keys() != wanted:
        raise ModelError(f"{path}: has other weights than those that are trained")
    model.load_state_dict(tensors, strict=False)


def save_model(model: Any, base: Base, asked: TrainSettings, folder: Path) -> None:
    """Write a folder that sentence-transformers, `embed` and `rerank` load; changes the model.

    Args:
        model: as `build_model` made it.
        base: what it was.
        asked: whether it has heads or matrices beside its weights.
        folder: does not exist yet.

    Raises:
        ModelError: some of its weights are no finite numbers.
    """
    _refuse_broken(model)
    if asked.lora_rank is not None:
        _merge_lora(model[0].auto_model)
    heads = getattr(model, _HEADS, None)
    if heads is not None:
        del model._modules[_HEADS]
    if asked.kind == "embedder":
        model.prompts = _prompts(base.spec)
        model.default_prompt_name = None
    model.save_pretrained(str(folder), create_model_card=False)
    if heads is not None:
        for name, linear in ((SPARSE, heads.sparse), (COLBERT, heads.colbert)):
            tensors = {key: part.detach().cpu().contiguous() for key, part in linear.state_dict().items()}
            save_file(tensors, folder / HEAD_FILES[name][0])


def _prompts(spec: ModelSpec) -> dict[str, str]:
    """Return what stands before queries and passages; what stands behind has no place in a folder."""
    return {"query": spec.around_query()[0], "document": spec.passage_instruction}
