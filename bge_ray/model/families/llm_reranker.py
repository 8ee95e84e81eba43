"""Language models tuned to answer whether a passage answers a query: the logit of "Yes" is the score."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from bge_ray.errors import ModelError
from bge_ray.model.cards import find_card
from bge_ray.model.family import (
    LAYER_SETTINGS,
    MERGE_SETTINGS,
    Role,
    packing_config_of_folder,
    refuse_settings,
)
from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.feed.pipeline import TOKENIZER_FILE, read_tokenizer
from bge_ray.model.feed.prompts import YES_OR_NO
from bge_ray.model.folder import ModelFolder
from bge_ray.model.llm_rerankers import prompt_feeder, resolve_pairs
from bge_ray.records.model import SCORE, ModelSpec
from bge_ray.settings.sections import ComputeDtype, RerankSettings

if TYPE_CHECKING:
    import torch

    from bge_ray.model.heads import Head
    from bge_ray.model.run.load import Loading

NAME = "llm_reranker"
ROLE: Role = "reranker"
ANSWER = "Yes"
HEAD = "lm_head.weight"
# What the model is computed in on a GPU, by its type. Float16 overflows in a Gemma.
HALVES: dict[str, ComputeDtype] = {
    "gemma": "bfloat16",
    "gemma2": "bfloat16",
    "llama": "float16",
    "mistral": "float16",
    "qwen2": "float16",
    "qwen3": "float16",
}
# Of models without a card nobody knows which question they were tuned with; this one has one.
TUNED_SO = "bge-reranker-v2-gemma"


def recognises(folder: ModelFolder) -> bool:
    """Tell a language model with its head by what config.json says it is."""
    architectures = folder.config.get("architectures")
    return isinstance(architectures, list) and any(str(a).endswith("ForCausalLM") for a in architectures)


def resolve(folder: ModelFolder, settings: RerankSettings, *, on_gpu: bool) -> ModelSpec:
    """Settle length, prompt and dtype, and that there is what the score is made of.

    Raises:
        ModelError: the language model is of a type that is not known here, runs by code of its own, lacks its
            head or a token for the answer, or nobody says with which question it was tuned.
    """
    alien = (*LAYER_SETTINGS, *MERGE_SETTINGS)
    refuse_settings(settings, alien, "is a language model with one score, which has none")
    named = f"rerank.model {settings.model}"
    kind = str(folder.config.get("model_type"))
    if folder.config.get("auto_map"):
        raise ModelError(
            f"{named}: is a language model with Python code of its own (auto_map of config.json), without "
            "which its scores might not be its authors'; it is not run"
        )
    if kind not in HALVES:
        raise ModelError(
            f"{named}: is a language model of type {kind}; as rerankers are known: {', '.join(HALVES)}"
        )
    if HEAD not in folder.weights and folder.config.get("tie_word_embeddings") is False:
        raise ModelError(f"{named}: its head, {HEAD}, is not in its files; save it again whole")
    if settings.prompt is None and not _is_tuned_so(settings.model):
        raise ModelError(
            f"{named}: is a language model, and nothing says that it was tuned to rerank, nor with which "
            f"question; set rerank.prompt to the one it was tuned with ({TUNED_SO}: {YES_OR_NO!r})"
        )
    _check_answer(folder.path)
    return resolve_pairs(folder, settings, family=NAME, prompt=YES_OR_NO, half=HALVES[kind], on_gpu=on_gpu)


def feeder(spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> PairFeeder:
    """Load the tokenizer, which joins pairs by the prompt."""
    return prompt_feeder(spec, folder, beginning="if_distinct", trust_remote_code=trust_remote_code)


packing_config = packing_config_of_folder


def load(spec: ModelSpec, folder: Path, how: "Loading") -> "tuple[torch.nn.Module, Sequence[Head]]":
    """Load the model without its head, and of that the row of the answer alone."""
    from bge_ray.model.heads import AnswerLogit
    from bge_ray.model.run.load import load_config, load_decoder
    from bge_ray.model.run.tensors import read_row

    config = load_config(folder)
    model: Any = load_decoder(folder, config, how)
    answer = _answer_id(read_tokenizer(folder / TOKENIZER_FILE), folder)
    tied = config.tie_word_embeddings
    row = model.get_input_embeddings().weight[answer] if tied else read_row(folder, HEAD, answer)
    cap = getattr(config, "final_logit_softcapping", None)
    return model, (AnswerLogit(spec.output(SCORE), row, cap),)


def _is_tuned_so(name: str) -> bool:
    """Tell whether the model of a name has a card of this family, whose question is known."""
    card = find_card(name)
    return card is not None and card.family == NAME


def _check_answer(folder: Path) -> None:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ModelError(f"{folder}: has no fast tokenizer (tokenizer.json)")
    _answer_id(read_tokenizer(path), folder)


def _answer_id(tokenizer: Tokenizer, folder: Path) -> int:
    ids = tokenizer.encode(ANSWER, add_special_tokens=False).ids
    if len(ids) != 1 or ANSWER not in (tokenizer.id_to_token(ids[0]) or ""):
        raise ModelError(f"{folder}: its tokenizer has no token for {ANSWER!r}, whose logit is the score")
    return int(ids[0])
