"""Where units are cut, for lines and for row groups."""

import math

from bge_ray.records.plan import Span, UnitLimits


class UnitCutter:
    """Gathers neighbouring pieces of an object while they fit into one unit.

    A piece is a line or a row group. One that is too large for a unit is cut evenly into many.
    """

    def __init__(self, limits: UnitLimits, size: int) -> None:
        """Start with no piece; ``limits`` say when a unit is full, ``size`` is the object's in bytes."""
        self._limits = limits
        # Shares are equal: a remainder would be a unit of its own, and the last one to end.
        self._shares = max(1, round(size / limits.share_bytes)) if limits.share_bytes else 1
        self._share = size / self._shares if limits.share_bytes else math.inf
        self._spans: list[Span] = []
        self._bytes_of: list[int] = []
        self._start, self._stop, self._first = 0, 0, 0
        self._rows, self._bytes = 0, 0
        self._at, self._begun = 0, 0

    def add(self, start: int, stop: int, n_rows: int, n_bytes: int, stored: int = 0) -> None:
        """Add the next piece: its place, its rows, the bytes of its texts, and those it takes in the object.

        What a piece takes is left out where nobody knows, in a stream.
        """
        limits = self._limits
        cost = n_bytes + n_rows * limits.vector_bytes
        is_full = self._rows + n_rows > limits.max_rows or self._bytes + cost > limits.max_bytes
        has_share = self._at >= (self._begun // self._share + 1) * self._share
        if self._rows and (is_full or (has_share and self._rows >= limits.min_rows)):
            self._close()
        if not self._rows:
            self._start, self._begun = start, self._at
        self._stop = stop
        self._rows += n_rows
        self._bytes += cost
        self._at += stored

    def as_pieces(self) -> list[Span]:
        """Return one span for what was gathered between two cuts; each can be read alone."""
        if self._rows:
            self._close()
        return self._spans

    def as_stream(self, size: int) -> list[Span]:
        """Return one span over all ``size`` bytes, for what can only be read from its beginning."""
        pieces = self.as_pieces()
        whole = sum(self._bytes_of)
        units: list[int] = []
        for span, n_bytes in zip(pieces, self._bytes_of, strict=True):
            shares = round(self._shares * n_bytes / whole) if whole else 1
            for n_rows in span.unit_rows:
                units += _even_cut(n_rows, self._at_most(n_rows, shares // len(span.unit_rows)))
        return [Span(0, size, 0, tuple(units))] if units else []

    def _close(self) -> None:
        rows, limits = self._rows, self._limits
        shares = self._at_most(rows, round((self._at - self._begun) / self._share))
        n_units = max(1, -(-rows // limits.max_rows), -(-self._bytes // limits.max_bytes), shares)
        self._spans.append(Span(self._start, self._stop, self._first, _even_cut(rows, min(n_units, rows))))
        self._bytes_of.append(self._bytes)
        self._first += rows
        self._rows, self._bytes = 0, 0

    def _at_most(self, rows: int, pieces: int) -> int:
        """Return a number of pieces none of which has too few rows."""
        return max(1, min(pieces, rows // self._limits.min_rows))


def _even_cut(rows: int, pieces: int) -> tuple[int, ...]:
    return tuple(rows * (i + 1) // pieces - rows * i // pieces for i in range(pieces))
