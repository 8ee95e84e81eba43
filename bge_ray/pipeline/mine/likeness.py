"""How much two texts have in common, by their words alone."""

import re
import unicodedata

# Scripts that put no blanks between words: Thai to Khmer, and what is written in China and Japan.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNSPACED += r"\U00020000-\U0003ffff"
_WORDS = re.compile(rf"[{_UNSPACED}]+|[^\W{_UNSPACED}]+")
_UNSPACED_RUN = re.compile(rf"[{_UNSPACED}]+")
_FIRST_UNSPACED = "\u0e00"
_ASCII_WORDS = re.compile(r"\w+", re.ASCII)


def words(text: str) -> frozenset[str]:
    """Return the different words of a text, whatever their case, width and accents' encoding.

    A run of a script without blanks gives its pairs of neighbouring characters.
    """
    if text.isascii():
        return frozenset(_ASCII_WORDS.findall(text.lower()))
    found: set[str] = set()
    for word in _WORDS.findall(unicodedata.normalize("NFKC", text).casefold()):
        if len(word) > 2 and word[0] >= _FIRST_UNSPACED and _UNSPACED_RUN.fullmatch(word):
            found.update(word[i : i + 2] for i in range(len(word) - 1))
        else:
            found.add(word)
    return frozenset(found)


def overlap(one: frozenset[str], two: frozenset[str]) -> float:
    """Return the part of the words of both that both have, in [0, 1]; 0 where neither has any."""
    either = len(one | two)
    return len(one & two) / either if either else 0.0
