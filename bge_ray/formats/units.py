"""When a unit is full: the one owner of the cut, for lines and for row groups."""

from bge_ray.records.plan import Span, UnitLimits


class UnitCutter:
    """Gathers neighbouring pieces of an object while they fit into one unit.

    A piece is a line or a row group. One that is too large for a unit is cut evenly into many.
    """

    def __init__(self, limits: UnitLimits) -> None:
        """Start with no piece; ``limits`` say when a unit is full."""
        self._limits = limits
        self._spans: list[Span] = []
        self._start, self._stop, self._first = 0, 0, 0
        self._rows, self._bytes = 0, 0

    def add(self, start: int, stop: int, n_rows: int, n_bytes: int) -> None:
        """Add the next piece: its place, its rows, and the bytes of its texts."""
        limits = self._limits
        cost = limits.bytes_of(n_rows, n_bytes)
        if self._rows and (self._rows + n_rows > limits.max_rows or self._bytes + cost > limits.max_bytes):
            self._close()
        if not self._rows:
            self._start = start
        self._stop = stop
        self._rows += n_rows
        self._bytes += cost

    def as_pieces(self) -> list[Span]:
        """Return one span for what was gathered between two cuts; each can be read alone."""
        if self._rows:
            self._close()
        return self._spans

    def as_stream(self, size: int) -> list[Span]:
        """Return one span over all ``size`` bytes, for what can only be read from its beginning."""
        unit_rows = tuple(n_rows for span in self.as_pieces() for n_rows in span.unit_rows)
        return [Span(0, size, 0, unit_rows)] if unit_rows else []

    def _close(self) -> None:
        rows, limits = self._rows, self._limits
        n_units = max(1, -(-rows // limits.max_rows), -(-self._bytes // limits.max_bytes))
        self._spans.append(Span(self._start, self._stop, self._first, _even_cut(rows, min(n_units, rows))))
        self._first += rows
        self._rows, self._bytes = 0, 0


def _even_cut(rows: int, pieces: int) -> tuple[int, ...]:
    return tuple(rows * (i + 1) // pieces - rows * i // pieces for i in range(pieces))
