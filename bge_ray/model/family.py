"""What a family is, the one place that knows a kind of checkpoint, and what all of them settle alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from bge_ray.errors import ModelError
from bge_ray.model.cards import ModelCard, Prompts, find_card
from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.folder import ModelFolder
from bge_ray.records.model import Example, ModelSpec
from bge_ray.settings.sections import Auto, ComputeDtype, Kernels, ModelSettings, RerankSettings

if TYPE_CHECKING:  # a family is asked for its spec and its feeder where there is no torch
    import torch
    from transformers import PretrainedConfig

    from bge_ray.model.heads import Head
    from bge_ray.model.run.load import Loading

Role: TypeAlias = Literal["encoder", "reranker"]
Feeder: TypeAlias = TextFeeder | PairFeeder

# Settings of rerankers that only some families have.
LAYER_SETTINGS = ("cutoff_layers",)
MERGE_SETTINGS = ("compress_ratio", "compress_layers", "head_choice")

# Of which `run.fused` knows the layers, and their activation, which is also the one where none is named.
FUSED_TYPES = {"bert", "camembert", "roberta", "xlm-roberta"}
FUSED_ACTIVATION = "gelu"


def settle_dtype(asked: ComputeDtype | Auto, *, on_gpu: bool, half: ComputeDtype = "float16") -> ComputeDtype:
    """Return what to compute in; automatic goes by the device, and on a GPU is what suits the model."""
    if asked != "auto":
        return asked
    return half if on_gpu else "float32"


def settle_kernels(
    asked: Kernels | Auto, folder: ModelFolder, dtype: str, *, setting: str, on_gpu: bool, trusted: bool
) -> Kernels:
    """Return how the layers are computed; automatic is what is faster.

    The vectors depend on it, so that it goes by what the whole run shares, and not by what one GPU can do.

    Args:
        asked: by the setting.
        folder: the model's.
        dtype: what is computed in.
        setting: its name.
        on_gpu: whether the model will run on GPUs.
        trusted: whether Python code of the folder is run, of which nothing is known.

    Raises:
        ModelError: fused is asked for, of a model whose layers are not known.
    """
    if asked == "plain":
        return "plain"
    config = folder.config
    known = (
        config.get("model_type") in FUSED_TYPES
        and config.get("hidden_act", FUSED_ACTIVATION) == FUSED_ACTIVATION
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("is_decoder", False)
        and not (trusted and folder.code_files())
    )
    if asked == "fused":
        if not known:
            raise ModelError(
                f"{setting} fused: {folder.path} is no BERT, RoBERTa, CamemBERT or XLM-RoBERTa with absolute "
                "positions and the activation gelu, the only ones with fused layers; leave it out"
            )
        return "fused"
    return "fused" if known and on_gpu and dtype != "float32" else "plain"


def task_prompts(task: str | None, name: str) -> Prompts | None:
    """Return what ``model.task`` puts before queries and passages of the model of a name; None if not set.

    Raises:
        ModelError: the model has no tasks, or none of that name.
    """
    if task is None:
        return None
    card = find_card(name)
    known = card.prompts if card is not None else {}
    if task not in known:
        tasks = f"its tasks are {', '.join(known)}" if known else "it has no tasks; leave model.task out"
        raise ModelError(f"model.task {task}: {name} has none of that name; {tasks}")
    return known[task]


def shown(settings: ModelSettings, instruction: str) -> tuple[Example, ...]:
    """Return the examples of the settings; one without an instruction has that of the queries."""
    return tuple(
        Example(instruction if e.instruction is None else e.instruction, e.query, e.response)
        for e in settings.examples
    )


def check_length(setting: str, asked: int | None, limit: int | None, name: str) -> None:
    """Refuse more tokens than the model of a name has positions for.

    Raises:
        ModelError: names the setting and the limit.
    """
    if asked is not None and limit is not None and asked > limit:
        raise ModelError(f"{setting} {asked}: {name} has positions for {limit} tokens")


def refuse_code(
    folder: ModelFolder,
    card: ModelCard | None,
    section: Literal["model", "rerank"],
    name: str,
    *,
    trusted: bool,
) -> None:
    """Refuse a folder whose own Python code decides its outputs, where that code is not run.

    transformers says nothing when it knows the model's type: its own class is taken, with the same weights,
    and may make other vectors of them.

    Raises:
        ModelError: names the files that name the code, and the ways out.
    """
    named = folder.code_files()
    if not named or trusted or (card is not None and card.clears_auto_map):
        return
    raise ModelError(
        f"{name}: {' and '.join(named)} of its folder name Python code (auto_map), without which its outputs "
        f"may be others. Set {section}.trust_remote_code=true if you trust its author, or take "
        "auto_map out of the files if transformers' own class is meant"
    )


def refuse_settings(settings: RerankSettings, names: Sequence[str], why: str) -> None:
    """Refuse settings that a reranker has no use for, if they are not left as they are.

    Raises:
        ModelError: names the first.
    """
    for name in names:
        if getattr(settings, name) != RerankSettings.model_fields[name].default:
            raise ModelError(f"rerank.{name}: {settings.model} {why}")


def packing_config_of_folder(spec: ModelSpec, folder: Path) -> "PretrainedConfig":  # noqa: ARG001 - as all families
    """Read config.json of what is built as it says: what most families have for `Family.packing_config`."""
    from bge_ray.model.run.load import load_config

    return load_config(folder)


class Family(Protocol):
    """One kind of checkpoint; a module of `families` is one. Only what loads the model may import torch."""

    NAME: str
    ROLE: Role

    def recognises(self, folder: ModelFolder) -> bool:
        """Tell whether a folder, asked for in this role, is of this kind."""

    def resolve(self, folder: ModelFolder, settings: Any, *, on_gpu: bool) -> ModelSpec:
        """Settle everything that decides the outputs.

        Args:
            folder: the model's.
            settings: the section that asks for it: ModelSettings of an encoder, RerankSettings of a reranker.
            on_gpu: whether it will run on GPUs.

        Raises:
            ModelError: the model is not usable as asked.
        """

    def feeder(self, spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> Feeder:
        """Load what turns texts into token ids.

        Raises:
            ModelError: there is no fast tokenizer, or no room for a text.
        """

    def packing_config(self, spec: ModelSpec, folder: Path) -> "PretrainedConfig | None":
        """Return what `packed.can_pack` is asked about; None where no model of the family runs packed.

        Raises:
            ModelError: the configuration cannot be read.
        """

    def load(self, spec: ModelSpec, folder: Path, how: "Loading") -> "tuple[torch.nn.Module, Sequence[Head]]":
        """Load the model and its heads, one an output of the spec, in their order.

        Raises:
            ModelError: the files cannot be read, or a weight would stay random.
        """
