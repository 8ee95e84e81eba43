"""Forward passes without padding: the rows of a batch laid end to end, attention kept within each row.

The model code is transformers' own. Its attention is replaced by a registered function that takes
the row borders (``cu_seqlens``) from the model call; positions are given explicitly.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the name the field uses
from transformers import AttentionInterface, PretrainedConfig

ATTENTION = "bge_ray_packed"

# Architectures whose forward pass touches other tokens in the attention function only, and that pass
# their keyword arguments down to it; each is compared with its padded path in tests/model.
ABSOLUTE_POSITIONS = {"bert"}
OFFSET_POSITIONS = {"camembert", "roberta", "xlm-roberta"}
PACKABLE = ABSOLUTE_POSITIONS | OFFSET_POSITIONS

# What the flash kernels behind varlen_attn ask for.
MIN_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256


def can_pack(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a model runs packed, and faster so, on a device and in a dtype."""
    if not is_packable(config):
        return False
    if device.type == "cpu":
        return dtype in (torch.float32, torch.bfloat16)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    head_dim = config.hidden_size // config.num_attention_heads
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def is_packable(config: PretrainedConfig) -> bool:
    """Tell whether packed execution of this architecture is known to give the padded path's vectors."""
    absolute = getattr(config, "position_embedding_type", None) in (None, "absolute")
    decoder = getattr(config, "is_decoder", False)
    return config.model_type in PACKABLE and absolute and not decoder


def register() -> None:
    """Make the packed attention known to transformers; without a mask of its own, none is built."""
    AttentionInterface.register(ATTENTION, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor,
    runs: Sequence[tuple[int, int]],
    max_seqlen: int,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each row of a packed batch; called by transformers' model code.

    Args:
        module: the attention layer, unused.
        query: (1, heads, tokens, head_dim).
        key: the same.
        value: the same.
        attention_mask: unused; the borders say it all.
        cu_seqlens: (rows + 1,) int32, row i at tokens cu_seqlens[i] to cu_seqlens[i + 1].
        runs: the same borders as (rows, length) of neighbours of equal length.
        max_seqlen: tokens of the longest row.
        scaling: factor on the scores.

    Returns:
        (1, tokens, heads, head_dim), and no weights.
    """
    del module, attention_mask
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    out = attend(q, k, v, cu_seqlens=cu_seqlens, runs=runs, max_seqlen=max_seqlen, scaling=scaling)
    return out.unsqueeze(0), None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    runs: Sequence[tuple[int, int]],
    max_seqlen: int,
    scaling: float | None,
    one_query: bool = False,
) -> torch.Tensor:
    """Attend within each row of a packed batch.

    Args:
        q: (tokens, heads, head_dim); (rows, heads, head_dim) with ``one_query``.
        k: (tokens, heads, head_dim).
        v: the same.
        cu_seqlens: (rows + 1,) int32, row i at tokens cu_seqlens[i] to cu_seqlens[i + 1].
        runs: the same borders as (rows, length) of neighbours of equal length.
        max_seqlen: tokens of the longest row.
        scaling: factor on the scores.
        one_query: whether each row has one query, and not one a token.

    Returns:
        Of the shape of ``q``.
    """
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        borders, longest = cu_seqlens, max_seqlen
        if one_query:
            borders, longest = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device), 1
        return torch.as_tensor(varlen_attn(q, k, v, borders, cu_seqlens, longest, max_seqlen, scale=scaling))
    # No kernel on the CPU knows borders. Rows of equal length need none: batches are sorted by length.
    parts = []
    at = start = 0
    for n_rows, length in runs:
        n_queries = 1 if one_query else length
        a = _heads_first(q[at : at + n_rows * n_queries], n_rows)
        b, c = (_heads_first(states[start : start + n_rows * length], n_rows) for states in (k, v))
        part = F.scaled_dot_product_attention(a, b, c, scale=scaling)  # (n_rows, heads, n_queries, head_dim)
        parts.append(part.transpose(1, 2).reshape(n_rows * n_queries, *q.shape[1:]))
        at += n_rows * n_queries
        start += n_rows * length
    return torch.cat(parts)


def _heads_first(states: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Return (tokens, heads, head_dim) of rows of equal length as (n_rows, heads, length, head_dim)."""
    return states.view(n_rows, -1, *states.shape[1:]).transpose(1, 2)


def equal_runs(lengths: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (rows, length) of each run of neighbours of equal length."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(lengths)) + 1])
    counts = np.diff(np.append(starts, len(lengths)))
    return list(zip(counts.tolist(), lengths[starts].tolist(), strict=True))


def positions(
    input_ids: npt.NDArray[np.integer], borders: npt.NDArray[np.int64], config: PretrainedConfig
) -> npt.NDArray[np.int64]:
    """Return the position ids that the model would give each row on its own.

    Args:
        input_ids: (tokens,) of all rows, end to end.
        borders: (rows + 1,) where each row starts, and the end.
        config: of the model.

    Returns:
        (tokens,) int64.
    """
    lengths = np.diff(borders)
    if config.model_type in ABSOLUTE_POSITIONS:
        return np.arange(len(input_ids), dtype=np.int64) - np.repeat(borders[:-1], lengths)
    # RoBERTa counts from padding_idx + 1 and leaves out padding tokens, which a text may hold literally.
    pad = int(config.pad_token_id)
    real = input_ids != pad
    counted = np.concatenate([np.zeros(1, np.int64), np.cumsum(real, dtype=np.int64)])
    before = np.repeat(counted[borders[:-1]], lengths)
    return np.where(real, counted[1:] - before, 0) + pad
