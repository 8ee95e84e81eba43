"""Forward passes without padding: the rows of a batch laid end to end, attention kept within each row.

The model code is transformers' own. Its attention is replaced by a registered function that takes
the row borders (``cu_seqlens``) from the model call; positions are given explicitly.
"""

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
# Rotary positions, grouped heads; a token sees those before it, unless the configuration says otherwise.
DECODERS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "granite"}
PACKABLE = ABSOLUTE_POSITIONS | OFFSET_POSITIONS | DECODERS
# These kinds of rotary positions depend on a token's place alone; others, on the longest row of a batch, too.
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}

# Scores that are capped are made here and not in a kernel, for so many queries at once.
CAPPED_QUERIES = 256

# What the flash kernels behind varlen_attn ask for.
MIN_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Reach:
    """What a token's query sees of its row, and what becomes of its scores.

    ``causal``: itself and what lies before it, of which ``window`` leaves the nearest so many, itself
    included. ``softcap``: scores are bent to lie within this in size.
    """

    causal: bool = False
    window: int | None = None
    softcap: float | None = None


EVERYTHING = Reach()


@dataclass(frozen=True)
class Prefix:
    """Where the keys lie of rows that share their first tokens, which are a row of their own in front.

    ``tokens`` is how many they are, and ``longest`` how many queries the longest of these rows has. ``keys``
    is (total,) int64: of each row, the one in front first, the places of all tokens that it may see.
    ``queries_at`` and ``keys_at`` are (rows + 2,) int32, where the queries and the keys of each begin, and
    the end.
    """

    tokens: int
    longest: int
    keys: torch.Tensor
    queries_at: torch.Tensor
    keys_at: torch.Tensor


def can_pack(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a model runs packed, and faster so, on a device and in a dtype."""
    if not is_packable(config):
        return False
    if device.type == "cpu":
        return dtype in (torch.float32, torch.bfloat16)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if getattr(config, "attn_logit_softcapping", None) is not None:  # the kernel has no such thing
        return False
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def is_packable(config: PretrainedConfig) -> bool:
    """Tell whether packed execution of this architecture is known to give the padded path's vectors."""
    if config.model_type in DECODERS:
        return _is_packable_decoder(config)
    absolute = getattr(config, "position_embedding_type", None) in (None, "absolute")
    decoder = getattr(config, "is_decoder", False)
    return config.model_type in PACKABLE and absolute and not decoder


def looks_both_ways(config: PretrainedConfig) -> bool:
    """Tell whether a decoder's tokens see those behind them, too; there are two names for it."""
    return not getattr(config, "is_causal", True) or bool(
        getattr(config, "use_bidirectional_attention", False)
    )


def is_placed_by_batch(config: PretrainedConfig) -> bool:
    """Tell whether rotary positions of a row depend on the longest row of its batch."""
    found = getattr(config, "rope_parameters", None) or {}
    # A model with several kinds of layers has them by kind.
    several = [kind for kind in found.values() if isinstance(kind, dict)] or [found]
    return any(kind.get("rope_type", "default") not in STATIC_ROPE for kind in several)


def _is_packable_decoder(config: PretrainedConfig) -> bool:
    # A decoder's classification head looks for the last token by itself, one in each line of a batch.
    classifies = any("ForSequenceClassification" in name for name in config.architectures or ())
    # A window to both sides has no test.
    window_both_ways = looks_both_ways(config) and getattr(config, "sliding_window", None)
    return not is_placed_by_batch(config) and not classifies and not window_both_ways


def takes_ready_mask(model: torch.nn.Module) -> bool:
    """Tell whether a model is known to take a mask of (rows, 1, 1, width) bool as it is.

    Others may add one of their own to it, as a decoder does, or read it in their own way.
    """
    config = getattr(model, "config", None)
    ours = type(model).__module__.startswith("transformers.models.")
    known = getattr(config, "model_type", None) in ABSOLUTE_POSITIONS | OFFSET_POSITIONS
    by_torch = getattr(config, "_attn_implementation", None) == "sdpa"
    return ours and known and by_torch and not getattr(config, "is_decoder", False)


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
    sliding_window: int | None = None,
    softcap: float | None = None,
    one_query: bool = False,
    prefix: Prefix | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each row of a packed batch; called by transformers' model code.

    Args:
        module: the attention layer, which knows whether it is causal.
        query: (1, heads, tokens, head_dim); (1, heads, rows, head_dim) with ``one_query``.
        key: (1, heads or fewer, tokens, head_dim), each shared by neighbouring heads of the query.
        value: the same.
        attention_mask: unused; the borders say it all.
        cu_seqlens: (rows + 1,) int32, row i at tokens cu_seqlens[i] to cu_seqlens[i + 1].
        runs: the same borders as (rows, length) of neighbours of equal length.
        max_seqlen: tokens of the longest row.
        scaling: factor on the scores.
        sliding_window: how many tokens a query sees, itself included; None is all.
        softcap: bound of the scores.
        one_query: whether each row has one query, that of its last token.
        prefix: what rows share, which then lies in front of them, and the borders begin behind it.

    Returns:
        (1, tokens, heads, head_dim), and no weights.
    """
    del attention_mask
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    # A decoder's layer calls itself causal also where its configuration makes it look both ways.
    config = getattr(module, "config", None)
    causal = bool(getattr(module, "is_causal", False)) and bool(getattr(config, "is_causal", True))
    out = attend(
        q,
        k,
        v,
        cu_seqlens=cu_seqlens,
        runs=runs,
        max_seqlen=max_seqlen,
        scaling=scaling,
        one_query=one_query,
        reach=Reach(causal, sliding_window, softcap),
        prefix=prefix,
    )
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
    reach: Reach = EVERYTHING,
    prefix: Prefix | None = None,
) -> torch.Tensor:
    """Attend within each row of a packed batch, and to what all rows begin with.

    Args:
        q: (tokens, heads, head_dim); (rows, heads, head_dim) with ``one_query``.
        k: (tokens, heads, head_dim), or fewer heads, each for as many neighbours of the query's.
        v: the same.
        cu_seqlens: (rows + 1,) int32, row i at tokens cu_seqlens[i] to cu_seqlens[i + 1].
        runs: the same borders as (rows, length) of neighbours of equal length.
        max_seqlen: tokens of the longest row.
        scaling: factor on the scores.
        one_query: whether each row has one query, and not one a token; a causal one is its last token's.
        reach: what a query sees.
        prefix: what rows share, which then lies in front of them, and the borders begin behind it; its own
            tokens have queries unless there is ``one_query`` a row. For causal queries.

    Returns:
        Of the shape of ``q``.
    """
    if has_kernel(q):
        return attend_by_kernel(q, k, v, cu_seqlens, max_seqlen, scaling, reach, prefix)
    # No kernel on the CPU knows borders. Rows of equal length need none: batches are sorted by length.
    shared = 0
    if prefix is not None:
        shared, keys = prefix.tokens, prefix.keys[prefix.tokens :] if one_query else prefix.keys
        k, v = k[keys], v[keys]
        runs = runs if one_query else [(1, 0), *runs]  # that in front has nothing but what it shares
    parts = []
    at = start = 0
    for n_rows, length in runs:
        n_keys = shared + length
        n_queries = 1 if one_query else length or shared
        a = _heads_first(q[at : at + n_rows * n_queries], n_rows)
        b, c = (_heads_first(states[start : start + n_rows * n_keys], n_rows) for states in (k, v))
        part = _attend_run(a, b, c, scaling, reach)  # (n_rows, heads, n_queries, head_dim)
        parts.append(part.transpose(1, 2).reshape(n_rows * n_queries, *q.shape[1:]))
        at += n_rows * n_queries
        start += n_rows * n_keys
    return torch.cat(parts)


def has_kernel(q: torch.Tensor) -> bool:
    """Tell whether there is a kernel for attention that knows borders where a tensor lies."""
    return q.is_cuda


def attend_by_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scaling: float | None,
    reach: Reach,
    prefix: Prefix | None = None,
) -> torch.Tensor:
    """Attend as `attend` does, by the kernel for CUDA, which knows borders and no soft-cap.

    As many queries as rows are one a row. The kernel takes the queries of a row for those of its last tokens.
    """
    from torch.nn.attention.varlen import varlen_attn

    one_query = len(q) == len(cu_seqlens) - 1
    borders, keys_at, longest = cu_seqlens, cu_seqlens, max_seqlen
    if prefix is not None:
        keys, borders, keys_at, longest = prefix.keys, prefix.queries_at, prefix.keys_at, prefix.longest
        if one_query:  # none of the tokens in front
            keys, keys_at = keys[prefix.tokens :], keys_at[1:] - prefix.tokens
        k, v = k[keys], v[keys]
    if one_query:
        borders, longest = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device), 1
    # How many tokens a query sees to its left and to its right; -1 is all.
    window = (-1, -1)
    if reach.causal:
        window = (-1 if reach.window is None else reach.window - 1, 0)
    out = varlen_attn(
        q,
        k,
        v,
        borders,
        keys_at,
        longest,
        max_seqlen,
        scale=scaling,
        window_size=window,
        **(_shared_heads() if k.shape[1] != q.shape[1] else {}),
    )
    return torch.as_tensor(out)


@functools.cache
def _shared_heads() -> dict[str, Any]:
    """Return what tells the kernel that heads of keys are shared; torch 2.11 takes them untold."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _attend_run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, reach: Reach
) -> torch.Tensor:
    """Attend in rows of equal length.

    Args:
        q: (rows, heads, queries, head_dim), the queries of the last tokens.
        k: (rows, heads or fewer, length, head_dim).
        v: the same.
        scaling: factor on the scores.
        reach: what a query sees.

    Returns:
        Of the shape of ``q``.
    """
    n_queries, length = q.shape[2], k.shape[2]
    if reach.causal and n_queries == 1:  # the last token sees all that its window leaves
        k, v = (states[:, :, -(reach.window or length) :] for states in (k, v))
        reach = replace(reach, causal=False)
    if reach.softcap is not None:
        return _attend_capped(q, k, v, scaling, reach)
    before = length - n_queries  # tokens in front of the first query
    narrow = reach.causal and (before > 0 or (reach.window is not None and reach.window < length))
    mask = _sees(before, length, length, reach, q.device) if narrow else None
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=reach.causal and mask is None,
        scale=scaling,
        enable_gqa=k.shape[1] != q.shape[1],
    )


def _attend_capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, reach: Reach
) -> torch.Tensor:
    """Attend with capped scores, a block of queries at a time: (rows, heads, queries, keys) may be large."""
    rows, heads, n_queries, head_dim = q.shape
    length, shared = k.shape[2], heads // k.shape[1]
    factor = head_dim**-0.5 if scaling is None else scaling
    cap = float(reach.softcap or 0)
    grouped = q.view(rows, -1, shared, n_queries, head_dim)  # with a key head each
    before = length - n_queries  # tokens in front of the first query
    parts = []
    for start in range(0, n_queries, CAPPED_QUERIES):
        stop = min(start + CAPPED_QUERIES, n_queries)
        seen = before + stop if reach.causal else length
        keys, values = k[:, :, None, :seen], v[:, :, None, :seen]
        scores = torch.matmul(grouped[:, :, :, start:stop], keys.transpose(-1, -2)) * factor
        scores = torch.tanh(scores / cap) * cap
        if reach.causal:
            hidden = ~_sees(before + start, before + stop, seen, reach, q.device)
            scores = scores.masked_fill(hidden, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        parts.append(torch.matmul(weights, values))
    return torch.cat(parts, dim=3).view(q.shape)


def _sees(start: int, stop: int, length: int, reach: Reach, device: torch.device) -> torch.Tensor:
    """(stop - start, length) bool, which keys the queries of those places of a row see causally."""
    ahead = torch.arange(start, stop, device=device)[:, None] - torch.arange(length, device=device)
    seen = ahead >= 0
    return seen & (ahead < reach.window) if reach.window is not None else seen


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
    if config.model_type in ABSOLUTE_POSITIONS | DECODERS:
        return np.arange(len(input_ids), dtype=np.int64) - np.repeat(borders[:-1], lengths)
    # RoBERTa counts from padding_idx + 1 and leaves out padding tokens, which a text may hold literally.
    pad = int(config.pad_token_id)
    real = input_ids != pad
    counted = np.concatenate([np.zeros(1, np.int64), np.cumsum(real, dtype=np.int64)])
    before = np.repeat(counted[borders[:-1]], lengths)
    return np.where(real, counted[1:] - before, 0) + pad
