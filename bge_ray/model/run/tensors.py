"""Single rows of weights, read from a model folder without the rest of them."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bge_ray.errors import ModelError
from bge_ray.model.run.pickled import read_pickled
from bge_ray.model.weights import weight_files


def read_row(folder: Path, name: str, row: int) -> torch.Tensor:
    """Read one row of a weight.

    Returns:
        (columns,) float32.

    Raises:
        ModelError: the weight is not there, has no such row, or its file cannot be read.
    """
    weights = weight_files(folder)
    read = _pickled_row if weights.pickled else _row
    for path in weights.files:
        try:
            found = read(path, name, row)
        except (OSError, SafetensorError, IndexError, RuntimeError) as error:
            raise ModelError(f"{path}: row {row} of {name} cannot be read: {error}") from error
        if found is not None:
            return found.float().clone()
    raise ModelError(f"{folder}: {name} is not in its files")


def _row(path: Path, name: str, row: int) -> torch.Tensor | None:
    with safe_open(path, framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118 - no mapping
            return None
        part = file.get_slice(name)
        shape = part.get_shape()
        if len(shape) != 2 or row >= shape[0]:
            raise IndexError(f"its shape is {shape}")
        return torch.as_tensor(part[row : row + 1][0])


def _pickled_row(path: Path, name: str, row: int) -> torch.Tensor | None:
    weight = read_pickled(path, "cpu").get(name)
    return None if weight is None else weight[row]
