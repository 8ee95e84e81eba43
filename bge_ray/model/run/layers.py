"""Decoders run layer by layer: the states of some layers kept, later ones left out, states merged on the way.

The layers are transformers' own. Rows are packed, or padded on the right, which is exact where a token sees
only those before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask
from transformers.utils import ModelOutput

from bge_ray.errors import ModelError
from bge_ray.model.heads import Head, LayerLogit
from bge_ray.model.llm_rerankers import cuts_of, head_weight
from bge_ray.model.run.inputs import to_device
from bge_ray.model.run.packed import equal_runs
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

    @property
    def layers(self) -> torch.nn.ModuleList:
        """The decoder's own."""
        layers: torch.nn.ModuleList = self._decoder.layers
        return layers

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **packed: Any,
    ) -> ModelOutput:
        """Return ``cuts``, (rows, layers, dim) normed states of each row's last token.

        Args:
            input_ids: (rows, width), padded on the right, or packed (1, tokens).
            attention_mask: (rows, width), 1 for tokens; None if no row is padded.
            token_type_ids: (rows, width), 1 from a row's passage on; None merges nothing.
            packed: of packed rows what `inputs.packed_inputs` says beside their tokens.
        """
        hidden = self._decoder.embed_tokens(input_ids) * self._scale
        rows: PaddedRows | PackedRows
        if packed:
            rows = PackedRows.of(**packed)
        else:
            mask = None if attention_mask is None else attention_mask.bool()
            starts = None if token_type_ids is None else _passage_starts(token_type_ids, mask)
            rows = PaddedRows(mask, starts)
        given = rows.given(hidden, self._decoder)
        cuts = []
        for number, layer in enumerate(self.layers):
            if number in self._cuts:
                cuts.append(rows.last(hidden))
            if self._merging is not None and rows.starts is not None and number in self._merging.layers:
                hidden, rows = rows.merged(hidden, self._merging)
                given = rows.given(hidden, self._decoder)
            hidden = layer(hidden, **given.to_layer(self.config, number))
        cuts.append(rows.last(hidden))
        return ModelOutput(cuts=self._decoder.norm(torch.stack(cuts, 1)))


@dataclass(frozen=True)
class _Given:
    """What layers are given beside the states; a mask is None where there is nothing but the order."""

    arguments: dict[str, Any]
    full: torch.Tensor | None = None
    sliding: torch.Tensor | None = None

    def to_layer(self, config: Any, number: int) -> dict[str, Any]:
        """Return the arguments of one layer."""
        kinds = getattr(config, "layer_types", None)
        sliding = kinds is not None and kinds[number] == "sliding_attention"
        return {**self.arguments, "attention_mask": self.sliding if sliding else self.full}


@dataclass(frozen=True)
class PaddedRows:
    """How rows lie in states of (rows, width, dim), padded on the right, or not at all if there is no mask.

    ``mask`` is (rows, width) bool, ``starts`` (rows,) where passages begin; None merges nothing.
    """

    mask: torch.Tensor | None
    starts: torch.Tensor | None

    def given(self, hidden: torch.Tensor, decoder: Any) -> _Given:
        """Return what the layers of a decoder are given beside these states."""
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        facts = {
            "config": decoder.config,
            "inputs_embeds": hidden,
            "attention_mask": self.mask,
            "past_key_values": None,
            "position_ids": positions,
        }
        window = getattr(decoder.config, "sliding_window", None)
        return _Given(
            {"position_ids": positions, "position_embeddings": decoder.rotary_emb(hidden, positions)},
            create_causal_mask(**facts),
            create_sliding_window_causal_mask(**facts) if window is not None else None,
        )

    def last(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (rows, dim) the states of each row's last token."""
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, self._lengths(hidden) - 1]

    def merged(self, hidden: torch.Tensor, merging: Merging) -> "tuple[torch.Tensor, PaddedRows]":
        """Return the states with those of each passage merged, and how they lie."""
        lengths = self._lengths(hidden)
        tokens = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        sizes, left = merged_sizes(lengths, torch.as_tensor(self.starts), merging)
        kept = torch.arange(int(left.max()), device=hidden.device) < left[:, None]
        out = hidden.new_zeros((*kept.shape, hidden.shape[-1]))
        out[kept] = _means(hidden[tokens], sizes)
        return out, PaddedRows(kept, self.starts)

    def _lengths(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return torch.full((len(hidden),), hidden.shape[1], device=hidden.device)
        return self.mask.sum(1)


@dataclass(frozen=True)
class PackedRows:
    """How rows lie in states of (1, tokens, dim), end to end.

    ``lengths`` and ``starts`` are (rows,) on the host, so that a GPU is never waited for; the others as in
    `inputs.packed_inputs`.
    """

    lengths: torch.Tensor
    starts: torch.Tensor | None
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    runs: Sequence[tuple[int, int]]

    @classmethod
    def of(
        cls,
        *,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        runs: Sequence[tuple[int, int]],
        max_seqlen: int,  # noqa: ARG003 - lengths say it, too
        passage_starts: npt.NDArray[np.int64] | None = None,
    ) -> "PackedRows":
        """Take the arguments of a packed call."""
        lengths = torch.tensor([length for n_rows, length in runs for _ in range(n_rows)])
        starts = None if passage_starts is None else torch.from_numpy(passage_starts)
        return cls(lengths, starts, position_ids, cu_seqlens, runs)

    def given(self, hidden: torch.Tensor, decoder: Any) -> _Given:
        """As of padded rows; their borders say which tokens see which."""
        return _Given(
            {
                "position_ids": self.positions,
                "position_embeddings": decoder.rotary_emb(hidden, self.positions),
                "cu_seqlens": self.cu_seqlens,
                "runs": self.runs,
                "max_seqlen": int(self.lengths.max()),
            }
        )

    def last(self, hidden: torch.Tensor) -> torch.Tensor:
        """As of padded rows."""
        if hidden.shape[1] == len(self.lengths):  # `last_layer` left one state a row, or each has one token
            return hidden[0]
        return hidden[0, self.cu_seqlens[1:].long() - 1]

    def merged(self, hidden: torch.Tensor, merging: Merging) -> "tuple[torch.Tensor, PackedRows]":
        """As of padded rows."""
        sizes, left = merged_sizes(self.lengths, torch.as_tensor(self.starts), merging)
        borders = torch.cat([left.new_zeros(1), left.cumsum(0)])
        within = torch.arange(len(sizes)) - torch.repeat_interleave(borders[:-1], left)
        device = hidden.device
        rows = PackedRows(
            left,
            self.starts,
            to_device(within.numpy(), device).unsqueeze(0),
            to_device(borders.int().numpy(), device),
            equal_runs(left.numpy()),
        )
        return _means(hidden[0], to_device(sizes.numpy(), device)).unsqueeze(0), rows


def merged_sizes(
    lengths: torch.Tensor, starts: torch.Tensor, merging: Merging
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tell how many neighbouring states become each state of merged rows; the last mean is of what is left.

    Args:
        lengths: (rows,) tokens of each row.
        starts: (rows,) where its passage begins.
        merging: how many become one, and how many tokens follow the passage.

    Returns:
        (new tokens,) how many states each is the mean of, row after row, and (rows,) how many are each row's.
    """
    passages = lengths - starts - merging.n_tail
    means = (passages + merging.ratio - 1) // merging.ratio
    left = starts + means + merging.n_tail
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), left)
    places = torch.arange(len(rows), device=lengths.device) - (left.cumsum(0) - left)[rows]
    nth = places - starts[rows]  # of the passage's means
    is_mean = (nth >= 0) & (nth < means[rows])
    rest = passages[rows] - nth * merging.ratio
    return torch.where(is_mean, rest.clamp(max=merging.ratio), 1), left


def _means(states: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return (new tokens, dim) means of so many neighbours each, of (tokens, dim); taken in float32.

    ``unsafe`` leaves out a look at the sizes on the host, for which a GPU would have to be waited for.
    """
    return torch.segment_reduce(states.float(), "mean", lengths=sizes, unsafe=True).to(states.dtype)


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
