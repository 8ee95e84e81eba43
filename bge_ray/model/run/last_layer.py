"""The last layer of a packed model, done only for the token that its heads look at.

What a vector or a score is made of is the last state of one token a row. Of the other tokens the last
layer owes that one nothing but their keys and values.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from bge_ray.model.run.packed import attend


class OneTokenLayer(torch.nn.Module):
    """Stands in for the last layer of a BERT or RoBERTa; its parts are that layer's own."""

    def __init__(self, layer: torch.nn.Module, *, last: bool) -> None:
        """Take over a layer; ``last``: the last token of each row is wanted, and not the first."""
        super().__init__()
        self._layer = layer
        self._last = last

    def forward(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        cu_seqlens: torch.Tensor,
        runs: Sequence[tuple[int, int]],
        max_seqlen: int,
        **__: Any,
    ) -> torch.Tensor:
        """Return (1, rows, dim) states of (1, tokens, dim); the rest is as in `packed_attention`."""
        layer: Any = self._layer
        attention = layer.attention.self
        wanted = (cu_seqlens[1:] - 1 if self._last else cu_seqlens[:-1]).long()
        own = hidden_states[:, wanted]
        q, k, v = (
            states[0].view(states.shape[1], attention.num_attention_heads, -1)
            for states in (attention.query(own), attention.key(hidden_states), attention.value(hidden_states))
        )
        context = attend(
            q,
            k,
            v,
            cu_seqlens=cu_seqlens,
            runs=runs,
            max_seqlen=max_seqlen,
            scaling=attention.scaling,
            one_query=True,
        )
        return torch.as_tensor(
            layer.feed_forward_chunk(layer.attention.output(context.flatten(1)[None], own))
        )


def keep_one_token(model: Any, needs: Collection[str]) -> None:
    """Let the last layer of a packable model give only what its heads need, if that is the same token a row.

    Args:
        model: its encoder's layers are replaced in place.
        needs: of all its heads, as `heads.Head` has them.
    """
    if set(needs) not in ({"first_token"}, {"last_token"}):
        return
    layers = model.base_model.encoder.layer
    layers[-1] = OneTokenLayer(layers[-1], last="last_token" in needs)
