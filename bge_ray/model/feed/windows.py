"""Late chunks: which window of its text a chunk is read in, and which tokens of the window are the chunk's.

A window is as many whole chunks of a text, one after the other from the text's beginning on, as the model's
tokens have room for, read as one piece; so it is known which window a chunk is in, and windows share no
chunk. A token is a chunk's if it stands for one of the chunk's characters. What stands around the text
(special tokens, instruction, title) is of no chunk: its states are seen by the others and not pooled.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Changes with any change here that moves a border.
RULES = 1

# First and last + 1 character.
Span = tuple[int, int]


@dataclass(frozen=True)
class Placed:
    """The n tokens of a text: their ids, and the characters of each, (n, 2); a special one has none."""

    ids: list[int]
    places: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """The tokens of a window, what names each of its k chunks, and (k, 2) int32 their spans of tokens."""

    ids: list[int]
    names: list[str]
    borders: npt.NDArray[np.int32]


def windows(
    chunks: Sequence[Span],
    lengths: Sequence[int],
    around: int,
    max_length: int,
    read: Callable[[int, Span], str],
    place: Callable[[str], Placed],
) -> Iterator[Window]:
    """Yield the windows of a text.

    Args:
        chunks: of the text, in order.
        lengths: of each, its tokens if it stood alone.
        around: tokens of what stands around a text, of which a window has one.
        max_length: most tokens of a window; no chunk alone has more.
        read: what the model reads of a span of the text that begins with the chunk of a number.
        place: tokenises it.
    """
    first, tokens = 0, around
    for number, length in enumerate(lengths):
        # Counted so, a window hardly has more than it may; what overlaps is counted twice.
        if number > first and tokens + length - around > max_length:
            yield from _fitting(chunks, first, number, max_length, read, place)
            first, tokens = number, around
        tokens += length - around
    yield from _fitting(chunks, first, len(chunks), max_length, read, place)


def _fitting(
    chunks: Sequence[Span],
    first: int,
    stop: int,
    max_length: int,
    read: Callable[[int, Span], str],
    place: Callable[[str], Placed],
) -> Iterator[Window]:
    """Yield the window of some chunks, or windows of its halves where it has too many tokens after all."""
    start, end = chunks[first][0], chunks[stop - 1][1]
    text = read(first, (start, end))
    placed = place(text)
    if len(placed.ids) > max_length and stop - first > 1:
        middle = (first + stop) // 2
        yield from _fitting(chunks, first, middle, max_length, read, place)
        yield from _fitting(chunks, middle, stop, max_length, read, place)
        return
    before = len(text) - (end - start)
    spans = [(a - start + before, b - start + before) for a, b in chunks[first:stop]]
    if end == start:  # there is a title alone, or nothing
        spans = [(0, len(text))]
    borders = np.asarray([_tokens_in(placed, span) for span in spans], np.int32)
    # Nothing else decides the vector: the window as the model reads it, and where in it the chunk is.
    yield Window(placed.ids, [f"{text}\0{a},{b}" for a, b in spans], borders)


def _tokens_in(placed: Placed, span: Span) -> Span:
    """Return the first and last + 1 token that stands for a character of a span."""
    begins, ends = placed.places[:, 0], placed.places[:, 1]
    inside = np.flatnonzero((begins < ends) & (begins < span[1]) & (ends > span[0]))
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
