"""Token ids of texts, laid end to end: what is tokenised, what travels, what a forward pass is cut from."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class PackedTokens:
    """Token ids of n texts laid end to end, without padding.

    ``input_ids`` is (total,) int32, ``offsets`` (n + 1,) int32 with text i at
    ``input_ids[offsets[i]:offsets[i + 1]]`` (what variable-length attention calls ``cu_seqlens``),
    ``truncated`` (n,) bool.
    """

    input_ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(n,) int32 tokens of each text, special tokens included."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.truncated)

    @staticmethod
    def concatenate(parts: "list[PackedTokens]") -> "PackedTokens":
        """Lay the texts of several parts end to end."""
        lengths = np.concatenate([np.zeros(1, np.int32), *(part.lengths for part in parts)])
        return PackedTokens(
            np.concatenate([np.zeros(0, np.int32), *(part.input_ids for part in parts)]),
            np.cumsum(lengths, dtype=np.int32),
            np.concatenate([np.zeros(0, np.bool_), *(part.truncated for part in parts)]),
        )
