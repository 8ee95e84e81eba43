"""Cross-encoders: query and passage in one row, and one logit of a classification head on the first token."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_ray.errors import ModelError
from bge_ray.model.cards import find_card
from bge_ray.model.family import (
    LAYER_SETTINGS,
    MERGE_SETTINGS,
    Role,
    check_length,
    packing_config_of_folder,
    refuse_code,
    refuse_settings,
    settle_dtype,
    settle_kernels,
)
from bge_ray.model.feed.pairs import PairFeeder, query_share, tokenizer_pairs
from bge_ray.model.folder import ModelFolder
from bge_ray.model.source import hash_model
from bge_ray.records.model import SCORE, ModelSpec, RerankerSpec, as_reranker
from bge_ray.records.outputs import Output
from bge_ray.settings.sections import RerankSettings

if TYPE_CHECKING:
    import torch

    from bge_ray.model.heads import Head
    from bge_ray.model.run.load import Loading

NAME = "cross_encoder"
ROLE: Role = "reranker"
# FlagReranker's own; the positions of bge-reranker-v2-m3 go further, and its authors use 1024.
DEFAULT_MAX_LENGTH = 512
# What the weights of a classification head are called, from BERT to the decoders.
HEAD_NAMES = ("classifier.", "score.", "head.", "logits_proj.", "summary.")
# What transformers builds on top of the encoder, by model type; whatever is missing would be drawn at random.
_ON_TOP = {
    "bert": ("pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj"),
    "camembert": ("classifier.dense", "classifier.out_proj"),
    "electra": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
    "deberta-v2": ("pooler.dense", "classifier"),
}


def recognises(folder: ModelFolder) -> bool:
    """Tell a trained classification head by the names of its weights."""
    return any(name.startswith(HEAD_NAMES) for name in folder.weights)


def resolve(folder: ModelFolder, settings: RerankSettings, *, on_gpu: bool) -> ModelSpec:
    """Settle length, dtype and kernels, and that the head is there whole with one output.

    Raises:
        ModelError: a weight of the head is missing and would be drawn at random, and every score with it; or
            it has several outputs.
    """
    card = find_card(settings.model)
    refuse_code(folder, card, "rerank", settings.model, trusted=settings.trust_remote_code)
    weights_sha256 = hash_model(folder.path)
    alien = ("prompt", *LAYER_SETTINGS, *MERGE_SETTINGS)
    refuse_settings(settings, alien, "is a cross-encoder, which has none")
    if folder.n_labels != 1:
        raise ModelError(
            f"rerank.model {settings.model}: has {folder.n_labels} outputs where a reranker has 1"
        )
    needed = [
        f"{layer}.{part}"
        for layer in _ON_TOP.get(str(folder.config.get("model_type")), ())
        for part in ("weight", "bias")
    ]
    missing = [n for n in needed if not any(w == n or w.endswith(f".{n}") for w in folder.weights)]
    if missing:
        raise ModelError(
            f"rerank.model {settings.model}: {len(missing)} weights of its head are not in its files "
            f"and would be random, such as {missing[0]}; save it again whole, or name another reranker"
        )
    check_length("rerank.max_length", settings.max_length, folder.positions, settings.model)
    max_length = settings.max_length or min(DEFAULT_MAX_LENGTH, folder.positions or DEFAULT_MAX_LENGTH)
    dtype = settle_dtype(settings.dtype, on_gpu=on_gpu)
    # As the library does it: of a pair, before the first text.
    instruction = (
        folder.default_prompt() if settings.query_instruction is None else settings.query_instruction
    )
    kernels = settle_kernels(
        settings.kernels,
        folder,
        dtype,
        setting="rerank.kernels",
        on_gpu=on_gpu,
        trusted=settings.trust_remote_code,
    )
    return RerankerSpec(
        name=settings.model,
        revision=folder.revision,
        weights_sha256=weights_sha256,
        family=NAME,
        outputs=(Output(SCORE, "scalar", 1, "float32"),),
        pooling="cls",
        max_length=max_length,
        normalize=False,
        dtype=dtype,
        query_instruction=instruction,
        passage_instruction=settings.passage_instruction or "",
        kernels=kernels,
        query_max_length=settings.query_max_length or query_share(max_length),
    )


def feeder(spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> PairFeeder:
    """Load the tokenizer and its pair template."""
    reranker = as_reranker(spec)
    return tokenizer_pairs(
        folder,
        reranker.max_length,
        reranker.query_max_length,
        query_instruction=reranker.query_instruction,
        passage_instruction=reranker.passage_instruction,
        trust_remote_code=trust_remote_code,
    )


packing_config = packing_config_of_folder


def load(spec: ModelSpec, folder: Path, how: "Loading") -> "tuple[torch.nn.Module, Sequence[Head]]":
    """Load the encoder and the classification head."""
    import torch

    from bge_ray.model.heads import Logit
    from bge_ray.model.run.load import load_cross_encoder

    output = spec.output(SCORE)
    model: Any = load_cross_encoder(folder, how)
    if how.attention is None:
        return model, (Logit(output, None),)
    # The head takes the first token of each row, and a packed batch is one row: it gets them apart.
    top = model.classifier
    if model.config.model_type == "bert":
        top = torch.nn.Sequential(model.base_model.pooler, top)
    return model.base_model, (Logit(output, top),)
