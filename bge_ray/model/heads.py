"""Heads: the states of a forward pass to one output of a model.

What all heads of a model need together decides what its last layer may leave out (`run.last_layer`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - the name the field uses
from transformers.utils import ModelOutput

from bge_ray.model.run.inputs import Inputs, pool, pool_spans, token_states
from bge_ray.records.outputs import Output

Needs: TypeAlias = Literal["first_token", "last_token", "all_tokens", "layers"]

# The token whose state a pooling takes; every other takes all.
POOLING_NEEDS: dict[str, Needs] = {"cls": "first_token", "last_token": "last_token"}


@dataclass(frozen=True)
class Ragged:
    """An output of which rows have different amounts, laid end to end.

    ``values`` is (total, dim) of a multi-vector and (total,) of a sparse output, whose ``indices`` are
    (total,), ascending within a row; ``lengths`` (rows,) says how many are each row's. What lies behind their
    sum is not looked at, so that a head need not know the total, which a GPU would have to be waited for.
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
    """The states of a row or of each of its spans as one vector, and what a folder's modules make of it.

    Of a span it is the mean of its tokens' states, whose pooling must be ``mean``.
    """

    def __init__(
        self,
        output: Output,
        pooling: str,
        *,
        normalize: bool,
        steps: Sequence[torch.nn.Module] = (),
        pools_prompt: bool = True,
    ) -> None:
        """Take a pooling as `pool` does, and what follows it.

        Args:
            output: what is made.
            pooling: of tokens to one vector.
            normalize: whether vectors get unit L2 norm in the end.
            steps: (rows, dim) to (rows, dim) of their own, one after the other.
            pools_prompt: whether a prompt's tokens count; without them, CLS is the first one behind it.
        """
        super().__init__(output, POOLING_NEEDS.get(pooling, "all_tokens") if pools_prompt else "all_tokens")
        self._pooling = pooling
        self._normalize = normalize
        self._steps = torch.nn.ModuleList(steps)

    def forward(self, hidden: ModelOutput, inputs: Inputs) -> torch.Tensor:
        """Return (rows, dim) float32, or (spans, dim) of rows that have spans.

        What follows the pooling may make more numbers than are kept; the norm is that of what is kept.
        """
        states = hidden.last_hidden_state
        of_spans = inputs.span_tokens is not None
        vectors = pool_spans(states, inputs) if of_spans else pool(states, inputs, self._pooling)
        for step in self._steps:
            vectors = step(vectors.to(states.dtype))
        vectors = vectors[:, : self.output.dim].float()
        return F.normalize(vectors, dim=-1) if self._normalize else vectors


class TokenWeights(Head):
    """One weight for each distinct token of a row: the largest that its places in the text have."""

    def __init__(self, output: Output, linear: torch.nn.Linear, left_out: Collection[int]) -> None:
        """Take the layer that weighs a state, dim to 1, and the ids of tokens that get no weight."""
        super().__init__(output, "all_tokens")
        self._linear = linear
        self._left_out = torch.nn.Buffer(torch.tensor(sorted(left_out), dtype=torch.int64))

    def forward(self, hidden: ModelOutput, inputs: Inputs) -> Ragged:
        """Return the positive weights of each row under token ids, ascending."""
        states, ids, lengths = token_states(hidden.last_hidden_state, inputs)
        weights = F.relu(self._linear(states))[:, 0].float()  # (tokens,)
        n_tokens, n_rows = len(ids), len(lengths)
        rows = torch.repeat_interleave(lengths, output_size=n_tokens)
        keys, order = torch.sort(rows * self.output.dim + ids)
        # Equal keys are one entry; it has the place of its number among all, the others come to nothing.
        starts = torch.cat([keys.new_ones(1, dtype=torch.bool), keys[1:] != keys[:-1]])
        entry = starts.cumsum(0) - 1
        best = weights.new_zeros(n_tokens).scatter_reduce(0, entry, weights[order], "amax")
        key = keys.new_zeros(n_tokens).scatter(0, entry, keys)
        of_row, token = key // self.output.dim, key % self.output.dim
        # Not above zero as stored: a NaN is kept, to be found out.
        positive = ~(best.to(getattr(torch, self.output.dtype)) <= 0)
        kept = positive & ~torch.isin(token, self._left_out)
        kept &= torch.arange(n_tokens, device=kept.device) <= entry[-1]
        first = torch.argsort(~kept, stable=True)
        counts = torch.zeros(n_rows, dtype=torch.int64, device=kept.device)
        counts = counts.scatter_add(0, of_row, kept.long())
        # Behind the kept ones nothing may be larger than they are, or no number.
        return Ragged(torch.where(kept, best, 0.0)[first], counts, token[first])


class TokenVectors(Head):
    """One vector for each token of a row but the first, the special token in front."""

    def __init__(self, output: Output, linear: torch.nn.Linear, *, normalize: bool) -> None:
        """Take the layer that projects a state, and whether vectors get unit L2 norm."""
        super().__init__(output, "all_tokens")
        self._linear = linear
        self._normalize = normalize

    def forward(self, hidden: ModelOutput, inputs: Inputs) -> Ragged:
        """Return (n_tokens - 1, dim) float32 vectors of each row."""
        states, _, lengths = token_states(hidden.last_hidden_state, inputs)
        n_vectors = len(states) - len(lengths)
        # Before a row's vectors lie as many first tokens as there are rows up to it.
        skipped = torch.repeat_interleave(lengths - 1, output_size=n_vectors) + 1
        places = torch.arange(n_vectors, device=states.device) + skipped
        vectors = self._linear(states[places]).float()
        return Ragged(F.normalize(vectors, dim=-1) if self._normalize else vectors, lengths - 1)


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
