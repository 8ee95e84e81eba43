"""What all rows of a decoder begin with, an instruction and its examples, computed once a batch.

A token sees only those before it. Where rows begin alike, so do their states, in every layer: they are made
for one row, and the others attend to its keys and values.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from bge_ray.model.run.packed import DECODERS, looks_both_ways
from bge_ray.records.tokens import PackedTokens

# Of fewer tokens alike, what attention in two pieces costs is more than what is saved.
LEAST_TOKENS = 16
# What a row takes of a batch for so many tokens that it shares, in tokens: their keys and values, again.
SHARED_PER_TOKEN = 16


def can_share(model: Any, needs: Collection[str]) -> bool:
    """Tell whether rows of a packed model may share what they begin with: of each only its end is wanted.

    Args:
        model: as a family loads it.
        needs: of all its heads, as `heads.Head` has them.
    """
    config = model.config
    # A module of ours around a decoder merges states by their place in the row, and looks at the borders.
    whole = type(model).__module__.startswith("transformers.models.")
    causal = config.model_type in DECODERS and not looks_both_ways(config)
    return whole and causal and set(needs) == {"last_token"}


def shared_tokens(source: PackedTokens, rows: npt.NDArray[np.int64] | None = None) -> int:
    """Return how many tokens rows begin with alike, less than any has; 0 where sharing them is no gain.

    Args:
        source: n rows.
        rows: which of them; None is all. Those without a token do not count.
    """
    numbers = np.arange(len(source)) if rows is None else rows
    numbers = numbers[source.lengths_of(numbers) > 0]
    if len(numbers) < 2 or source.spans is not None:
        return 0
    starts = source.offsets[numbers].astype(np.int64)
    alike, most = 0, int(source.lengths_of(numbers).min()) - 1
    while alike < most and (source.input_ids[starts + alike] == source.input_ids[starts[0] + alike]).all():
        alike += 1
    return alike if alike >= LEAST_TOKENS else 0


def counted_lengths(lengths: npt.NDArray[np.int32], shared: int) -> npt.NDArray[np.int32]:
    """Return what rows of (n,) lengths take of a batch, in tokens, where they share so many."""
    return np.maximum(lengths - shared + -(-shared // SHARED_PER_TOKEN), 0)


def shared_keys(
    shared: int, lengths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where the keys of rows lie that share a prefix, and the borders of queries and of keys.

    Args:
        shared: tokens of the prefix.
        lengths: (rows,) tokens of each row behind it.

    Returns:
        (total,) places, and twice (rows + 2,) borders; see `packed.Prefix`.
    """
    own = np.concatenate([[0, shared], shared + np.cumsum(lengths)])
    all_keys = np.concatenate([[0, shared], shared + np.cumsum(shared + lengths)])
    counts = np.diff(all_keys)
    within = np.arange(all_keys[-1]) - np.repeat(all_keys[:-1], counts)
    # Of its own tokens each key lies behind those of the rows before; of the shared ones, in front.
    shift = np.repeat(own[:-1] - np.concatenate([[0], np.full(len(lengths), shared)]), counts)
    return np.where(within < shared, within, within + shift), own, all_keys
