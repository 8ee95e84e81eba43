"""Whether a model gives a padded row what it gives the row alone; of one that does not, none is padded."""

from typing import Any

import numpy as np

from bge_ray.model.run.batching import PLAIN_TOKEN
from bge_ray.model.run.executor import Executor
from bge_ray.model.run.packed import is_placed_by_batch
from bge_ray.model.run.result import Result
from bge_ray.records.model import ModelSpec
from bge_ray.records.tokens import PackedTokens

# Their layers mix neighbours, or the whole row, without a look at the mask.
SEES_PADDING = {"convbert", "fnet", "nystromformer"}
# Any other is tried with two rows of so many tokens: the outputs of the first, alone and padded, may differ
# by so much of their largest number, in float32 and in half precision.
SHORT, LONG = 17, 40
TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2


def sees_padding(executor: Executor, spec: ModelSpec, config: Any) -> bool:
    """Tell whether the outputs of a padded row are others than those of the row alone.

    Args:
        executor: of the loaded model, for padded batches.
        spec: of the model; outputs of a row that are not of one length are not looked at.
        config: of the model.
    """
    if getattr(config, "model_type", None) in SEES_PADDING or is_placed_by_batch(config):
        return True
    if spec.max_length < LONG:
        return False
    ids = [[PLAIN_TOKEN + place % SHORT for place in range(length)] for length in (SHORT, LONG)]
    tokens = PackedTokens.of(ids, np.zeros(2, np.bool_))
    names = [output.name for output in spec.outputs if output.kind in ("dense", "scalar")]
    found = []
    for rows in ([0], [0, 1]):
        result = Result(spec.outputs, 2)
        executor.run(tokens, [np.array(rows)], result)
        if result.faults:  # too large, or not finite: said of the rows that come
            return False
        found.append([result.array(name)[0].astype(np.float64) for name in names])
    tolerance = TOLERANCE if spec.dtype == "float32" else HALF_TOLERANCE
    return any(
        np.abs(alone - padded).max() > tolerance * np.abs(alone).max()
        for alone, padded in zip(*found, strict=True)
    )
