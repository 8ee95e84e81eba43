"""The names of pickled weights, as JSON; run as a module by `bge_ray.model.weights`."""

import json
import sys
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch

from bge_ray.errors import ModelError


def pickled_names(path: Path) -> list[str]:
    """Return the names of the weights in a file of `torch.save`, read by torch's restricted reader.

    Raises:
        ModelError: it cannot be read, or holds something else than tensors by name.
    """
    try:
        # Nothing is read of the tensors of today's format; the one of before 2020 has no other way.
        state = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        # Its advice to turn the restriction off stands around the reason, a paragraph of its own.
        paragraphs = str(error).split("\n\n")
        reason = " ".join(paragraphs[-2 if len(paragraphs) > 1 else 0].split())
        raise ModelError(
            f"{path}: refused, torch's restricted reader finds more than tensors in it or damage ({reason}); "
            "only tensors are read from pickled weights: save it again, best as safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{path}: cannot be read as weights of torch: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ModelError(f"{path}: holds a {type(state).__name__} and not weights by name")
    return sorted(state)


if __name__ == "__main__":
    try:
        json.dump([name for path in sys.argv[1:] for name in pickled_names(Path(path))], sys.stdout)
    except ModelError as failure:
        sys.exit(str(failure))
