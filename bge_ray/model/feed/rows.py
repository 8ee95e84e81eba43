"""What a model is given: the token ids of some rows. Known to those who tokenise, too, who load no model."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bge_ray.records.ids import IdArray
from bge_ray.records.tokens import PackedTokens

TypeStarts = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Rows:
    """What a batch is cut from: the token ids of n rows, and (n,) where each row's second segment begins."""

    tokens: PackedTokens
    type_starts: TypeStarts | None = None

    def lengths(self, rows: IdArray) -> npt.NDArray[np.int64]:
        """(rows,) int64 tokens of the given rows."""
        offsets = self.tokens.offsets
        return (offsets[rows + 1] - offsets[rows]).astype(np.int64)
