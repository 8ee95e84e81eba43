"""The layers of BERT and its kin with fewer kernels: 7 launches a layer, where transformers' own take 13.

One product makes queries, keys and values; the first product of the feed-forward block applies its GELU; the
residual is added by the layer norm behind it. The GELU is the form by tanh, the one that a product on a CUDA
device can apply, on every device and for padded batches, too: the vectors of a data set must not depend on
where they were made.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - the name the field uses
from transformers.activations import GELUActivation

from bge_ray.errors import ModelError
from bge_ray.model.run.add_norm import AddNorm
from bge_ray.model.run.packed import attend

# By tanh, or exact, by the error function; the names are torch's.
Gelu: TypeAlias = Literal["tanh", "none"]


class FusedLayer(torch.nn.Module):
    """A layer of a BERT or RoBERTa, for packed batches and for padded ones."""

    def __init__(self, layer: Any, gelu: Gelu) -> None:
        """Take over the weights of a layer, which is of no use afterwards.

        Args:
            layer: of transformers, one that `check_parts` lets pass.
            gelu: which form of it is applied.
        """
        torch.nn.Module.__init__(self)  # and not that of transformers' class, which would make weights
        attention, output = layer.attention.self, layer.attention.output
        self.n_heads = int(attention.num_attention_heads)
        self.scaling = float(attention.scaling)
        self.gelu: Gelu = gelu
        projections = [attention.query, attention.key, attention.value]
        self.qkv = _joined(projections)
        self.output = _frozen(output.dense)
        self.attention_norm = AddNorm(output.LayerNorm)
        self.inner = _frozen(layer.intermediate.dense)
        self.outer = _frozen(layer.output.dense)
        self.norm = AddNorm(layer.output.LayerNorm)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *_: Any,
        cu_seqlens: torch.Tensor | None = None,
        runs: Sequence[tuple[int, int]] = (),
        max_seqlen: int = 0,
        **__: Any,
    ) -> torch.Tensor:
        """Return states of the shape of ``hidden_states``.

        Args:
            hidden_states: (rows, width, dim), or packed (1, tokens, dim).
            attention_mask: of padded rows, (rows, 1, 1 or width, width), bool or added to the scores; None if
                no row is padded.
            cu_seqlens: of packed rows, as in `packed.attend`; None where they are padded.
            runs: the same.
            max_seqlen: the same.
        """
        states = hidden_states.flatten(0, 1)  # (tokens, dim)
        q, k, v = self._heads(_product(states, self.qkv), 3)
        if cu_seqlens is None:
            context = self._attend_padded(q, k, v, attention_mask, hidden_states.shape[:2])
        else:
            context = attend(
                q, k, v, cu_seqlens=cu_seqlens, runs=runs, max_seqlen=max_seqlen, scaling=self.scaling
            )
        return self._rest(context, states).view(hidden_states.shape)

    def of_one_token(
        self,
        hidden_states: torch.Tensor,
        wanted: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor,
        runs: Sequence[tuple[int, int]],
        max_seqlen: int,
    ) -> torch.Tensor:
        """Return (1, rows, dim) states of one token a row of (1, tokens, dim).

        Args:
            hidden_states: packed.
            wanted: (rows,) int64, the place of that token of each row.
            cu_seqlens: as in `packed.attend`.
            runs: the same.
            max_seqlen: the same.
        """
        states = hidden_states[0]
        own = states[wanted]
        dim = states.shape[1]
        weight, bias = self.qkv.weight, self.qkv.bias
        (q,) = self._heads(F.linear(own, weight[:dim], bias[:dim]), 1)
        k, v = self._heads(F.linear(states, weight[dim:], bias[dim:]), 2)
        context = attend(
            q,
            k,
            v,
            cu_seqlens=cu_seqlens,
            runs=runs,
            max_seqlen=max_seqlen,
            scaling=self.scaling,
            one_query=True,
        )
        return self._rest(context, own).unsqueeze(0)

    def _heads(self, states: torch.Tensor, n: int) -> tuple[torch.Tensor, ...]:
        """Return n views (tokens, heads, head_dim) of (tokens, n * dim)."""
        return states.view(len(states), n, self.n_heads, -1).unbind(1)

    def _attend_padded(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        shape: Sequence[int],
    ) -> torch.Tensor:
        """Attend in rows of one width; of and to (tokens, heads, head_dim)."""
        q, k, v = (states.view(*shape, *states.shape[1:]).transpose(1, 2) for states in (q, k, v))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scaling)
        return context.transpose(1, 2).flatten(0, 1)

    def _rest(self, context: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return (tokens, dim) of what attention gave, (tokens, heads, head_dim), and of its input."""
        attended = self.attention_norm(_product(context.flatten(1), self.output), states)
        inner = product_and_gelu(attended, self.inner.weight, self.inner.bias, self.gelu)
        return torch.as_tensor(self.norm(_product(inner, self.outer), attended))


class _Weights(torch.nn.Module):
    """A weight, (out, in), and its bias: no torch.nn.Linear, which on a CPU would be laid out anew."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = torch.nn.Parameter(bias, requires_grad=False)


def _joined(linears: Sequence[torch.nn.Linear]) -> _Weights:
    weights, biases = zip(*((part.weight.detach(), part.bias.detach()) for part in linears), strict=True)
    return _Weights(torch.cat(weights), torch.cat(biases))


def _frozen(linear: torch.nn.Linear) -> _Weights:
    return _Weights(linear.weight.detach(), linear.bias.detach())


def _product(states: torch.Tensor, weights: _Weights) -> torch.Tensor:
    return F.linear(states, weights.weight, weights.bias)


def product_and_gelu(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: Gelu
) -> torch.Tensor:
    """Return the GELU of a linear layer: (tokens, out) of (tokens, in); one kernel on CUDA in tanh's form."""
    if gelu == "tanh" and states.is_cuda:  # on a CPU this operator applies the exact form
        return torch.as_tensor(torch.ops.aten._addmm_activation(bias, states, weight.t(), use_gelu=True))
    return F.gelu(F.linear(states, weight, bias), approximate=gelu)


def fuse_layers(model: Any, gelu: Gelu = "tanh") -> None:
    """Replace the layers of an encoder, one by one, so that no more than one layer's weights are held twice.

    Args:
        model: a BERT, RoBERTa, XLM-RoBERTa or CamemBERT of transformers, or a model on top of one.
        gelu: which form of it is applied; the exact one is no faster than transformers' layers, and gives
            what they give.

    Raises:
        ModelError: its layers are not made of the parts that are known.
    """
    layers = getattr(getattr(model.base_model, "encoder", None), "layer", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ModelError(f"{type(model).__name__}: has no layers that could be fused; {_WAY_OUT}")
    for number, layer in enumerate(layers):
        check_parts(layer)
        layers[number] = _stand_in(type(layer))(layer, gelu)


_WAY_OUT = "set model.kernels=plain (rerank.kernels of a reranker)"


def check_parts(layer: Any) -> None:
    """Refuse a layer that is made of other parts than those that a fused one does the work of.

    Raises:
        ModelError: names its class.
    """
    try:
        own = layer.attention.self
        linears = (
            own.query,
            own.key,
            own.value,
            layer.attention.output.dense,
            layer.intermediate.dense,
            layer.output.dense,
        )
        norms = (layer.attention.output.LayerNorm, layer.output.LayerNorm)
        known = (
            all(type(part) is torch.nn.Linear and part.bias is not None for part in linears)
            and all(type(part) is torch.nn.LayerNorm and part.bias is not None for part in norms)
            and own.query.weight.shape == own.key.weight.shape == own.value.weight.shape
            and own.num_attention_heads > 0
            and own.scaling > 0
            and type(layer.intermediate.intermediate_act_fn) is GELUActivation
            and not getattr(layer, "is_decoder", False)
        )
    except AttributeError:
        known = False
    if not known:
        raise ModelError(
            f"{type(layer).__name__}: this version of transformers makes it of other parts than those that "
            f"are fused; {_WAY_OUT}"
        )


def _stand_in(kind: type) -> type[FusedLayer]:
    """Return a fused layer that is one of transformers' kind, of which it records the states."""
    return type(f"Fused{kind.__name__}", (FusedLayer, kind), {})
