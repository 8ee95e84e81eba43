"""The rows of all workers in each of them, with the gradient that they have everywhere.

`torch.distributed`'s own gathering gives none to the rows of others, and FlagEmbedding's losses over all
workers thereby have 1 / world_size of the gradient of the same loss in one process.
"""

from typing import Any

import torch
from torch import distributed


def world() -> tuple[int, int]:
    """Return this worker's rank and how many there are; (0, 1) where nothing is distributed."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def first_row(n: int) -> int:
    """Return where this worker's n rows begin among those of all, each of which has n."""
    return world()[0] * n


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """Return the (n, dim) rows of all workers in the order of their ranks; each must have as many."""
    if world()[1] == 1:
        return rows
    found: torch.Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: torch.Tensor) -> torch.Tensor:
        context.n = len(rows)
        parts = [torch.empty_like(rows) for _ in range(world()[1])]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Sum what the losses of all workers say of this one's rows; DDP divides by their number."""
        total = grads[0].contiguous().clone()
        distributed.all_reduce(total)
        start = first_row(context.n)
        return total[start : start + context.n]
