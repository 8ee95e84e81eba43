"""Texts to chunks that a model sees whole: cut where sentences end, counted in the model's own tokens.

A text is taken apart into atoms (paragraphs, sentences, lines, words, tokens: each only as far as needed),
atoms are packed into chunks, and each chunk is tokenised as the text that it is. That last count decides:
whatever the tokens of the atoms added up to, a chunk has at most as many as were asked for.
"""

import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bge_ray.errors import ModelError
from bge_ray.model.feed.sentences import sentence_ends
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.feed.windows import RULES as WINDOW_RULES
from bge_ray.model.feed.windows import Span, Window, windows
from bge_ray.records.chunking import Chunking
from bge_ray.records.ids import MAX_CHUNKS_PER_ROW, IdArray
from bge_ray.records.tokens import PackedTokens, TokenSpans

# Tokens of text that there must be room for: the longest thing that is never cut takes a few (an emoji).
MIN_ROOM = 16
# Longer texts are taken apart before anything of them is tokenised, in pieces no longer than this.
WHOLE_CHARS = 20_000
# A text with more characters to a token than this hardly fits: it is not tokenised whole to find out.
MOST_CHARS_PER_TOKEN = 8
# Changes with any change here or in `sentences` that moves a border; the library's are found by its version.
RULES = 2

_PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
_LINE_END = re.compile(r"\n\s*")
_WORD_END = re.compile(r"\s+")
_ZERO_WIDTH_JOINER = "\u200d"


@dataclass(frozen=True)
class Atom:
    """A piece of a text that is not cut if it fits, and how many tokens it has on its own."""

    start: int
    stop: int
    tokens: int


@dataclass(frozen=True)
class Chunks:
    """The m chunks of some texts, in order.

    ``texts`` (m,) says which text each is of, ``numbers`` (m,) which chunk of it, ``spans`` (m, 2) where it
    lies in it: first and last + 1 character. ``tokens`` are what the model gets; ``truncated`` in them says
    whose title was cut, ``read`` are the texts of those tokens. Late chunks have ``spans`` in their tokens,
    whose rows are windows, and in ``read`` what names window and chunk. ``too_many`` tells of the texts that
    have no chunk here how many they would have.
    """

    texts: IdArray
    numbers: IdArray
    spans: npt.NDArray[np.int64]
    tokens: PackedTokens
    read: list[str]
    too_many: dict[int, int]


class Chunker:
    """Cuts passages for one encoder; not thread-safe."""

    def __init__(self, feeder: TextFeeder, rules: Chunking) -> None:
        """Take what feeds the encoder with whole passages, and how to cut.

        Raises:
            ModelError: beside instruction and special tokens there is room for next to nothing.
        """
        self._feeder = feeder
        self._rules = rules
        self._instruction = feeder.passage_instruction
        self._room = rules.max_tokens - len(next(feeder.uncut([self._instruction])))
        if self._room < MIN_ROOM:
            raise ModelError(
                f"chunking.max_tokens {rules.max_tokens}: leaves {max(0, self._room)} tokens for text beside "
                f"the special tokens and the instruction, {MIN_ROOM} are the least; raise it"
            )

    def cut(self, titles: Sequence[str], texts: Sequence[str]) -> Chunks:
        """Cut n texts, each with its title ("" for none)."""
        ids: list[list[int]] = []
        spans: list[Span] = []
        which: list[int] = []
        numbers: list[int] = []
        cut_titles: list[bool] = []
        read: list[str] = []
        laid: list[Window] = []
        too_many: dict[int, int] = {}
        whole = self._whole(titles, texts)
        for n, (title, text) in enumerate(zip(titles, texts, strict=True)):
            cut_title = False
            if (found := whole[n]) is not None:
                pieces = [found]
            else:
                title, cut_title = self._fitting(title)
                estimated, pieces = self._cut_long(title, text)
                if not pieces:
                    too_many[n] = estimated
            which += [n] * len(pieces)
            numbers += range(len(pieces))
            spans += [span for span, _ in pieces]
            if not self._rules.late:
                ids += [tokens for _, tokens in pieces]
                read += [self._read(self._title_of(k, title), text, s) for k, (s, _) in enumerate(pieces)]
                cut_titles += [cut_title] * len(pieces)
            elif pieces:
                own = self._windows(title, text, pieces)
                laid += own
                ids += [window.ids for window in own]
                read += [name for window in own for name in window.names]
                cut_titles += [cut_title] * len(own)
        tokens = self._feeder.laid_out(ids, np.asarray(cut_titles, np.bool_))
        if self._rules.late:
            tokens = dataclasses.replace(tokens, spans=TokenSpans.of([window.borders for window in laid]))
        return Chunks(
            np.asarray(which, np.int64),
            np.asarray(numbers, np.int64),
            np.asarray(spans, np.int64).reshape(-1, 2),
            tokens,
            read,
            too_many,
        )

    def _windows(self, title: str, text: str, pieces: Sequence[tuple[Span, list[int]]]) -> list[Window]:
        """Return the windows of the chunks of a text."""
        return list(
            windows(
                [span for span, _ in pieces],
                [len(ids) for _, ids in pieces],
                self._rules.max_tokens - self._room,
                self._feeder.max_length,
                lambda number, span: self._read(self._title_of(number, title), text, span),
                self._feeder.placed,
            )
        )

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._feeder.bare(texts)]

    def _whole(self, titles: Sequence[str], texts: Sequence[str]) -> list[tuple[Span, list[int]] | None]:
        """Return span and tokens of each text that is one chunk, tokenised this once; None for the others."""
        most = min(WHOLE_CHARS, MOST_CHARS_PER_TOKEN * self._rules.max_tokens)
        short = [n for n, text in enumerate(texts) if len(titles[n]) + len(text) <= most]
        spans = [_trimmed(texts[n], (0, len(texts[n]))) for n in short]
        encoded = self._feeder.uncut(
            [self._read(titles[n], texts[n], s) for n, s in zip(short, spans, strict=True)]
        )
        found: list[tuple[Span, list[int]] | None] = [None] * len(texts)
        for n, span, ids in zip(short, spans, encoded, strict=True):
            if len(ids) <= self._rules.max_tokens:
                found[n] = (span, ids)
        return found

    def _read(self, title: str, text: str, span: Span) -> str:
        """Return what the model reads of a chunk."""
        return self._instruction + f"{title} {text[span[0] : span[1]]}".strip()

    def _title_of(self, number: int, title: str) -> str:
        """Return what stands in front of a chunk."""
        return title if self._rules.titles == "every" or number == 0 else ""

    def _fitting(self, title: str) -> tuple[str, bool]:
        """Return a title, cut if it would take more than half of a chunk, and whether it was."""
        most = self._room // 2
        head = title[:WHOLE_CHARS]
        offsets = self._feeder.places(head)
        if len(offsets) <= most:
            return head, len(head) < len(title)
        return head[: offsets[most - 1][1]].rstrip(), True

    def _cut_long(self, title: str, text: str) -> tuple[int, list[tuple[Span, list[int]]]]:
        """Return how many chunks a text has, and span and tokens of each; none if there are too many."""
        taken = self._lengths([title])[0] if title else 0
        first_room = self._room - taken
        room = first_room if self._rules.titles == "every" else self._room
        spans = self._spans(text, (0, len(text)), room, first_room)
        if len(spans) > MAX_CHUNKS_PER_ROW:
            return len(spans), []
        chunks = _rising(self._checked(title, text, spans or [(0, 0)], room))
        return len(chunks), chunks if len(chunks) <= MAX_CHUNKS_PER_ROW else []

    def _spans(self, text: str, span: Span, room: int, first_room: int) -> list[Span]:
        """Cut a piece of a text; what is nothing but white space is left out."""
        atoms = self._atoms(text, span, min(room, first_room))
        packed = _packed(atoms, room, first_room, self._rules.overlap_tokens)
        return [found for found in (_trimmed(text, s) for s in packed) if found[0] < found[1]]

    def _checked(
        self, title: str, text: str, spans: Sequence[Span], room: int, *, first: bool = True
    ) -> Iterator[tuple[Span, list[int]]]:
        """Yield chunks with their tokens; what has too many on its own is cut again, for less room."""
        titled = [self._title_of(n if first else n + 1, title) for n in range(len(spans))]
        encoded = self._feeder.uncut([self._read(t, text, s) for t, s in zip(titled, spans, strict=True)])
        for n, (span, ids) in enumerate(zip(spans, encoded, strict=True)):
            excess = len(ids) - self._rules.max_tokens
            if excess <= 0:
                yield span, ids
                continue
            less = max(1, room - max(excess, room // 8))
            pieces = self._spans(text, span, less, less)
            yield from self._checked(title, text, pieces, less, first=first and n == 0)

    def _atoms(self, text: str, span: Span, room: int) -> list[Atom]:
        """Take a piece of a text apart, each part only as far as it has to be to fit."""
        levels: list[Callable[[str, Span], list[Span]]] = [_paragraphs, self._sentences, _lines, _words]
        levels = levels[{"paragraph": 0, "sentence": 1, "token": len(levels)}[self._rules.boundary] :]
        parts: list[Atom | Span] = [span]
        for level in levels:
            parts = [
                piece for part in parts for piece in ([part] if isinstance(part, Atom) else level(text, part))
            ]
            parts = self._counted(text, parts, room)
        atoms: list[Atom] = []
        for part in parts:
            atoms += [part] if isinstance(part, Atom) else self._tokens(text, part, room)
        return atoms

    def _counted(self, text: str, parts: Sequence[Atom | Span], room: int) -> list[Atom | Span]:
        """Return the same, those that fit as atoms."""
        able = [n for n, p in enumerate(parts) if not isinstance(p, Atom) and p[1] - p[0] <= WHOLE_CHARS]
        counted: list[Atom | Span] = list(parts)
        spans = [parts[n] for n in able]
        strings = [text[s[0] : s[1]] for s in spans if not isinstance(s, Atom)]
        for n, tokens in zip(able, self._lengths(strings), strict=True):
            part = parts[n]
            if not isinstance(part, Atom) and tokens <= room:
                counted[n] = Atom(*part, tokens)
        return counted

    def _sentences(self, text: str, span: Span) -> list[Span]:
        ends = sentence_ends(self._rules.language, text[span[0] : span[1]])
        return _parts(span, (span[0] + end for end in ends))

    def _tokens(self, text: str, span: Span, room: int) -> list[Atom]:
        """Return the tokens of a piece of a text; what belongs to one character stays together if it fits."""
        atoms: list[Atom] = []
        for start in range(span[0], span[1], WHOLE_CHARS):
            window = (start, min(start + WHOLE_CHARS, span[1]))
            begins = sorted(start + begin for begin, _ in self._feeder.places(text[window[0] : window[1]]))
            for atom in _at_edges(window, begins, lambda place: not _joins(text, place)):
                if atom.tokens <= room:
                    atoms.append(atom)
                else:
                    inner = [b for b in begins if atom.start <= b < atom.stop]
                    atoms += _at_edges((atom.start, atom.stop), inner, lambda _: True)
        return atoms


def splitting_rules(*, late: bool = False) -> str:
    """Return the name of the rules by which this version finds borders, and with late chunks windows."""
    from importlib.metadata import version

    rules = f"{RULES}, sentencex {'.'.join(version('sentencex').split('.')[:2])}"
    return f"{rules}, windows {WINDOW_RULES}" if late else rules


def _packed(atoms: Sequence[Atom], room: int, first_room: int, overlap: int) -> Iterator[Span]:
    """Yield the spans of chunks: as many atoms as fit, each chunk beginning inside the one before it.

    A chunk repeats whole atoms of at most ``overlap`` tokens, and fewer where the next would not fit beside
    them. An atom that is larger than the room is a chunk.
    """
    first = stop = 0
    space = first_room
    while stop < len(atoms):
        size = sum(atom.tokens for atom in atoms[first:stop])
        while first < stop and size + atoms[stop].tokens > space:
            size -= atoms[first].tokens
            first += 1
        begin, known = first, stop
        while stop < len(atoms) and (stop == known or size + atoms[stop].tokens <= space):
            size += atoms[stop].tokens
            stop += 1
        yield atoms[begin].start, atoms[stop - 1].stop
        space = room
        first, repeated = stop, 0
        while overlap and first > begin + 1 and repeated + atoms[first - 1].tokens <= overlap:
            first -= 1
            repeated += atoms[first].tokens


def _rising(chunks: Iterable[tuple[Span, list[int]]]) -> list[tuple[Span, list[int]]]:
    """Return chunks without those that a neighbour holds whole.

    Such are the end of one that was cut again, and one that has only white space to add to what it repeats.
    """
    kept: list[tuple[Span, list[int]]] = []
    for span, ids in chunks:
        if kept and span[1] <= kept[-1][0][1]:
            continue
        while kept and kept[-1][0][0] >= span[0]:
            kept.pop()
        kept.append((span, ids))
    return kept


def _at_edges(span: Span, begins: Sequence[int], may_cut: Callable[[int], bool]) -> list[Atom]:
    """Return a span cut where tokens begin (given in rising order), with the tokens of each part."""
    edges = [span[0], *(b for b in dict.fromkeys(begins) if b > span[0] and may_cut(b)), span[1]]
    counts = np.diff(np.searchsorted(begins, [*edges[:-1], span[1] + 1]))
    return [Atom(a, b, int(n)) for (a, b), n in zip(itertools.pairwise(edges), counts, strict=True)]


def _paragraphs(text: str, span: Span) -> list[Span]:
    return _parts(span, (found.end() for found in _PARAGRAPH_END.finditer(text, *span)))


def _lines(text: str, span: Span) -> list[Span]:
    return _parts(span, (found.end() for found in _LINE_END.finditer(text, *span)))


def _words(text: str, span: Span) -> list[Span]:
    return _parts(span, (found.end() for found in _WORD_END.finditer(text, *span)))


def _parts(span: Span, ends: Iterator[int]) -> list[Span]:
    """Return a span cut at places inside it, given in rising order."""
    edges = [span[0], *(end for end in ends if span[0] < end < span[1]), span[1]]
    return list(itertools.pairwise(edges))


def _trimmed(text: str, span: Span) -> Span:
    """Return a span without white space at its ends; empty if there is nothing else."""
    piece = text[span[0] : span[1]]
    start = span[0] + len(piece) - len(piece.lstrip())
    return start, max(start, span[0] + len(piece.rstrip()))


def _joins(text: str, place: int) -> bool:
    """Tell whether the character at a place belongs to the one before it."""
    if not 0 < place < len(text):
        return False
    here = text[place]
    return (
        unicodedata.combining(here) != 0
        or unicodedata.category(here) in ("Mn", "Me", "Mc")
        or here == _ZERO_WIDTH_JOINER
        or text[place - 1] == _ZERO_WIDTH_JOINER
        or "\U0001f3fb" <= here <= "\U0001f3ff"  # skin tones
    )
