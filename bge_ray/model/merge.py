"""Which models may be merged, and what of their files becomes what of the merged one's. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bge_ray.errors import ModelError
from bge_ray.model.folder import ModelFolder
from bge_ray.model.modules import (
    MODULES_FILE,
    POOLING_FILE,
    list_modules,
    module_files,
    read_object,
    read_pooling,
)
from bge_ray.model.source import CODE_FILES, DECISIVE_FILES, HEAD_PATTERNS
from bge_ray.model.weights import SAFETENSORS, Shape, weight_files

# What these keys of config.json say is where a model was made, and by what; no output depends on it.
_MADE_BY = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
# A training may have left these in tokenizer.json; each use sets its own.
_OF_A_USE = ("truncation", "padding")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "*.model")
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the merged file: as the first model has it, and where each model does.

    ``files`` are one a model, or the first model's alone, of a tensor that is no weight and is copied.
    """

    name: str
    dtype: str
    shape: Shape
    files: tuple[Path, ...]

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightFile:
    """A file of weights to be made, by its path in the folder, with its tensors in their order in it."""

    path: str
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class MergePlan:
    """What the merged folder is made of: files of weights, and files to copy from the first model."""

    weights: tuple[WeightFile, ...]
    copied: dict[str, Path]


def plan_merge(folders: dict[str, Path]) -> MergePlan:
    """Check that models differ in nothing but their weights, and say what becomes of their files.

    Args:
        folders: on this node, by the names of the models; the first one gives what is not merged.

    Raises:
        ModelError: names the models and what differs, or a file that is no safetensors.
    """
    names, paths = list(folders), list(folders.values())
    for name, path in zip(names[1:], paths[1:], strict=True):
        _check_config(names[0], paths[0], name, path)
        _check_tokenizer(names[0], paths[0], name, path)
        _check_modules(names[0], paths[0], name, path)
    parts = {name: _weight_files(name, path) for name, path in folders.items()}
    weights = []
    for file in parts[names[0]]:
        for name in names[1:]:
            if parts[name].keys() != parts[names[0]].keys():
                differing = sorted(parts[name].keys() ^ parts[names[0]].keys())
                raise ModelError(f"merge.models: {names[0]} and {name} have different heads: {differing[0]}")
        weights.append(WeightFile(file, _tensors(file, {name: parts[name][file] for name in names})))
    return MergePlan(tuple(weights), _copied(paths[0], set(parts[names[0]])))


def _weight_files(name: str, folder: Path) -> dict[str, tuple[Path, ...]]:
    """Return the files of weights by what they become in the merged folder."""
    found = weight_files(folder)
    heads = [path for pattern in HEAD_PATTERNS for path in folder.glob(pattern)]
    of_modules = [path for path in module_files(folder) if path.suffix in (".safetensors", ".bin")]
    beside = [*heads, *of_modules]
    pickled = [path for path in [*found.files, *beside] if path.suffix != ".safetensors"]
    if pickled:
        raise ModelError(
            f"merge.models: {name} has {pickled[0].name}, which is no safetensors file; write the model anew "
            "with save_pretrained, or convert the file"
        )
    return {SAFETENSORS: found.files} | {path.relative_to(folder).as_posix(): (path,) for path in beside}


def _tensors(file: str, models: dict[str, tuple[Path, ...]]) -> tuple[Tensor, ...]:
    """Return the tensors of one merged file, larger numbers first, as safetensors orders them."""
    found = {name: _read_headers(paths) for name, paths in models.items()}
    first, *others = found
    weights = {tensor for tensor, (dtype, _, _) in found[first].items() if dtype in _FLOATS}
    for other in others:
        there = {tensor for tensor, (dtype, _, _) in found[other].items() if dtype in _FLOATS}
        if there != weights:
            lacking = sorted(weights - there) or sorted(there - weights)
            who, has_not = (other, first) if there - weights and not weights - there else (first, other)
            raise ModelError(
                f"merge.models: {who} has {lacking[0]} in {file}, {has_not} has not; {len(weights ^ there)} "
                "weights are of one of them alone, so they are no models of one architecture"
            )
        for tensor in sorted(weights):
            one, two = found[first][tensor][1], found[other][tensor][1]
            if one != two:
                raise ModelError(
                    f"merge.models: {tensor} has the shape {list(one)} in {first} and {list(two)} in {other}"
                )
    tensors = [
        Tensor(
            tensor,
            dtype,
            shape,
            tuple(found[name][tensor][2] for name in (found if tensor in weights else [first])),
        )
        for tensor, (dtype, shape, _) in found[first].items()
    ]
    return tuple(sorted(tensors, key=lambda tensor: (-_FLOATS.get(tensor.dtype, 16), tensor.name)))


def _read_headers(paths: Sequence[Path]) -> dict[str, tuple[str, Shape, Path]]:
    """Return dtype, shape and file of each tensor, without reading it."""
    found = {}
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dictionary
                    part = file.get_slice(name)
                    found[name] = (str(part.get_dtype()), tuple(part.get_shape()), path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: is no whole safetensors file ({error}); fetch it again") from error
    return found


def _check_config(first: str, folder: Path, other: str, other_folder: Path) -> None:
    one, two = (
        {key: value for key, value in ModelFolder(path).config.items() if key not in _MADE_BY}
        for path in (folder, other_folder)
    )
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            raise ModelError(
                f"merge.models: {key} of config.json is {one.get(key)!r} in {first} and {two.get(key)!r} in "
                f"{other}; models of one architecture alone are merged"
            )


def _check_tokenizer(first: str, folder: Path, other: str, other_folder: Path) -> None:
    compared = False
    for pattern in _TOKENIZER_FILES:
        one, two = ({path.name: path for path in at.glob(pattern)} for at in (folder, other_folder))
        for name in sorted(one.keys() & two.keys()):
            compared = True
            if _tokenizer(one[name]) != _tokenizer(two[name]):
                raise ModelError(
                    f"merge.models: {name} differs between {first} and {other}; the same token would "
                    "mean two things"
                )
        # The one file says all that the others do.
        if compared:
            return
    raise ModelError(f"merge.models: {first} and {other} have no file of a tokenizer in common")


def _tokenizer(path: Path) -> Any:
    if path.name != "tokenizer.json":
        return path.read_bytes()
    return {key: value for key, value in read_object(path).items() if key not in _OF_A_USE}


def _check_modules(first: str, folder: Path, other: str, other_folder: Path) -> None:
    """Refuse another pooling; a folder without sentence-transformers' files says nothing against it."""
    one, two = list_modules(folder), list_modules(other_folder)
    if one is not None and two is not None and _kinds(one) != _kinds(two):
        raise ModelError(f"merge.models: {MODULES_FILE} differs between {first} and {other}")
    places = [at / POOLING_FILE for at in (folder, other_folder)]
    if all(place.is_file() for place in places):
        poolings = {read_pooling(read_object(place), place.parent) for place in places}
        if len(poolings) > 1:
            raise ModelError(f"merge.models: {POOLING_FILE} differs between {first} and {other}")


def _kinds(modules: list[tuple[str, str]]) -> list[str]:
    """Return the class of each module: versions of sentence-transformers keep them in different places."""
    return [kind.rpartition(".")[2] for kind, _ in modules]


def _copied(folder: Path, weights: set[str]) -> dict[str, Path]:
    patterns = (*DECISIVE_FILES, *CODE_FILES, "[0-9]*_*/config.json")
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    named = {path.relative_to(folder).as_posix(): path for path in sorted(found)}
    return {name: path for name, path in named.items() if name not in weights}
