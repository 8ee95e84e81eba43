"""Which rows share a forward pass: sorted by length, cut by a token budget."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bge_ray.records.ids import IdArray
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import Auto

# What stays in the cache of a CPU core.
CPU_TOKEN_BUDGET = 1_024
# The output of one multiprocessor's work on a product of half precision, in numbers.
TILE = 128 * 256
# How often each multiprocessor has one in the narrowest product of a layer: so often that the last round,
# which is never full, and the launching of a pass weigh little; and how often at least, for the cache's sake.
ROUNDS, LEAST_ROUNDS = 8, 3
# Bytes a token and a hidden dimension of what is widest in a layer, the inside of its feed-forward network.
WIDEST_BYTES = 4 * 2
LEAST_GPU_TOKENS = 4_096

# Any token will do, but for those with a meaning of their own, which have the lowest numbers or the highest.
PLAIN_TOKEN = 10


@dataclass(frozen=True)
class Card:
    """What of a GPU decides how large its batches are: bytes of its L2 cache, and its multiprocessors."""

    cache_bytes: int
    processors: int


def settle_budget(asked: int | Auto, card: Card | None, hidden: int) -> int:
    """Return the token budget of a batch: as asked for, or what suits the device and the model.

    On a GPU a batch is large enough to fill it: on an H100 32,768 tokens of a model of 768 or 1,024
    dimensions and 65,536 of one of 384 (docs/measured.md has the sweep). Where the cache holds three eighths
    of that, as many as it holds: on an L4, whose memory is slow, 8,192 of 768 dimensions. Always a power of
    two.

    Args:
        asked: a number, which it is then, or auto.
        card: None for a CPU.
        hidden: dimensions of the model's hidden states.
    """
    if asked != "auto":
        return asked
    if card is None:
        return CPU_TOKEN_BUDGET
    a_round = card.processors * TILE / hidden
    cached = card.cache_bytes / (WIDEST_BYTES * hidden)
    tokens = cached if LEAST_ROUNDS * a_round <= cached <= ROUNDS * a_round else ROUNDS * a_round
    return max(LEAST_GPU_TOKENS, 1 << int(math.log2(tokens)))


def token_budget_batches(
    lengths: npt.NDArray[np.integer], budget: int, *, packed: bool = False, equal: bool = False
) -> list[IdArray]:
    """Cut rows into batches whose size stays within a token budget.

    Rows are taken longest first (ties in row order), so that a batch holds near-equal lengths and
    the first batch is the one that needs the most memory.

    Args:
        lengths: (n,) tokens of each row; one without any is put into a batch like others.
        budget: most tokens of one batch; a single row longer than this makes a batch of its own.
        packed: count real tokens, as a model without padding sees them, and not rows times the
            longest row.
        equal: put none but rows of one length together, so that none is padded.

    Returns:
        (rows,) int64 row numbers of each batch; together every row once.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable").astype(np.int64)
    ends = np.cumsum(lengths[order], dtype=np.int64)
    shorter = -lengths[order].astype(np.int64)  # ascending
    batches = []
    start = 0
    while start < len(order):
        if packed:
            before = int(ends[start - 1]) if start else 0
            size = int(np.searchsorted(ends, before + budget, side="right")) - start
        else:
            size = budget // max(1, int(lengths[order[start]]))
        if equal:
            size = min(size, int(np.searchsorted(shorter, shorter[start], side="right")) - start)
        batches.append(order[start : start + max(1, size)])
        start += max(1, size)
    return batches


def longest_rows(length: int, budget: int) -> PackedTokens:
    """Return as many rows of ``length`` tokens as a budget holds, at least one: what a warm-up runs."""
    n_rows = max(1, budget // length)
    offsets = np.arange(n_rows + 1, dtype=np.int32) * np.int32(length)
    # Neighbours differ: what rows begin with alike might be computed once.
    ids = np.repeat(PLAIN_TOKEN + np.arange(n_rows, dtype=np.int32) % 2, length)
    return PackedTokens(ids.astype(np.int32), offsets, np.zeros(n_rows, dtype=np.bool_))
