"""Rows of token ids to the tensors of one forward pass, padded or packed, and back to one state a row."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PretrainedConfig

from bge_ray.model.run.packed import equal_runs, positions
from bge_ray.records.ids import IdArray
from bge_ray.records.tokens import PackedTokens


@dataclass(frozen=True)
class Inputs:
    """Arguments of one model call, and where its rows lie.

    ``mask`` is (rows, width) bool, True for tokens, or None if no row is padded; ``borders`` is
    (rows + 1,) int64 if the rows are packed into one.
    """

    arguments: dict[str, Any]
    mask: torch.Tensor | None = None
    borders: torch.Tensor | None = None


def padded_inputs(
    source: PackedTokens, rows: IdArray, config: PretrainedConfig, device: torch.device
) -> Inputs:
    """Lay rows one below the other, padded on the right to the longest."""
    lengths = source.lengths_of(rows)
    width = int(lengths.max())
    flat, within = _gather(source, rows, lengths)
    filled = np.arange(width) < lengths[:, None]  # (rows, width)
    input_ids = np.full(filled.shape, config.pad_token_id or 0, dtype=np.int64)
    input_ids[filled] = flat
    arguments = {"input_ids": _to(input_ids, device)}
    if source.type_starts is not None:
        types = np.zeros(filled.shape, dtype=np.int64)
        types[filled] = within >= np.repeat(source.type_starts[rows], lengths)
        arguments["token_type_ids"] = _to(types, device)
    if filled.all():  # attention without a mask takes the fastest kernel, and no mask is built
        return Inputs(arguments)
    mask = _to(filled, device)
    arguments["attention_mask"] = mask
    return Inputs(arguments, mask=mask)


def packed_inputs(
    source: PackedTokens, rows: IdArray, config: PretrainedConfig, device: torch.device
) -> Inputs:
    """Lay rows end to end as one row, with their borders."""
    lengths = source.lengths_of(rows)
    flat, within = _gather(source, rows, lengths)
    borders = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    # One array, so that one copy brings all three to the device.
    stacked = np.zeros((3, len(flat)), dtype=np.int64)
    stacked[0] = flat
    stacked[1] = positions(flat, borders, config)
    if source.type_starts is not None:
        stacked[2] = within >= np.repeat(source.type_starts[rows], lengths)
    input_ids, position_ids, token_type_ids = _to(stacked, device).unsqueeze(1)  # each (1, tokens)
    where = _to(borders, device)
    arguments = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "cu_seqlens": where.int(),
        "runs": equal_runs(lengths),
        "max_seqlen": int(lengths.max()),
    }
    if getattr(config, "type_vocab_size", 0):  # a decoder has no segments
        arguments["token_type_ids"] = token_type_ids
    return Inputs(arguments, borders=where)


def pool(hidden: torch.Tensor, inputs: Inputs, pooling: str) -> torch.Tensor:
    """Reduce token states to one a row.

    Args:
        hidden: (rows, width, dim) padded on the right; packed (1, tokens, dim), or (1, rows, dim) where
            `last_layer.keep_one_token` left the token of this pooling alone.
        inputs: of the call that made them.
        pooling: cls, mean or last_token.

    Returns:
        (rows, dim) float32; the mean is taken in float32, where a sum of half-precision states is safe.
    """
    if inputs.borders is not None:
        if pooling == "mean":
            return torch.segment_reduce(hidden[0].float(), "mean", lengths=inputs.borders.diff())
        if hidden.shape[1] == len(inputs.borders) - 1:  # one state a row, also where each row has one token
            return hidden[0].float()
        return hidden[0, inputs.borders[:-1] if pooling == "cls" else inputs.borders[1:] - 1].float()
    if pooling == "cls":
        return hidden[:, 0].float()
    if pooling == "last_token":
        if inputs.mask is None:
            return hidden[:, -1].float()
        last = inputs.mask.sum(1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    if inputs.mask is None:
        return hidden.float().mean(1)
    # where() and not a product: padding may hold NaN that must not reach the row (NaN times 0 is NaN).
    kept = torch.where(inputs.mask.unsqueeze(-1), hidden.float(), 0.0)
    return kept.sum(1) / inputs.mask.sum(1, keepdim=True)


def _gather(
    source: PackedTokens, rows: IdArray, lengths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return the rows' token ids end to end, and each token's place within its row; both (tokens,)."""
    ends = np.cumsum(lengths)
    within = np.arange(int(ends[-1]), dtype=np.int64) - np.repeat(ends - lengths, lengths)
    starts = source.offsets[rows].astype(np.int64)
    return source.input_ids[np.repeat(starts, lengths) + within], within


def _to(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # From pinned memory the copy is queued behind the batch at work, and this process goes on.
    return tensor.pin_memory().to(device, non_blocking=True)
