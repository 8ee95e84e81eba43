"""How texts are cut into chunks, as a data set records it."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Boundary: TypeAlias = Literal["paragraph", "sentence", "token"]


@dataclass(frozen=True)
class Chunking:
    """All that decides where a text is cut.

    ``max_tokens`` are those that the model sees of a chunk, special tokens, instruction and title included;
    ``overlap_tokens`` the most that a chunk repeats of the one before; ``boundary`` where a chunk ends if it
    can; ``language`` whose abbreviations end no sentence. ``titles`` says whether every chunk has the
    title in front or the first only. ``rules`` names the version of the code that finds the borders. With
    ``late`` a chunk's vector is made of its tokens' states among those of a window, see `model.feed.windows`.
    """

    max_tokens: int
    overlap_tokens: int
    boundary: Boundary
    language: str
    titles: Literal["every", "first"]
    keep_text: bool
    rules: str
    late: bool = False
