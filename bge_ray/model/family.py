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
from bge_ray.settings.sections import Auto, ComputeDtype, ModelSettings, RerankSettings

if TYPE_CHECKING:  # a family is asked for its spec and its feeder where there is no torch
    import torch

    from bge_ray.model.heads import Head
    from bge_ray.model.run.load import Loading

Role: TypeAlias = Literal["encoder", "reranker"]
Feeder: TypeAlias = TextFeeder | PairFeeder

# Settings of rerankers that only some families have.
LAYER_SETTINGS = ("cutoff_layers",)
MERGE_SETTINGS = ("compress_ratio", "compress_layers", "head_choice")


def settle_dtype(asked: ComputeDtype | Auto, *, on_gpu: bool, half: ComputeDtype = "float16") -> ComputeDtype:
    """Return what to compute in; automatic goes by the device, and on a GPU is what suits the model."""
    if asked != "auto":
        return asked
    return half if on_gpu else "float32"


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


class Family(Protocol):
    """One kind of checkpoint; a module of `families` is one. Only ``load`` may import torch.

    ``PACKS``: its models may run packed where `packed.can_pack` says so of their architecture.
    """

    NAME: str
    ROLE: Role
    PACKS: bool

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

    def load(self, spec: ModelSpec, folder: Path, how: "Loading") -> "tuple[torch.nn.Module, Sequence[Head]]":
        """Load the model and its heads, one an output of the spec, in their order.

        Raises:
            ModelError: the files cannot be read, or a weight would stay random.
        """
