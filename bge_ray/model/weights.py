"""The files of a model folder that hold its weights, and the names of these. No torch in this process."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from bge_ray.errors import ModelError

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


@dataclass(frozen=True)
class WeightFiles:
    """What transformers reads the weights from: ``files``, listed by ``index`` where there are several.

    ``pickled`` ones are read with torch's restricted reader, which builds tensors and runs nothing.
    """

    files: tuple[Path, ...]
    index: Path | None
    pickled: bool

    def names(self) -> frozenset[str]:
        """Return the names of all weights, without reading these.

        Raises:
            ModelError: names the file that cannot be read, or that holds more than tensors.
        """
        if self.pickled:
            return frozenset(_pickled_names(self.files))
        names: set[str] = set()
        for path in self.files:
            try:
                with safe_open(path, framework="numpy") as file:
                    names.update(file.keys())
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: is no safetensors file: {error}") from error
        return frozenset(names)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a weight by the header of its file; None of a pickled one, which has none.

        Raises:
            ModelError: the weight is not there, or a file cannot be read.
        """
        if self.pickled:
            return None
        for path in self.files:
            try:
                with safe_open(path, framework="numpy") as file:
                    if name in file.keys():  # noqa: SIM118 - no mapping
                        return tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: is no safetensors file: {error}") from error
        raise ModelError(f"{self.files[0].parent}: {name} is not in its files")


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


def _pickled_names(files: tuple[Path, ...]) -> list[str]:
    # In a process of its own: it takes torch, which a driver does without.
    command = [sys.executable, "-m", "bge_ray.model.run.pickled", *map(str, files)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(  # noqa: S603 - our own module, and paths
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"the reader ended with code {done.returncode}"]
        raise ModelError(lines[-1])
    names: list[str] = json.loads(done.stdout)
    return names
