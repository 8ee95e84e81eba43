"""BM25 over stored counts of tokens: what depends on the whole data set is known when it is searched.

A passage scores the sum, over the tokens that a query has, of idf(t) * c / (c + k1 * (1 - b + b * L / mean)),
times how often the query has the token: ``c`` is how often the passage has it, ``L`` how many tokens the
passage has, ``mean`` how many passages have on average. idf(t) is ln(1 + (n - m + 0.5) / (m + 0.5)) where m
of n passages have the token. This is the form of Lucene since its version 8, and never negative.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bge_ray.records.arrays import SparseRows
from bge_ray.records.ids import IdArray


@dataclass(frozen=True)
class Saturation:
    """How a count loses weight as it grows, and with the length of its passage; ``mean`` is the mean one."""

    k1: float
    b: float
    mean: float

    def norms(self, lengths: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return what is added to the counts of passages of (n,) lengths, below the line."""
        return self.k1 * (1 - self.b + self.b * lengths / max(self.mean, 1e-9))


@dataclass(frozen=True)
class TermStats:
    """How many vectors there are, their ``length`` together, and how many of them have each token.

    ``tokens`` is (t,) int32, ascending, ``counts`` (t,) int64.
    """

    vectors: int
    length: float
    tokens: npt.NDArray[np.int32]
    counts: IdArray

    @staticmethod
    def merged(parts: "Iterable[TermStats]") -> "TermStats":
        """Return what several parts, of different vectors, come to."""
        held: Sequence[TermStats] = list(parts)
        every = np.concatenate([np.zeros(0, np.int32), *(part.tokens for part in held)])
        tokens, places = np.unique(every, return_inverse=True)
        counts = np.zeros(len(tokens), np.int64)
        np.add.at(counts, places, np.concatenate([np.zeros(0, np.int64), *(part.counts for part in held)]))
        return TermStats(
            vectors=sum(part.vectors for part in held),
            length=float(sum(part.length for part in held)),
            tokens=tokens.astype(np.int32),
            counts=counts,
        )

    def saturation(self, k1: float, b: float) -> Saturation:
        """Return how counts lose weight among these vectors."""
        return Saturation(k1, b, self.length / max(1, self.vectors))

    def weigh(self, queries: SparseRows) -> SparseRows:
        """Return counts of queries times the idf of their tokens, float64."""
        places = np.minimum(np.searchsorted(self.tokens, queries.indices), max(0, len(self.tokens) - 1))
        counts = np.zeros(len(queries.indices))
        if len(self.tokens):
            there = self.tokens[places] == queries.indices
            counts[there] = self.counts[places[there]]
        idf = np.log1p((self.vectors - counts + 0.5) / (counts + 0.5))
        return SparseRows(queries.offsets, queries.indices, queries.values.astype(np.float64) * idf)
