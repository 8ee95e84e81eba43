"""A sum and the layer norm of it: one kernel on a CUDA device, compiled before a run and never within one.

A layer of an encoder does it twice, and as two kernels it reads and writes every state once more.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - the name the field uses

from bge_ray.model.run.memory import is_out_of_memory

logger = logging.getLogger(__name__)

Kernel: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

# Tokens of the batch that is compiled for; any number from 2 on runs the same code.
EXAMPLE_TOKENS = 16


class AddNorm(torch.nn.Module):
    """The layer norm of a sum; two kernels, or one after `compile_norms`."""

    def __init__(self, norm: torch.nn.LayerNorm) -> None:
        """Take over the weights of a layer norm."""
        super().__init__()
        self.weight = norm.weight.requires_grad_(False)
        self.bias = norm.bias.requires_grad_(False)
        self.eps = float(norm.eps)
        self.kernel: Kernel = add_norm

    def forward(self, states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return (tokens, dim) of two (tokens, dim), contiguous."""
        # Compiled code takes any number of tokens but one, for which another would have to be compiled.
        kernel = self.kernel if len(states) > 1 else add_norm
        return kernel(states, residual, self.weight, self.bias, self.eps)


def add_norm(
    states: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return the layer norm of the sum of two (tokens, dim); weight and bias are (dim,)."""
    return F.layer_norm(states + residual, weight.shape, weight, bias, eps)


def is_compiled_on(device: torch.device) -> bool:
    """Tell where compiling is worth its time."""
    return device.type == "cuda"


def compile_norms(model: torch.nn.Module) -> None:
    """Compile the norms of a model on a CUDA device; on others they stay as they are.

    Where that fails, as without a C compiler, the model runs with two kernels, and a warning says so.

    Raises:
        RuntimeError: there is no memory for a batch of a few tokens.
    """
    norms = [
        part for part in model.modules() if isinstance(part, AddNorm) and is_compiled_on(part.weight.device)
    ]
    if not norms:
        return
    try:
        kernel = compiled(norms)
    except (RuntimeError, OSError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        logger.warning(
            "adding and normalising is not compiled on this machine and takes two kernels instead of one, "
            "some percent of the time: %s: %s",
            type(error).__name__,
            reason,
        )
        return
    for norm in norms:
        norm.kernel = kernel


@torch.inference_mode()
def compiled(norms: list[AddNorm]) -> Kernel:
    """Return the kernel of some norms, compiled for each of their sizes.

    Raises:
        RuntimeError: the compiler fails (torch's own errors are of this kind).
        OSError: there is none, or no room for what it makes.
        ImportError: a part of it is not installed.
    """
    from torch._dynamo import mark_dynamic
    from torch._inductor import config

    # The number of tokens alone varies: with the other sizes known the kernel holds a state in registers.
    kernel: Kernel = torch.compile(add_norm, dynamic=False)
    # One small kernel needs none of the processes that would stay behind for more.
    settings: Any = config
    with settings.patch(compile_threads=1):
        for norm in {(n.weight.shape, n.weight.dtype, n.eps): n for n in norms}.values():
            shape = (EXAMPLE_TOKENS, *norm.weight.shape)
            states, residual = (norm.weight.new_zeros(shape) for _ in range(2))
            mark_dynamic(states, 0)
            mark_dynamic(residual, 0)
            kernel(states, residual, norm.weight, norm.bias, norm.eps)
    return kernel
