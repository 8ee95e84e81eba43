"""Counts of tokens for BM25: the tokenizer of any model folder, and nothing else of it.

It is asked for by ``model.outputs: [bm25]`` and no folder is of this kind by itself. Beside other outputs the
counts are made of the tokens that the model reads, cut where it cuts them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bge_ray.errors import ModelError
from bge_ray.model.family import Role
from bge_ray.model.feed.texts import TextFeeder, load_tokenizer
from bge_ray.model.folder import ModelFolder
from bge_ray.model.source import hash_tokenizer
from bge_ray.records.model import BM25, ModelSpec
from bge_ray.records.outputs import Output
from bge_ray.settings.sections import ModelSettings

if TYPE_CHECKING:
    import torch

    from bge_ray.model.heads import Head
    from bge_ray.model.run.load import Loading

NAME = "bm25"
ROLE: Role = "encoder"
# No model reads them, so that all of a text counts; and float16 holds as many of one token.
DEFAULT_MAX_LENGTH = 32_768


def recognises(folder: ModelFolder) -> bool:  # noqa: ARG001 - what is asked for decides
    """Take none: any folder has a tokenizer."""
    return False


def resolve(folder: ModelFolder, settings: ModelSettings, *, on_gpu: bool) -> ModelSpec:  # noqa: ARG001
    """Settle the tokenizer and how much of a text is counted.

    Raises:
        ModelError: something is to be put before texts, which would be counted; or there is no fast
            tokenizer.
    """
    names = ("query_instruction", "passage_instruction", "task")
    given = [f"model.{name}" for name in names if getattr(settings, name)]
    if given:
        raise ModelError(f"{', '.join(given)}: words before a text would be counted for it; leave it out")
    return ModelSpec(
        name=settings.name,
        revision=folder.revision,
        weights_sha256=hash_tokenizer(folder.path),
        family=NAME,
        outputs=(counts_output(folder, trust_remote_code=settings.trust_remote_code),),
        pooling="cls",
        max_length=settings.max_length or DEFAULT_MAX_LENGTH,
        normalize=False,
        dtype="float32",
        query_instruction="",
        passage_instruction="",
    )


def counts_output(folder: ModelFolder, *, trust_remote_code: bool) -> Output:
    """Return the output of counts, by the largest id that the tokenizer of a folder may give.

    Raises:
        ModelError: there is no fast tokenizer.
    """
    vocabulary = load_tokenizer(folder.path, trust_remote_code=trust_remote_code).get_vocab()
    return Output(BM25, "sparse", max(vocabulary.values()) + 1, "float16")


def feeder(spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> TextFeeder:
    """Load the tokenizer."""
    return TextFeeder(
        folder,
        spec.max_length,
        lower_case=ModelFolder(folder).lower_cases,
        trust_remote_code=trust_remote_code,
    )


def packing_config(spec: ModelSpec, folder: Path) -> None:
    """There is nothing to pack."""


def load(spec: ModelSpec, folder: Path, how: "Loading") -> "tuple[torch.nn.Module, Sequence[Head]]":  # noqa: ARG001
    """Refuse: `model.run.model.open_model` gives what counts.

    Raises:
        ModelError: always.
    """
    raise ModelError(f"{spec.name}: has no weights to load: its output is {BM25} alone")
