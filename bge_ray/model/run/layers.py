"""Decoders run layer by layer: the states of some layers kept, later ones left out, states merged on the way.

The layers are transformers' own; rows are padded on the right, which is exact where a token sees only those
before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask
from transformers.utils import ModelOutput

from bge_ray.errors import ModelError
from bge_ray.model.heads import Head, LayerLogit
from bge_ray.model.llm_rerankers import cuts_of, head_weight
from bge_ray.model.run.tensors import read_row
from bge_ray.records.model import RerankerSpec

# transformers refuses its own name for this attention in a Gemma2, which may have a cap that it lacks.
UNCAPPED = "bge_ray_uncapped"


@dataclass(frozen=True)
class Merging:
    """In front of some layers every ``ratio`` states of a passage become their mean.

    ``n_tail`` tokens behind the passage are left as they are, and all in front of it.
    """

    layers: tuple[int, ...]
    ratio: int
    n_tail: int


class LayerByLayer(torch.nn.Module):
    """A decoder up to the last of some layers, which gives the last token's states after each of them."""

    def __init__(self, decoder: Any, layers: Sequence[int], merging: Merging | None = None) -> None:
        """Take a decoder that has no layer beyond the last of ``layers``, which ascend."""
        super().__init__()
        self.config = decoder.config
        self._decoder = decoder
        self._cuts = frozenset(layers)
        self._merging = merging
        self._scale = float(getattr(decoder.config, "embedding_multiplier", 1.0))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> ModelOutput:
        """Return ``cuts``, (rows, layers, dim) normed states of each row's last token.

        Args:
            input_ids: (rows, width), padded on the right.
            attention_mask: (rows, width) bool, True for tokens; None if no row is padded.
            token_type_ids: (rows, width), 1 from a row's passage on; None merges nothing.
        """
        hidden = self._decoder.embed_tokens(input_ids) * self._scale
        mask, merging = attention_mask, self._merging
        starts = None if token_type_ids is None else _passage_starts(token_type_ids, mask)
        around = self._surroundings(hidden, mask)
        cuts = []
        for number, layer in enumerate(self._decoder.layers):
            if number in self._cuts:
                cuts.append(self._last(hidden, mask))
            if merging is not None and starts is not None and number in merging.layers:
                hidden, mask = merge(hidden, _lengths(hidden, mask), starts, merging)
                around = self._surroundings(hidden, mask)
            hidden = self._run(layer, number, hidden, around)
        cuts.append(self._last(hidden, mask))
        return ModelOutput(cuts=self._decoder.norm(torch.stack(cuts, 1)))

    def _run(self, layer: Any, number: int, hidden: torch.Tensor, around: "_Surroundings") -> torch.Tensor:
        kinds = getattr(self.config, "layer_types", None)
        sliding = kinds is not None and kinds[number] == "sliding_attention"
        states: torch.Tensor = layer(
            hidden,
            attention_mask=around.sliding if sliding else around.full,
            position_ids=around.positions,
            position_embeddings=around.rope,
        )
        return states

    def _surroundings(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> "_Surroundings":
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        facts = {
            "config": self.config,
            "inputs_embeds": hidden,
            "attention_mask": mask,
            "past_key_values": None,
            "position_ids": positions,
        }
        window = getattr(self.config, "sliding_window", None)
        return _Surroundings(
            positions,
            self._decoder.rotary_emb(hidden, positions),
            create_causal_mask(**facts),
            create_sliding_window_causal_mask(**facts) if window is not None else None,
        )

    @staticmethod
    def _last(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, _lengths(hidden, mask) - 1]


@dataclass(frozen=True)
class _Surroundings:
    """What the layers are given beside the states; a mask is None where there is nothing but the order."""

    positions: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    full: torch.Tensor | None
    sliding: torch.Tensor | None


def merge(
    hidden: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, merging: Merging
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace neighbouring states of each passage by their mean; the last mean is of what is left.

    Args:
        hidden: (rows, width, dim), padded on the right.
        lengths: (rows,) tokens of each row.
        starts: (rows,) where its passage begins.
        merging: how many, and how many tokens follow the passage.

    Returns:
        (rows, new width, dim) and (rows, new width) bool, True for tokens.
    """
    tokens = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    flat = hidden[tokens]  # (tokens, dim)
    passages = lengths - starts - merging.n_tail
    means = (passages + merging.ratio - 1) // merging.ratio
    merged = starts + means + merging.n_tail
    rows = torch.repeat_interleave(torch.arange(len(hidden), device=hidden.device), merged)
    places = torch.arange(len(rows), device=hidden.device) - (merged.cumsum(0) - merged)[rows]
    nth = places - starts[rows]  # of the passage's means
    left = passages[rows] - nth * merging.ratio
    is_mean = (nth >= 0) & (nth < means[rows])
    sizes = torch.where(is_mean, left.clamp(max=merging.ratio), 1)
    flat = torch.segment_reduce(flat.float(), "mean", lengths=sizes).to(hidden.dtype)
    kept = torch.arange(int(merged.max()), device=hidden.device) < merged[:, None]
    out = hidden.new_zeros((*kept.shape, hidden.shape[-1]))
    out[kept] = flat
    return out, kept


def _lengths(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return torch.full((len(hidden),), hidden.shape[1], device=hidden.device)
    return mask.sum(1)


def _passage_starts(types: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    before = types == 0
    return (before if mask is None else before & mask).sum(1)


def load_layer_heads(
    spec: RerankerSpec, folder: Path, hidden_size: int, cap: float | None = None
) -> tuple[Head, ...]:
    """Load the heads of the layers that score, one an output of the spec.

    Args:
        spec: names layers and heads.
        folder: of the model.
        hidden_size: what a head must have.
        cap: largest score, by tanh; None for none.

    Raises:
        ModelError: a head has another shape.
    """
    rows = [read_row(folder, head_weight(number), 0) for number in spec.heads]
    for number, row in zip(spec.heads, rows, strict=True):
        if len(row) != hidden_size:
            raise ModelError(
                f"{folder}: {head_weight(number)} has {len(row)} numbers, a state of the model {hidden_size}"
            )
    cuts = cuts_of(spec.layers)
    return tuple(
        LayerLogit(output, rows[cut], cut, cap) for output, cut in zip(spec.outputs, cuts, strict=True)
    )


def register_uncapped() -> None:
    """Make the attention without a cap known to transformers under our name."""
    AttentionInterface.register(UNCAPPED, sdpa_attention_forward)
    AttentionMaskInterface.register(UNCAPPED, sdpa_mask)
