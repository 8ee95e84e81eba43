"""Token ids of texts word by word, from a table of words seen before; exactly those of the whole text.

A tokenizer that splits at white space and punctuation before all else makes the same tokens of a word
wherever it stands. Language repeats its words, so most of a text's tokens are looked up, and the tokenizer
itself is asked for the others alone.
"""

import json
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

# What BERT's tokenizer splits at, of the characters of ASCII; white space is no token, punctuation is.
_WORD = re.compile(r"[^ \t\n\r!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]")
# Scripts that put no spaces between words: a table of their sentences would hold each once.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\U00010000-\U0010ffff]"
)
# Words of a table, and the characters of the longest one it takes: what is longer is seldom seen again.
MOST_WORDS = 1 << 19
MOST_CHARS = 40
# A text of more characters a token of use is read word by word, and no further than it is of use.
CHARS_PER_TOKEN = 6


class Words(dict[str, tuple[int, ...]]):
    """The token ids of words by word; asks the tokenizer for those that it does not know yet.

    ``before`` and ``behind`` are the ids of the special tokens round every text.
    """

    def __init__(self, backend: Any, reserved: Iterable[str]) -> None:
        """Take a tokenizer that neither cuts nor pads, and strings that it keeps whole."""
        super().__init__()
        self._backend = backend
        # One of them in a text makes tokens that are no part of a word.
        self._reserved = re.compile("|".join(map(re.escape, sorted(reserved))) or r"(?!)")
        bare, whole = (backend.encode("x", add_special_tokens=special).ids for special in (False, True))
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self.before: list[int] = whole[:at]
        self.behind: list[int] = whole[at + len(bare) :]

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._backend.encode(word, add_special_tokens=False).ids)
        if len(self) < MOST_WORDS and len(word) <= MOST_CHARS:
            self[word] = ids
        return ids

    def ids(self, text: str, most: int | None = None) -> list[int] | None:
        """Return the token ids of a text, without special ones; None where it is not for words.

        Args:
            text: of any length.
            most: how many are of use; of a text that has more, some more may be returned, and need not be.
        """
        if self._reserved.search(text) or (not text.isascii() and _UNSPACED.search(text)):
            return None
        if most is None or len(text) <= CHARS_PER_TOKEN * most:
            return list(chain.from_iterable(map(self.__getitem__, _WORD.findall(text))))
        found: list[int] = []
        for match in _WORD.finditer(text):
            found += self[match[0]]
            if len(found) >= most:
                break
        return found


def words_of(backend: Any) -> Words | None:
    """Return the table for a tokenizer; None if it is not known to split texts into words before all else.

    Args:
        backend: of the tokenizers library; it is left as it is.
    """
    from tokenizers import Tokenizer

    added = backend.get_added_tokens_decoder().values()
    # One that is sought in the normalised text is not found in the text as it stands.
    if not _splits_as_bert(backend) or any(token.normalized for token in added):
        return None
    own = Tokenizer.from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    return Words(own, [token.content for token in added])


def _splits_as_bert(backend: Any) -> bool:
    """Tell whether a tokenizer splits as BERT's, after normalising one character at a time."""
    from tokenizers import models, pre_tokenizers

    if not isinstance(backend.model, models.WordPiece):
        return False
    normalizer = json.loads(backend.normalizer.__getstate__()) if backend.normalizer is not None else {}
    parts = normalizer.get("normalizers", [normalizer] if normalizer else [])
    by_character = {part["type"] for part in parts} <= {"Lowercase", "BertNormalizer"}
    return by_character and isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
