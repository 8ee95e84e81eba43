"""What a model is given: the token ids of some rows, without padding. No tokenizer and no model here."""

import itertools
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
    models that tell segments apart. ``prompt_tokens`` is (n,) int32, how many tokens at the start of each row
    a pooling leaves out, for models that pool without the prompt.
    """

    input_ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    type_starts: npt.NDArray[np.int32] | None = None
    prompt_tokens: npt.NDArray[np.int32] | None = None

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(n,) int32 tokens of each row, special tokens included."""
        return np.diff(self.offsets)

    def lengths_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(rows,) int64 tokens of the given rows."""
        return (self.offsets[rows + 1] - self.offsets[rows]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.truncated)

    def take(self, rows: npt.NDArray[np.int64]) -> "PackedTokens":
        """Return the given (m,) rows in their order, laid end to end; as it is if those are all in place."""
        if len(rows) == len(self) and (rows == np.arange(len(self))).all():
            return self
        lengths = self.lengths_of(rows)
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        # Of each token, where it stands: its row's beginning here, less that there, and its own place.
        shift = np.repeat(self.offsets[rows].astype(np.int64) - offsets[:-1], lengths)
        return PackedTokens(
            self.input_ids[np.arange(offsets[-1], dtype=np.int64) + shift],
            offsets,
            self.truncated[rows],
            None if self.type_starts is None else self.type_starts[rows],
            None if self.prompt_tokens is None else self.prompt_tokens[rows],
        )

    @staticmethod
    def of(ids: "Sequence[Sequence[int]]", truncated: npt.NDArray[np.bool_]) -> "PackedTokens":
        """Lay the token ids of n rows end to end."""
        offsets = np.zeros(len(ids) + 1, dtype=np.int32)
        np.cumsum([len(row) for row in ids], out=offsets[1:])
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(offsets[-1]))
        return PackedTokens(flat, offsets, truncated)

    @staticmethod
    def concatenate(parts: "Sequence[PackedTokens]") -> "PackedTokens":
        """Lay the rows of several parts end to end.

        Raises:
            ValueError: some of them tell segments apart, or prompts, and some do not.
        """
        lengths = np.concatenate([np.zeros(1, np.int32), *(part.lengths for part in parts)])
        return PackedTokens(
            np.concatenate([np.zeros(0, np.int32), *(part.input_ids for part in parts)]),
            np.cumsum(lengths, dtype=np.int32),
            np.concatenate([np.zeros(0, np.bool_), *(part.truncated for part in parts)]),
            _joined("segments", [part.type_starts for part in parts]),
            _joined("prompts", [part.prompt_tokens for part in parts]),
        )


def _joined(name: str, arrays: Sequence[npt.NDArray[np.int32] | None]) -> npt.NDArray[np.int32] | None:
    there = [array for array in arrays if array is not None]
    if there and len(there) != len(arrays):
        raise ValueError(f"{len(there)} of {len(arrays)} parts have {name}: they are of different models")
    return np.concatenate(there) if there else None
