"""Heads: the states of a forward pass to one output of a model.

What all heads of a model need together decides what its last layer may leave out (`run.last_layer`).
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - the name the field uses
from transformers.utils import ModelOutput

from bge_ray.model.run.inputs import Inputs, pool
from bge_ray.records.outputs import Output

Needs: TypeAlias = Literal["first_token", "last_token", "all_tokens", "layers"]

# The token whose state a pooling takes; the mean takes all.
POOLING_NEEDS: dict[str, Needs] = {"cls": "first_token", "last_token": "last_token", "mean": "all_tokens"}


@dataclass(frozen=True)
class Ragged:
    """An output of which rows have different amounts, laid end to end.

    ``values`` is (total, dim) of a multi-vector and (total,) of a sparse output, whose ``indices`` are
    (total,), ascending within a row; ``lengths`` (rows,) says how many are each row's.
    """

    values: torch.Tensor
    lengths: torch.Tensor
    indices: torch.Tensor | None = None


class Head(torch.nn.Module):
    """Makes one output of what a forward pass gave; its weights, if any, go where the model's go.

    ``needs`` says which states it looks at: those of one token a row, of all, or of every layer.
    A call takes (hidden, inputs): what the model returned, whose ``last_hidden_state`` is as `pool` takes
    it (with ``hidden_states`` where a head of the model needs layers), and the `Inputs` of the call. It
    returns (rows, dim) of a dense output, (rows,) of a scalar, or `Ragged`.
    """

    def __init__(self, output: Output, needs: Needs) -> None:
        super().__init__()
        self.output = output
        self.needs = needs


class Pooled(Head):
    """The states of a row reduced to one vector."""

    def __init__(self, output: Output, pooling: str, *, normalize: bool) -> None:
        """Take a pooling (cls, mean or last_token), and whether vectors get unit L2 norm."""
        super().__init__(output, POOLING_NEEDS[pooling])
        self._pooling = pooling
        self._normalize = normalize

    def forward(self, hidden: ModelOutput, inputs: Inputs) -> torch.Tensor:
        """Return (rows, dim) float32."""
        vectors = pool(hidden.last_hidden_state, inputs, self._pooling)
        return F.normalize(vectors, dim=-1) if self._normalize else vectors


class Logit(Head):
    """The one logit of a cross-encoder."""

    def __init__(self, output: Output, top: torch.nn.Module | None) -> None:
        """Take what lies on top of the encoder, (rows, 1, dim) to (rows, 1); None if the model runs it."""
        super().__init__(output, "first_token")
        self._top = top

    def forward(self, hidden: ModelOutput, inputs: Inputs) -> torch.Tensor:
        """Return (rows,) logits."""
        if self._top is None:
            return torch.as_tensor(hidden.logits)[:, 0]
        states = hidden.last_hidden_state
        first = pool(states, inputs, "cls").to(states.dtype).unsqueeze(1)  # (rows, 1, dim)
        return torch.as_tensor(self._top(first))[:, 0]


class AnswerLogit(Head):
    """The logit that a language model gives one token as the next one: a row of its head, and no other."""

    def __init__(self, output: Output, row: torch.Tensor, cap: float | None) -> None:
        """Take the row, (dim,), and the cap on logits by tanh that the model has; None for none."""
        super().__init__(output, "last_token")
        self._row = torch.nn.Buffer(row.detach().float())
        self._cap = cap

    def forward(self, hidden: ModelOutput, inputs: Inputs) -> torch.Tensor:
        """Return (rows,) logits."""
        return _capped(pool(hidden.last_hidden_state, inputs, "last_token") @ self._row, self._cap)


class LayerLogit(Head):
    """The logit of one layer's own head on the last token, of a model that `run.layers` runs."""

    def __init__(self, output: Output, row: torch.Tensor, cut: int, cap: float | None) -> None:
        """Take the head's weights, (dim,), the place of its layer among those kept, and the model's cap."""
        super().__init__(output, "last_token")
        self._row = torch.nn.Buffer(row.detach().float())
        self._cut = cut
        self._cap = cap

    def forward(self, hidden: ModelOutput, inputs: Inputs) -> torch.Tensor:  # noqa: ARG002 - as all heads
        """Return (rows,) logits."""
        return _capped(hidden.cuts[:, self._cut].float() @ self._row, self._cap)


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)
