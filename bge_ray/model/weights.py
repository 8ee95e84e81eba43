"""The files of a model folder that hold its weights, their names and shapes. No torch in this process."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError, safe_open

from bge_ray.errors import ModelError
from bge_ray.model.pointers import refuse_pointer

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
# Heads that lie beside the model, by the output that they make; the first file that is there counts.
HEAD_FILES = {
    "sparse": ("sparse_linear.safetensors", "sparse_linear.pt"),
    "colbert": ("colbert_linear.safetensors", "colbert_linear.pt"),
}

Shape: TypeAlias = tuple[int, ...]
# The number of the layer that a weight of a decoder belongs to.
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class WeightFiles:
    """What transformers reads the weights from: ``files``, listed by ``index`` where there are several.

    ``pickled`` ones are read with torch's restricted reader, which builds tensors and runs nothing.
    """

    files: tuple[Path, ...]
    index: Path | None
    pickled: bool

    def shapes(self) -> dict[str, Shape]:
        """Return the shapes of all weights by name, without reading these.

        Raises:
            ModelError: names the file that cannot be read, or that holds more than tensors.
        """
        found = tensor_shapes(self.files)
        return {name: shape for shapes in found.values() for name, shape in shapes.items()}


def count_numbers(folder: Path, n_layers: int | None = None) -> int:
    """Return how many numbers the weights of a model hold, by the headers of their files.

    A head that makes words of states is not counted: none of ours loads it. Pickled files are not opened for
    the whole of a model: theirs are taken to be float32.

    Args:
        folder: the model's.
        n_layers: how many layers of a decoder are loaded, where it is cut off; None is all.

    Raises:
        ModelError: there are none, or a file cannot be read.
    """
    weights = weight_files(folder)
    if weights.pickled and n_layers is None:
        return sum(path.stat().st_size for path in weights.files) // 4

    def is_loaded(name: str) -> bool:
        layer = _LAYER.search(name)
        cut_off = n_layers is not None and layer is not None and int(layer[1]) >= n_layers
        return not (cut_off or name.startswith("lm_head."))

    return sum(math.prod(shape) for name, shape in weights.shapes().items() if is_loaded(name))


def weights_bytes(folder: Path, dtype: str, n_layers: int | None = None) -> int:
    """Return the bytes that the weights of a model, or of its first layers, take in a compute dtype."""
    return count_numbers(folder, n_layers) * (4 if dtype == "float32" else 2)


def weight_files(folder: Path) -> WeightFiles:
    """Find the weights: safetensors before pickled ones, one file before several with an index.

    Raises:
        ModelError: there are none, or the index names a file that is not there.
    """
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file():
            return WeightFiles((folder / name,), None, name == PICKLED)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return WeightFiles(_shards(index), index, name == PICKLED)
    raise ModelError(f"{folder}: has no weights: neither {SAFETENSORS} nor {PICKLED}, nor an index of shards")


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        refuse_pointer(index)
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is no index of weights: {error!r}") from error
    if not names or any(not isinstance(name, str) or "/" in name for name in names):
        raise ModelError(f"{index}: names no files of its folder")
    shards = tuple(index.with_name(name) for name in sorted(names))
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise ModelError(
            f"{index}: {len(missing)} of its {len(shards)} files are missing, such as {missing[0]}"
        )
    return shards


def head_file(folder: Path, output: str) -> Path | None:
    """Return the file with the head of an output; None if there is none."""
    paths = (folder / name for name in HEAD_FILES[output])
    return next((path for path in paths if path.is_file()), None)


def is_head(name: str) -> bool:
    """Tell whether a file of this name holds a head, and not the weights of a model."""
    return any(name in files for files in HEAD_FILES.values())


def tensor_shapes(files: Sequence[Path]) -> dict[Path, dict[str, Shape]]:
    """Return the shapes of the tensors of each file, safetensors or pickled, by name.

    Raises:
        ModelError: one cannot be read, or holds more than tensors.
    """
    pickled = [path for path in files if path.suffix != ".safetensors"]
    found = dict(zip(pickled, _pickled_shapes(pickled), strict=True)) if pickled else {}
    return {path: found[path] if path in found else _safe_shapes(path) for path in files}


def _safe_shapes(path: Path) -> dict[str, Shape]:
    try:
        refuse_pointer(path)
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: is no whole safetensors file ({error}); fetch it again") from error


def _pickled_shapes(files: Sequence[Path]) -> list[dict[str, Shape]]:
    if "torch" in sys.modules:
        from bge_ray.model.run.pickled import read_pickled

        read = [read_pickled(path, "meta") for path in files]
        return [{name: tuple(tensor.shape) for name, tensor in file.items()} for file in read]
    # In a process of its own: it takes torch, which a driver does without.
    command = [sys.executable, "-m", "bge_ray.model.run.pickled", *map(str, files)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(  # noqa: S603 - our own module, and paths
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"the reader ended with code {done.returncode}"]
        raise ModelError(lines[-1])
    found: list[dict[str, list[int]]] = json.loads(done.stdout)
    return [{name: tuple(shape) for name, shape in shapes.items()} for shapes in found]
