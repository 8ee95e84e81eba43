"""bge-m3 and what is tuned from it: a dense vector, token weights, and a vector a token, of one forward pass.

The two heads lie beside the model, each in a file of its own. Who asks for the dense vectors alone gets them
from the `dense` family: the heads decide nothing of them.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bge_ray.errors import ModelError
from bge_ray.model.families import dense
from bge_ray.model.family import Role, packing_config_of_folder
from bge_ray.model.feed.texts import TextFeeder, load_tokenizer
from bge_ray.model.folder import ModelFolder
from bge_ray.model.weights import HEAD_FILES, Shape, head_file, tensor_shapes
from bge_ray.records.model import COLBERT, EMBEDDING, SPARSE, ModelSpec
from bge_ray.records.outputs import Output
from bge_ray.settings.sections import ModelSettings

if TYPE_CHECKING:
    import torch

    from bge_ray.model.heads import Head
    from bge_ray.model.run.load import Loading

NAME = "m3"
ROLE: Role = "encoder"
ORDER = (EMBEDDING, SPARSE, COLBERT)


def recognises(folder: ModelFolder) -> bool:
    """Tell by the file of a head."""
    return any(head_file(folder.path, output) is not None for output in HEAD_FILES)


def resolve(folder: ModelFolder, settings: ModelSettings, *, on_gpu: bool) -> ModelSpec:
    """Settle what `dense` does, and the heads of the outputs that are asked for.

    Raises:
        ModelError: as of `dense`; or a head that is asked for is missing, or is none of this model.
    """
    if settings.pooling == "auto" and folder.pooling() is None:
        settings = settings.model_copy(update={"pooling": "cls"})  # what the dense vector of an m3 is
    spec = dense.resolve(folder, settings, on_gpu=on_gpu)
    if settings.outputs == (EMBEDDING,):
        return spec
    paths = {name: _file_of(folder.path, name) for name in HEAD_FILES if name in settings.outputs}
    shapes = tensor_shapes(list(paths.values()))
    made = {name: _head_output(folder, name, path, shapes[path]) for name, path in paths.items()}
    if EMBEDDING in settings.outputs:
        made[EMBEDDING] = spec.output(EMBEDDING)
    # In one order, whatever order was asked for: the same columns make the same data set.
    return dataclasses.replace(spec, family=NAME, outputs=tuple(made[name] for name in ORDER if name in made))


def feeder(spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> TextFeeder:
    """Load the tokenizer, with the spec's instructions."""
    return dense.feeder(spec, folder, trust_remote_code=trust_remote_code)


packing_config = packing_config_of_folder


def load(spec: ModelSpec, folder: Path, how: "Loading") -> "tuple[torch.nn.Module, Sequence[Head]]":
    """Load the encoder and the heads of the spec's outputs.

    Raises:
        ModelError: as `dense.load`, or the file of a head is not the one that the run was planned with.
    """
    from bge_ray.model.heads import TokenVectors, TokenWeights
    from bge_ray.model.run.load import load_encoder, load_linear

    heads: list[Head] = []
    for output in spec.outputs:
        if output.name == EMBEDDING:
            heads.append(dense.embedding_head(spec, folder, how))
            continue
        path = _file_of(folder, output.name)
        if _sha256(path) != output.head:
            raise ModelError(
                f"{path}: differs from the one that the run was planned with; give every node the same folder"
            )
        linear = load_linear(path, how.dtype)
        if output.name == SPARSE:
            heads.append(TokenWeights(output, linear, without_weight(folder, how.trust_remote_code)))
        else:
            heads.append(TokenVectors(output, linear, normalize=spec.normalize))
    return load_encoder(folder, how), heads


def _head_output(folder: ModelFolder, name: str, path: Path, shapes: Mapping[str, Shape]) -> Output:
    """Return what the head in a file makes, as its shapes say."""
    hidden, weight, bias = folder.hidden_size, shapes.get("weight", ()), shapes.get("bias", ())
    if set(shapes) != {"weight", "bias"} or weight[1:] != (hidden,) or bias != weight[:1]:
        found = ", ".join(f"{part} {list(shape)}" for part, shape in sorted(shapes.items()))
        raise ModelError(
            f"{path}: holds {found or 'nothing'}, where a head of this model holds weight [n, {hidden}] and "
            "bias [n]"
        )
    if name == COLBERT:
        return Output(name, "multi", weight[0], "float16", _sha256(path))
    if weight[0] != 1:
        raise ModelError(f"{path}: gives {weight[0]} numbers a token, where a weight is one")
    vocabulary = folder.config.get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise ModelError(f"{folder.path}/config.json: no vocab_size")
    return Output(name, "sparse", vocabulary, "float16", _sha256(path))


def _file_of(folder: Path, output: str) -> Path:
    path = head_file(folder, output)
    if path is None:
        raise ModelError(
            f"model.outputs: {output} needs {' or '.join(HEAD_FILES[output])}, which {folder} does not have; "
            "its weights would be random"
        )
    return path


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: {error}") from error


def without_weight(folder: Path, trust_remote_code: bool) -> set[int]:
    """Return the ids of the tokens that stand for no part of a text."""
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    special = (
        tokenizer.cls_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    )
    return {token for token in special if token is not None}
