"""The gradient of a large batch in the memory of a small one: the batch is computed twice, piece by piece.

First without a graph, for the loss and its gradient by what the model made of each row; then each piece
again, with a graph, to carry that on to the weights.
Source: Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
RepL4NLP 2021.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

Features: TypeAlias = dict[str, torch.Tensor]
# Features of n rows to tensors of n rows each, such as their embeddings.
Represent: TypeAlias = Callable[[Features], tuple[torch.Tensor, ...]]
# What was made of each batch, in their order, to the loss.
LossOf: TypeAlias = Callable[[list[tuple[torch.Tensor, ...]]], torch.Tensor]


def cached_loss(
    batches: Sequence[Features], rows: int, represent: Represent, loss_of: LossOf, model: Any
) -> torch.Tensor:
    """Return the loss, whose backward pass computes the gradient of all weights of the model.

    Args:
        batches: such as the queries and the passages of a step.
        rows: of a piece.
        represent: runs the model.
        loss_of: of what was made.
        model: whose gradients several workers share, if it is wrapped for that.
    """
    pieces = [
        [_cut(features, start, rows) for start in range(0, _rows(features), rows)] for features in batches
    ]
    states: list[list[_Random]] = []
    leaves = []
    for of_batch in pieces:
        made = []
        states.append([])
        for piece in of_batch:
            states[-1].append(_Random(piece["input_ids"].device))
            with torch.no_grad():
                made.append(represent(dict(piece)))
        leaves.append(tuple(torch.cat(parts).requires_grad_() for parts in zip(*made, strict=True)))
    with torch.enable_grad():
        loss = loss_of(leaves)
    # Not by backward(), which DDP would take for that of the step.
    flat = [leaf for of_batch in leaves for leaf in of_batch]
    gradients = iter(torch.autograd.grad(loss, flat))
    wanted = [[next(gradients) for _ in of_batch] for of_batch in leaves]

    unshared = getattr(model, "no_sync", contextlib.nullcontext)

    def replay(scale: torch.Tensor) -> None:
        last = (len(pieces) - 1, len(pieces[-1]) - 1)
        for number, of_batch in enumerate(pieces):
            for place, piece in enumerate(of_batch):
                start = place * rows
                # Workers agree on the sum of all pieces, which the last one brings.
                quiet = contextlib.nullcontext() if (number, place) == last else unshared()
                with quiet, torch.enable_grad():
                    with states[number][place].again():
                        made = represent(dict(piece))
                    parts = [
                        (part * (gradient[start : start + rows] * scale)).sum()
                        for part, gradient in zip(made, wanted[number], strict=True)
                    ]
                    torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]

    result = loss.detach().requires_grad_()
    result.register_hook(replay)  # type: ignore[no-untyped-call]
    return result


def _rows(features: Features) -> int:
    return len(features["input_ids"])


def _cut(features: Features, start: int, rows: int) -> Features:
    return {name: tensor[start : start + rows] for name, tensor in features.items()}


class _Random:
    """The state of the random numbers, so that a second pass drops out what the first did."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def again(self) -> Any:
        """Have the same numbers come again, and put the present state back afterwards."""
        devices = [self._device] if self._cuda is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield
