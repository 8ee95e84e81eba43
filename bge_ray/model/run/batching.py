"""Which rows share a forward pass: sorted by length, cut by a token budget."""

import numpy as np
import numpy.typing as npt

from bge_ray.records.ids import IdArray
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import Auto

# What keeps a GPU busy, and what stays in the cache of a CPU core.
GPU_TOKEN_BUDGET = 32_768
CPU_TOKEN_BUDGET = 1_024

# Any token will do, but for those with a meaning of their own, which have the lowest numbers or the highest.
PLAIN_TOKEN = 10


def settle_budget(asked: int | Auto, *, on_gpu: bool) -> int:
    """Return the token budget of a batch: as asked for, or what suits the device."""
    if asked != "auto":
        return asked
    return GPU_TOKEN_BUDGET if on_gpu else CPU_TOKEN_BUDGET


def token_budget_batches(
    lengths: npt.NDArray[np.integer], budget: int, *, packed: bool = False
) -> list[IdArray]:
    """Cut rows into batches whose size stays within a token budget.

    Rows are taken longest first (ties in row order), so that a batch holds near-equal lengths and
    the first batch is the one that needs the most memory.

    Args:
        lengths: (n,) tokens of each row; one without any is put into a batch like others.
        budget: most tokens of one batch; a single row longer than this makes a batch of its own.
        packed: count real tokens, as a model without padding sees them, and not rows times the
            longest row.

    Returns:
        (rows,) int64 row numbers of each batch; together every row once.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable").astype(np.int64)
    ends = np.cumsum(lengths[order], dtype=np.int64)
    batches = []
    start = 0
    while start < len(order):
        if packed:
            before = int(ends[start - 1]) if start else 0
            size = int(np.searchsorted(ends, before + budget, side="right")) - start
        else:
            size = budget // max(1, int(lengths[order[start]]))
        batches.append(order[start : start + max(1, size)])
        start += max(1, size)
    return batches


def longest_rows(length: int, budget: int) -> PackedTokens:
    """Return as many rows of ``length`` equal tokens as a budget holds, at least one: what a warm-up runs."""
    n_rows = max(1, budget // length)
    offsets = np.arange(n_rows + 1, dtype=np.int32) * np.int32(length)
    return PackedTokens(
        np.full(n_rows * length, PLAIN_TOKEN, np.int32), offsets, np.zeros(n_rows, dtype=np.bool_)
    )
