"""Rows of token ids to the tensors of one forward pass, padded or packed, and back to one state a row."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PretrainedConfig

from bge_ray.model.run.packed import Prefix, equal_runs, positions
from bge_ray.model.run.prefix import shared_keys
from bge_ray.records.arrays import ranges
from bge_ray.records.ids import IdArray
from bge_ray.records.tokens import PackedTokens


@dataclass(frozen=True)
class Inputs:
    """Arguments of one model call, and where its rows lie.

    ``mask`` is (rows, width) bool, True for tokens, and ``places`` (tokens,) int64, where they lie in the
    rows laid end to end; both are None if no row is padded. ``borders`` is (rows + 1,) int64 if the rows are
    packed into one. ``prompt_tokens`` is (rows,) int64, how many tokens at the start of each row a pooling
    leaves out; None if it takes all. Where vectors are of spans and not of rows, ``span_tokens`` (total,)
    int64 are the tokens of all spans, by their place in the rows laid end to end, and ``span_lengths``
    (spans,) how many each span has.
    """

    arguments: dict[str, Any]
    mask: torch.Tensor | None = None
    places: torch.Tensor | None = None
    borders: torch.Tensor | None = None
    prompt_tokens: torch.Tensor | None = None
    span_tokens: torch.Tensor | None = None
    span_lengths: torch.Tensor | None = None


def padded_inputs(
    source: PackedTokens,
    rows: IdArray,
    config: PretrainedConfig,
    device: torch.device,
    *,
    ready_mask: bool = False,
) -> Inputs:
    """Lay rows one below the other, padded on the right to the longest.

    With ``ready_mask`` the model is given its mask as attention takes it, (rows, 1, 1, width): transformers
    looks into one of (rows, width), for which a GPU has to be waited for.
    """
    lengths = source.lengths_of(rows)
    width = int(lengths.max())
    flat, within = _gather(source, rows, lengths)
    filled = np.arange(width) < lengths[:, None]  # (rows, width)
    input_ids = np.full(filled.shape, config.pad_token_id or 0, dtype=np.int64)
    input_ids[filled] = flat
    arguments = {"input_ids": to_device(input_ids, device)}
    if source.type_starts is not None:
        types = np.zeros(filled.shape, dtype=np.int64)
        types[filled] = within >= np.repeat(source.type_starts[rows], lengths)
        arguments["token_type_ids"] = to_device(types, device)
    pooled = _pooled(source, rows, device)
    if filled.all():  # attention without a mask takes the fastest kernel, and no mask is built
        return Inputs(arguments, **pooled)
    mask = to_device(filled, device)
    # Else of numbers, as a tokenizer makes it: some models reckon with it.
    arguments["attention_mask"] = mask[:, None, None] if ready_mask else mask.long()
    return Inputs(arguments, mask=mask, places=to_device(np.flatnonzero(filled), device), **pooled)


def packed_inputs(
    source: PackedTokens, rows: IdArray, config: PretrainedConfig, device: torch.device, shared: int = 0
) -> Inputs:
    """Lay rows end to end as one row, with their borders.

    So many tokens as they share, which `prefix.shared_tokens` counts, lie in front of them once.
    """
    if shared:
        return _behind_prefix(source, rows, device, shared)
    lengths = source.lengths_of(rows)
    flat, within = _gather(source, rows, lengths)
    borders = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    # One array, so that one copy brings all three to the device.
    stacked = np.zeros((3, len(flat)), dtype=np.int64)
    stacked[0] = flat
    stacked[1] = positions(flat, borders, config)
    if source.type_starts is not None:
        stacked[2] = within >= np.repeat(source.type_starts[rows], lengths)
    input_ids, position_ids, token_type_ids = to_device(stacked, device).unsqueeze(1)  # each (1, tokens)
    where = to_device(borders, device)
    arguments = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "cu_seqlens": where.int(),
        "runs": equal_runs(lengths),
        "max_seqlen": int(lengths.max()),
    }
    if getattr(config, "type_vocab_size", 0):
        arguments["token_type_ids"] = token_type_ids
    elif source.type_starts is not None:  # of a decoder, which has no segments: read on the host
        arguments["passage_starts"] = source.type_starts[rows].astype(np.int64)
    return Inputs(arguments, borders=where, **_pooled(source, rows, device))


def _behind_prefix(source: PackedTokens, rows: IdArray, device: torch.device, shared: int) -> Inputs:
    """Lay rows of a decoder end to end behind what they share; see `packed.Prefix`."""
    lengths = source.lengths_of(rows) - shared
    flat, within = _gather(source, rows, lengths, skipped=shared)
    first = source.offsets[rows[0]]
    places, queries_at, keys_at = shared_keys(shared, lengths)
    stacked = np.stack(
        [
            np.concatenate([source.input_ids[first : first + shared], flat]),
            np.concatenate([np.arange(shared), shared + within]),
        ]
    )
    input_ids, position_ids = to_device(stacked, device).unsqueeze(1)
    borders = to_device(np.stack([queries_at, keys_at]), device)
    prefix = Prefix(
        shared, max(shared, int(lengths.max())), to_device(places, device), borders[0].int(), borders[1].int()
    )
    arguments = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "cu_seqlens": prefix.queries_at[1:],
        "runs": equal_runs(lengths),
        "max_seqlen": shared + int(lengths.max()),
        "prefix": prefix,
    }
    return Inputs(arguments, borders=borders[0, 1:], **_pooled(source, rows, device))


def pool(hidden: torch.Tensor, inputs: Inputs, pooling: str) -> torch.Tensor:
    """Reduce token states to one vector a row.

    Args:
        hidden: (rows, width, dim) padded on the right; packed (1, tokens, dim), or (1, rows, dim) where
            `last_layer.keep_one_token` left the token of this pooling alone.
        inputs: of the call that made them.
        pooling: cls, mean, last_token, max, mean_sqrt_len (the sum over the root of the length) or
            weighted_mean (by the place in the row, from 1); several joined with ``+`` are laid side by side.

    Returns:
        (rows, dim) float32, dim times the number of poolings; sums are taken in float32, where one of
        half-precision states is safe. A row of which the prompt is all has NaN where something is averaged.
    """
    modes = pooling.split("+")
    one_of = _packed if inputs.borders is not None else _padded
    made = [one_of(hidden, inputs, mode) for mode in modes]
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def _packed(hidden: torch.Tensor, inputs: Inputs, mode: str) -> torch.Tensor:
    borders = torch.as_tensor(inputs.borders)
    states, lengths = hidden[0], borders.diff()
    if mode in ("cls", "last_token"):
        if len(states) == len(lengths):  # one state a row, also where each row has one token
            return states.float()
        if mode == "last_token":
            return states[borders[1:] - 1].float()
        return states[borders[:-1] + _first_tokens(lengths, inputs)].float()
    states = states.float()
    if mode == "mean" and inputs.prompt_tokens is None:
        return _reduced(states, "mean", lengths)
    within = torch.arange(len(states), device=states.device) - _of_each(borders[:-1], lengths, len(states))
    weights = within + 1.0 if mode == "weighted_mean" else torch.ones_like(within, dtype=torch.float32)
    if inputs.prompt_tokens is not None:
        # Put out of the way and not taken out: how many are left is known on the device alone. where() and
        # not a product: what is left out may be NaN.
        kept = within >= _of_each(inputs.prompt_tokens, lengths, len(states))
        states = torch.where(kept[:, None], states, -torch.inf if mode == "max" else 0.0)
        weights = weights * kept
    if mode == "max":
        return _reduced(states, "max", lengths)
    total = _reduced(states * weights[:, None], "sum", lengths)
    return total / _denominator(_reduced(weights, "sum", lengths), mode)


def _of_each(values: torch.Tensor, lengths: torch.Tensor, total: int) -> torch.Tensor:
    """Return (total,) the value of its row for each token; without the total a GPU has to be waited for."""
    return values.repeat_interleave(lengths, output_size=total)


def _reduced(values: torch.Tensor, how: str, lengths: torch.Tensor) -> torch.Tensor:
    """Reduce (tokens, ...) to (rows, ...).

    ``unsafe`` leaves out that the lengths are looked at on the host, for which a GPU would have to be waited
    for: that none is negative, and that they add up.
    """
    return torch.segment_reduce(values, how, lengths=lengths, unsafe=True)


def _padded(hidden: torch.Tensor, inputs: Inputs, mode: str) -> torch.Tensor:
    n_rows, width = hidden.shape[:2]
    if mode == "last_token":
        if inputs.mask is None:
            return hidden[:, -1].float()
        last = inputs.mask.sum(1) - 1
        return hidden[torch.arange(n_rows, device=hidden.device), last].float()
    if mode == "cls":
        if inputs.prompt_tokens is None:
            return hidden[:, 0].float()
        lengths = torch.full_like(inputs.prompt_tokens, width) if inputs.mask is None else inputs.mask.sum(1)
        return hidden[torch.arange(n_rows, device=hidden.device), _first_tokens(lengths, inputs)].float()
    if inputs.mask is None and inputs.prompt_tokens is None and mode == "mean":
        return hidden.float().mean(1)
    within = torch.arange(width, device=hidden.device)
    kept = torch.ones((n_rows, width), dtype=torch.bool, device=hidden.device)
    kept = kept if inputs.mask is None else inputs.mask
    if inputs.prompt_tokens is not None:
        kept = kept & (within >= inputs.prompt_tokens[:, None])
    # where() and not a product: padding may hold NaN that must not reach the row (NaN times 0 is NaN).
    if mode == "max":
        return torch.where(kept.unsqueeze(-1), hidden.float(), -torch.inf).amax(1)
    weights = kept * (within + 1.0) if mode == "weighted_mean" else kept.float()
    states = torch.where(kept.unsqueeze(-1), hidden.float(), 0.0)
    return (states * weights.unsqueeze(-1)).sum(1) / _denominator(weights.sum(1), mode)


def _denominator(weights: torch.Tensor, mode: str) -> torch.Tensor:
    """Return (rows, 1) what a sum is divided by, of (rows,) sums of weights."""
    return (weights.sqrt() if mode == "mean_sqrt_len" else weights).unsqueeze(-1)


def _first_tokens(lengths: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Return (rows,) which token of each row is the first for a pooling: behind a prompt left out."""
    if inputs.prompt_tokens is None:
        return torch.zeros_like(lengths)
    return torch.where(inputs.prompt_tokens < lengths, inputs.prompt_tokens, 0)


def pool_spans(hidden: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Reduce the token states of spans to their means.

    Args:
        hidden: as `pool` takes it, of all tokens.
        inputs: of the call that made them, with spans.

    Returns:
        (spans, dim) float32; zero for a span without a token.
    """
    states = token_states(hidden, inputs)[0][inputs.span_tokens].float()
    lengths = torch.as_tensor(inputs.span_lengths)
    return _reduced(states, "sum", lengths) / lengths.clamp(min=1)[:, None]


def _pooled(source: PackedTokens, rows: IdArray, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the fields of `Inputs` that say what a pooling takes."""
    found = {}
    if source.prompt_tokens is not None:
        found["prompt_tokens"] = to_device(source.prompt_tokens[rows].astype(np.int64), device)
    if source.spans is not None:
        # Of each row the place of its first token, and of its spans the places of theirs.
        lengths = source.lengths_of(rows)
        spans = source.spans.take(rows)
        first = np.repeat(np.cumsum(lengths) - lengths, np.diff(spans.offsets))
        borders = spans.borders.astype(np.int64) + first[:, None]
        counts = np.diff(borders)[:, 0]
        found["span_tokens"] = to_device(ranges(borders[:, 0], counts), device)
        found["span_lengths"] = to_device(counts, device)
    return found


def token_states(hidden: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay the states of all tokens end to end, without padding.

    Args:
        hidden: (rows, width, dim) padded on the right, or packed (1, tokens, dim).
        inputs: of the call that made them.

    Returns:
        (tokens, dim) states, (tokens,) int64 their ids, and (rows,) int64 how many are each row's.
    """
    ids = inputs.arguments["input_ids"]
    if inputs.borders is not None:
        return hidden[0], ids[0], inputs.borders.diff()
    if inputs.mask is None:
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
        return hidden.flatten(0, 1), ids.flatten(), lengths
    return hidden.flatten(0, 1)[inputs.places], ids.flatten()[inputs.places], inputs.mask.sum(1)


def _gather(
    source: PackedTokens, rows: IdArray, lengths: npt.NDArray[np.int64], skipped: int = 0
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return the rows' token ids end to end, and each token's place within its row; both (tokens,).

    Places are counted behind so many tokens that are skipped, which are not among the lengths.
    """
    ends = np.cumsum(lengths)
    within = np.arange(int(ends[-1]), dtype=np.int64) - np.repeat(ends - lengths, lengths)
    starts = source.offsets[rows].astype(np.int64) + skipped
    return source.input_ids[np.repeat(starts, lengths) + within], within


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to a device; a GPU may still be at it, and is not waited for."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # From pinned memory the copy is queued behind the batch at work, and this process goes on.
    return tensor.pin_memory().to(device, non_blocking=True)
