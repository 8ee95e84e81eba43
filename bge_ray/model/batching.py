"""Which rows share a forward pass: sorted by length, cut by a token budget."""

import numpy as np

from bge_ray.schema import IdArray


def token_budget_batches(lengths: np.ndarray, budget: int) -> list[IdArray]:
    """Cut rows into batches whose padded size stays within a token budget.

    Rows are taken longest first (ties in row order), so that a batch holds near-equal lengths and
    the first batch is the one that needs the most memory.

    Args:
        lengths: (n,) tokens of each row, each at least 1.
        budget: most tokens of one batch, counted as rows times its longest row; a single row
            longer than this makes a batch of its own.

    Returns:
        (rows,) int64 row numbers of each batch; together every row once.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        size = max(1, budget // int(lengths[order[start]]))
        batches.append(order[start : start + size].astype(np.int64))
        start += size
    return batches
