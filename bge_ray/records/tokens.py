"""What a model is given: the token ids of some rows, without padding. No tokenizer and no model here."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class PackedTokens:
    """Token ids of n rows laid end to end.

    ``input_ids`` is (total,) int32, ``offsets`` (n + 1,) int32 with row i at
    ``input_ids[offsets[i]:offsets[i + 1]]`` (what variable-length attention calls ``cu_seqlens``),
    ``truncated`` (n,) bool. ``type_starts`` is (n,) int32, where in each row the second segment begins, for
    models that tell segments apart.
    """

    input_ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    type_starts: npt.NDArray[np.int32] | None = None

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(n,) int32 tokens of each row, special tokens included."""
        return np.diff(self.offsets)

    def lengths_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(rows,) int64 tokens of the given rows."""
        return (self.offsets[rows + 1] - self.offsets[rows]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.truncated)

    @staticmethod
    def concatenate(parts: "Sequence[PackedTokens]") -> "PackedTokens":
        """Lay the rows of several parts end to end.

        Raises:
            ValueError: some of them tell segments apart and some do not.
        """
        lengths = np.concatenate([np.zeros(1, np.int32), *(part.lengths for part in parts)])
        types = [part.type_starts for part in parts if part.type_starts is not None]
        if types and len(types) != len(parts):
            raise ValueError(
                f"{len(types)} of {len(parts)} parts have segments: they are of different models"
            )
        return PackedTokens(
            np.concatenate([np.zeros(0, np.int32), *(part.input_ids for part in parts)]),
            np.cumsum(lengths, dtype=np.int32),
            np.concatenate([np.zeros(0, np.bool_), *(part.truncated for part in parts)]),
            np.concatenate(types) if types else None,
        )
