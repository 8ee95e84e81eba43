"""What a model is given: the token ids of some rows, without padding. No tokenizer and no model here."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bge_ray.records.arrays import ranges


@dataclass(frozen=True)
class TokenSpans:
    """Some spans of the tokens of each of n rows, of which there is a result each.

    Row i has ``borders[offsets[i]:offsets[i + 1]]`` of (total, 2) int32: the first token of the row that is
    in a span, and the one behind its last. ``offsets`` is (n + 1,) int64.
    """

    offsets: npt.NDArray[np.int64]
    borders: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.borders)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """(total,) the row of each span."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def of_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the numbers of the spans of the given rows, in their order."""
        return ranges(self.offsets[rows], self.counts_of(rows))

    def counts_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(rows,) how many spans the given rows have."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def take(self, rows: npt.NDArray[np.int64]) -> "TokenSpans":
        """Return those of the given rows, in their order."""
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts_of(rows))])
        return TokenSpans(offsets, self.borders[self.of_rows(rows)])

    @staticmethod
    def of(borders: "Sequence[npt.NDArray[np.int32]]") -> "TokenSpans":
        """Take the borders of the spans of each row."""
        counts = [len(some) for some in borders]
        flat = np.concatenate([np.zeros((0, 2), np.int32), *borders])
        return TokenSpans(np.cumsum([0, *counts], dtype=np.int64), flat)

    @staticmethod
    def concatenate(parts: "Sequence[TokenSpans]") -> "TokenSpans":
        """Lay those of successive rows end to end."""
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return TokenSpans(offsets, np.concatenate([part.borders for part in parts]))


@dataclass(frozen=True)
class PackedTokens:
    """Token ids of n rows laid end to end.

    ``input_ids`` is (total,) int32, ``offsets`` (n + 1,) int32 with row i at
    ``input_ids[offsets[i]:offsets[i + 1]]`` (what variable-length attention calls ``cu_seqlens``),
    ``truncated`` (n,) bool. ``type_starts`` is (n,) int32, where in each row the second segment begins, for
    models that tell segments apart. ``prompt_tokens`` is (n,) int32, how many tokens at the start of each row
    a pooling leaves out, for models that pool without the prompt.

    A row has one result, unless it has ``spans``: then it has one for each of them, and results are counted
    over all rows.
    """

    input_ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    type_starts: npt.NDArray[np.int32] | None = None
    prompt_tokens: npt.NDArray[np.int32] | None = None
    spans: TokenSpans | None = None

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(n,) int32 tokens of each row, special tokens included."""
        return np.diff(self.offsets)

    def lengths_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(rows,) int64 tokens of the given rows."""
        return (self.offsets[rows + 1] - self.offsets[rows]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.truncated)

    @property
    def n_results(self) -> int:
        """How many results all rows have."""
        return len(self) if self.spans is None else len(self.spans)

    @property
    def result_lengths(self) -> npt.NDArray[np.int32]:
        """(n_results,) int32 tokens that each result is of."""
        return self.lengths if self.spans is None else np.diff(self.spans.borders)[:, 0]

    @property
    def result_truncated(self) -> npt.NDArray[np.bool_]:
        """(n_results,) ``truncated`` of the row of each result."""
        return self.truncated if self.spans is None else self.truncated[self.spans.rows]

    def results_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the numbers of the results of the given rows, in their order."""
        return rows if self.spans is None else self.spans.of_rows(rows)

    def rows_of(self, results: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the rows that some results are of, each once, ascending."""
        if self.spans is None:
            return np.unique(results)
        return np.unique(np.searchsorted(self.spans.offsets, results, side="right") - 1)

    def lengths_of_results(self, results: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(results,) int64 tokens that each of the given results is of."""
        if self.spans is None:
            return self.lengths_of(results)
        return np.diff(self.spans.borders[results])[:, 0].astype(np.int64)

    def take_results(self, results: npt.NDArray[np.int64]) -> "PackedTokens":
        """Return the rows of some results, given ascending, with these results alone."""
        if self.spans is None:
            return self.take(results)
        rows = self.rows_of(results)
        offsets = np.searchsorted(self.spans.rows[results], [*rows, np.iinfo(np.int64).max])
        spans = TokenSpans(offsets.astype(np.int64), self.spans.borders[results])
        return dataclasses.replace(dataclasses.replace(self, spans=None).take(rows), spans=spans)

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
            None if self.spans is None else self.spans.take(rows),
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
            ValueError: some of them tell segments apart, or prompts, or have spans, and some do not.
        """
        spans = [part.spans for part in parts if part.spans is not None]
        if spans and len(spans) != len(parts):
            raise ValueError(
                f"{len(spans)} of {len(parts)} parts have spans: their texts were cut differently"
            )
        lengths = np.concatenate([np.zeros(1, np.int32), *(part.lengths for part in parts)])
        return PackedTokens(
            np.concatenate([np.zeros(0, np.int32), *(part.input_ids for part in parts)]),
            np.cumsum(lengths, dtype=np.int32),
            np.concatenate([np.zeros(0, np.bool_), *(part.truncated for part in parts)]),
            _joined("segments", [part.type_starts for part in parts]),
            _joined("prompts", [part.prompt_tokens for part in parts]),
            TokenSpans.concatenate(spans) if spans else None,
        )


def _joined(name: str, arrays: Sequence[npt.NDArray[np.int32] | None]) -> npt.NDArray[np.int32] | None:
    there = [array for array in arrays if array is not None]
    if there and len(there) != len(arrays):
        raise ValueError(f"{len(there)} of {len(arrays)} parts have {name}: they are of different models")
    return np.concatenate(there) if there else None
