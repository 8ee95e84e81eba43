"""The last layer of a packed model, done only for the token that its heads look at.

What a vector or a score is made of is the last state of one token a row. Of the other tokens the last
layer owes that one nothing but their keys and values.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bge_ray.model.run.fused import FusedLayer
from bge_ray.model.run.packed import DECODERS, Prefix, attend


class OneTokenLayer(torch.nn.Module):
    """Stands in for the last layer of a BERT or RoBERTa, fused or not; its parts are that layer's own."""

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
        layer = self._layer
        run = layer.of_one_token if isinstance(layer, FusedLayer) else partial(_of_one_token, layer)
        wanted = _wanted(cu_seqlens, last=self._last)
        return run(hidden_states, wanted, cu_seqlens=cu_seqlens, runs=runs, max_seqlen=max_seqlen)


def _of_one_token(
    layer: Any,
    hidden_states: torch.Tensor,
    wanted: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    runs: Sequence[tuple[int, int]],
    max_seqlen: int,
) -> torch.Tensor:
    """Do by a layer of transformers what `FusedLayer.of_one_token` does."""
    attention = layer.attention.self
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
    return torch.as_tensor(layer.feed_forward_chunk(layer.attention.output(context.flatten(1)[None], own)))


def _wanted(cu_seqlens: torch.Tensor, *, last: bool) -> torch.Tensor:
    """Return (rows,) int64, the place of the first or last token of each row."""
    return (cu_seqlens[1:] - 1 if last else cu_seqlens[:-1]).long()


class _AllKeys:
    """What a decoder's attention takes for its cache: keys and values of all tokens, made beforehand."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._held = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of all tokens in place of those of the queries."""
        return self._held


class OneTokenDecoderLayer(torch.nn.Module):
    """Stands in for the last layer of a decoder, for the last token of each row; runs that layer itself."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self._layer = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cu_seqlens: torch.Tensor,
        runs: Sequence[tuple[int, int]],
        max_seqlen: int,
        prefix: Prefix | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """Return (1, rows, dim) states of (1, tokens, dim); the rest is as in `packed_attention`."""
        layer: Any = self._layer
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden_states)
        keys, values = (
            project(normed).view(1, normed.shape[1], -1, attention.head_dim)
            for project in (attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        cos, sin = position_embeddings  # (1, tokens, head_dim)
        keys, _same = apply_rotary_pos_emb(keys, keys, cos, sin, unsqueeze_dim=2)
        wanted = _wanted(cu_seqlens, last=True)
        output = layer(
            hidden_states[:, wanted],
            position_embeddings=(cos[:, wanted], sin[:, wanted]),
            past_key_values=_AllKeys(keys.transpose(1, 2), values.transpose(1, 2)),
            cu_seqlens=cu_seqlens,
            runs=runs,
            max_seqlen=max_seqlen,
            one_query=True,
            prefix=prefix,
        )
        return torch.as_tensor(output)


def keep_one_token(model: Any, needs: Collection[str]) -> None:
    """Let the last layer of a packable model give only what its heads need, if that is the same token a row.

    Args:
        model: its encoder's layers are replaced in place.
        needs: of all its heads, as `heads.Head` has them.
    """
    if set(needs) not in ({"first_token"}, {"last_token"}):
        return
    if model.config.model_type in DECODERS:
        if set(needs) == {"last_token"}:
            model.layers[-1] = OneTokenDecoderLayer(model.layers[-1])
        return
    layers = model.base_model.encoder.layer
    layers[-1] = OneTokenLayer(layers[-1], last="last_token" in needs)
