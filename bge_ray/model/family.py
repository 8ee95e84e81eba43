"""What is asked of a model, and what a family is: the one place that knows a kind of checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from bge_ray.errors import ModelError
from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.folder import ModelFolder
from bge_ray.records.model import ModelSpec
from bge_ray.settings.sections import Auto, ComputeDtype, Pooling

if TYPE_CHECKING:  # a family is asked for its spec and its feeder where there is no torch
    import torch

    from bge_ray.model.heads import Head
    from bge_ray.model.run.load import Loading

Role: TypeAlias = Literal["encoder", "reranker"]
Feeder: TypeAlias = TextFeeder | PairFeeder


@dataclass(frozen=True)
class Asked:
    """What the settings ask of a model; ``section`` is where they stand, for messages.

    A pooling, a normalisation or an instruction is asked of an encoder only.
    """

    section: Literal["model", "rerank"]
    name: str
    max_length: int | None
    dtype: ComputeDtype | Auto
    pooling: Pooling | Auto = "auto"
    normalize: bool = True
    query_instruction: str | None = None
    passage_instruction: str | None = None

    def compute_dtype(self, *, on_gpu: bool) -> ComputeDtype:
        """Return what to compute in; automatic goes by the device."""
        if self.dtype != "auto":
            return self.dtype
        return "float16" if on_gpu else "float32"

    def check_length(self, limit: int | None) -> None:
        """Refuse more tokens than the model has positions for.

        Raises:
            ModelError: names the setting and the limit.
        """
        if self.max_length is not None and limit is not None and self.max_length > limit:
            raise ModelError(
                f"{self.section}.max_length {self.max_length}: {self.name} has positions for {limit} tokens"
            )


class Family(Protocol):
    """One kind of checkpoint; a module of `families` is one. Only ``load`` may import torch."""

    NAME: str
    ROLE: Role

    def recognises(self, folder: ModelFolder) -> bool:
        """Tell whether a folder, asked for in this role, is of this kind."""

    def resolve(self, folder: ModelFolder, asked: Asked, *, on_gpu: bool) -> ModelSpec:
        """Settle everything that decides the outputs.

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
