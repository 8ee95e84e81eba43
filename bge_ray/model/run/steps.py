"""What follows the pooling of a sentence-transformers folder, as modules of torch."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the name the field uses
from safetensors import SafetensorError
from safetensors.torch import load_file

from bge_ray.errors import ModelError
from bge_ray.model.modules import LayerNorm, Linear, Normalize, Step
from bge_ray.model.run.pickled import read_pickled


class Projection(torch.nn.Module):
    """A linear layer and an activation, and the input added where it says so."""

    def __init__(self, step: Linear) -> None:
        """Make it with random weights.

        Raises:
            ModelError: torch has no such activation, or it takes arguments.
        """
        super().__init__()
        self.linear = torch.nn.Linear(step.in_features, step.out_features, bias=step.bias)
        kind = getattr(torch.nn, step.activation, None)
        if not isinstance(kind, type) or not issubclass(kind, torch.nn.Module):
            raise ModelError(f"{step.weights.parent}: torch.nn has no activation {step.activation}")
        try:
            self.activation_function = kind()
        except TypeError as error:
            raise ModelError(
                f"{step.weights.parent}: the activation {step.activation} is not complete: {error}"
            ) from error
        self._residual = step.residual
        if step.residual and step.in_features != step.out_features:
            self.residual = torch.nn.Linear(step.in_features, step.out_features, bias=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return (rows, out_features) of (rows, in_features)."""
        made = torch.as_tensor(self.activation_function(self.linear(vectors)))
        if not self._residual:
            return made
        return made + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class Norm(torch.nn.Module):
    """A layer norm, under the name that its file has."""

    def __init__(self, step: LayerNorm) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(step.dimension)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return (rows, dim) of (rows, dim)."""
        return torch.as_tensor(self.norm(vectors))


class UnitNorm(torch.nn.Module):
    """Scaling to unit L2 norm."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return (rows, dim) of (rows, dim)."""
        return F.normalize(vectors, dim=-1)


def load_steps(steps: Sequence[Step], dtype: torch.dtype) -> list[torch.nn.Module]:
    """Load steps with their weights, in evaluation mode.

    Raises:
        ModelError: a file cannot be read, or lacks a weight, or has one too many or of another shape.
    """
    return [_load(step, dtype) for step in steps]


def _load(step: Step, dtype: torch.dtype) -> torch.nn.Module:
    if isinstance(step, Normalize):
        return UnitNorm()
    module = Projection(step) if isinstance(step, Linear) else Norm(step)
    try:
        module.load_state_dict(_tensors(step.weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{step.weights}: is not what its config.json says: {reason}") from error
    return module.to(dtype).eval().requires_grad_(False)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: is no whole safetensors file ({error}); fetch it again") from error
    return read_pickled(path, "cpu")
