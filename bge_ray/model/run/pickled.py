"""Pickled weights, by torch's restricted reader; their shapes as JSON, run as a module by `model.weights`."""

import json
import re
import sys
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch

from bge_ray.errors import ModelError, in_a_line
from bge_ray.model.pointers import refuse_pointer


def read_pickled(path: Path, place: Literal["cpu", "meta"]) -> dict[str, torch.Tensor]:
    """Return the weights in a file of `torch.save` by name.

    Args:
        path: the file.
        place: ``meta`` for names and shapes: nothing is read of the tensors of today's format; that of
            before 2020 has no other way.

    Raises:
        ModelError: it cannot be read, or holds something else than tensors by name.
    """
    try:
        refuse_pointer(path)
        state = torch.load(path, map_location=place, weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        # Its advice to turn the restriction off stands around the reason.
        found = re.search(r"unsupported (?:global: )?\w+ [\w.]+", str(error), re.IGNORECASE)
        reason = found[0] if found is not None else in_a_line(error)
        raise ModelError(
            f"{path}: refused, torch's restricted reader finds more than tensors in it or damage "
            f"({reason}); "
            "only tensors are read from pickled weights: save it again, best as safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{path}: cannot be read as weights of torch: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ModelError(f"{path}: holds a {type(state).__name__} and not weights by name")
    # A training may keep a number beside its weights, which are all that is asked for.
    return {name: tensor for name, tensor in sorted(state.items()) if isinstance(tensor, torch.Tensor)}


if __name__ == "__main__":
    try:
        files = [read_pickled(Path(path), "meta") for path in sys.argv[1:]]
        json.dump([{name: list(tensor.shape) for name, tensor in file.items()} for file in files], sys.stdout)
    except ModelError as failure:
        sys.exit(str(failure))
