"""Texts to packed token ids, on the CPU, exactly as the model's own tokenizer cuts them."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bge_ray.errors import ModelError, in_a_line
from bge_ray.model.feed.pipeline import NOTHING_EXPECTED, TOKENIZER_FILE, Expected, check_tokenizer, take_file
from bge_ray.model.feed.windows import Placed
from bge_ray.model.feed.words import words_of
from bge_ray.model.pointers import refuse_pointer
from bge_ray.records.tokens import PackedTokens

# A text beyond this many characters a token is tokenised by a prefix first. English has about 4.5.
PREFIX_CHARS_PER_TOKEN = 6
PREFIX_GROWTH = 4
# A prefix is as good as the text if the last token kept lies this far from its end. Words are split
# independently of each other, so a few of them are enough (the end itself may join with what follows);
# inside one word (Chinese has no spaces), so many tokens that no segmentation looks ahead that far.
# WordPiece calls a word of more than 100 characters unknown, so it never has this many tokens.
MARGIN_WORDS = 3
MARGIN_TOKENS = 256
ENCODE_TEXTS = 1024
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


class TextFeeder:
    """The tokenizer of an encoder with a fixed truncation and its instructions; not thread-safe.

    ``note`` says what a person should know of how texts are read; None if there is nothing.
    """

    def __init__(
        self,
        folder: Path,
        max_length: int,
        *,
        query_instruction: str = "",
        passage_instruction: str = "",
        lower_case: bool = False,
        pools_prompt: bool = True,
        expected: Expected = NOTHING_EXPECTED,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the tokenizer of a model folder.

        Args:
            folder: a folder that `fetch_model` returned.
            max_length: tokens kept of a text, special tokens and instruction included.
            query_instruction: put before each query.
            passage_instruction: put before each passage.
            lower_case: whether texts are lower-cased before all else.
            pools_prompt: whether the tokens of an instruction are pooled as the others are; where they are
                not, rows say how many they are.
            expected: what the model wants of its tokenizer.
            trust_remote_code: run Python code found in the folder.

        Raises:
            ModelError: there is none, it is not a fast one or another model's, or max_length has no room for
                a token of text.
        """
        tokenizer, self.note = open_tokenizer(folder, trust_remote_code=trust_remote_code)
        if max_length <= tokenizer.num_special_tokens_to_add():
            raise ModelError(f"model.max_length {max_length} leaves no room beside the special tokens")
        check_tokenizer(tokenizer, folder, expected)
        if lower_case:
            _lower_case(tokenizer.backend_tokenizer)
        self._tokenizer = tokenizer
        self._cutter = Cutter(tokenizer)
        self._max_length = max_length
        self._query_instruction = query_instruction
        self._passage_instruction = passage_instruction
        self._unpooled: dict[str, int] = {}
        if not pools_prompt:
            for instruction in {query_instruction, passage_instruction} - {""}:
                self._unpooled[instruction] = self._count(instruction, set(tokenizer.all_special_ids))

    @property
    def max_length(self) -> int:
        """Tokens kept of a text."""
        return self._max_length

    @property
    def passage_instruction(self) -> str:
        """What is put before each passage."""
        return self._passage_instruction

    def passages(self, texts: Sequence[str]) -> PackedTokens:
        """Tokenise n passages, special tokens included, each cut to max_length tokens."""
        return self._cut(self._passage_instruction, texts)

    def uncut(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield all tokens of each text as it is, without an instruction, special tokens included."""
        yield from self._cutter.ids(texts, special_tokens=True)

    def laid_out(self, ids: Sequence[Sequence[int]], truncated: npt.NDArray[np.bool_]) -> PackedTokens:
        """Lay what `uncut` gave of n passages with their instruction end to end."""
        return self._without_prompt(self._passage_instruction, PackedTokens.of(ids, truncated))

    def bare(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield all tokens of each text as it is, without an instruction and without special tokens."""
        yield from self._cutter.ids(texts, special_tokens=False)

    def places(self, text: str) -> list[tuple[int, int]]:
        """Return which characters of a text each of its tokens stands for, special tokens apart."""
        return self._cutter.places(text)

    def placed(self, text: str) -> Placed:
        """Return all tokens of a text as it is, special tokens included, and their characters."""
        return self._cutter.placed(text)

    def queries(self, texts: Sequence[str]) -> PackedTokens:
        """Tokenise n queries, special tokens included, each cut to max_length tokens."""
        return self._cut(self._query_instruction, texts)

    def _cut(self, instruction: str, texts: Sequence[str]) -> PackedTokens:
        if instruction:
            texts = [instruction + text for text in texts]
        tokens = self._cutter.cut(texts, self._max_length, special_tokens=True)
        return self._without_prompt(instruction, tokens)

    def _without_prompt(self, instruction: str, tokens: PackedTokens) -> PackedTokens:
        """Say of texts behind an instruction how many tokens of it are not pooled."""
        if instruction not in self._unpooled:
            return tokens
        n_left_out = np.full(len(tokens), self._unpooled[instruction], dtype=np.int32)
        return dataclasses.replace(tokens, prompt_tokens=n_left_out)

    def _count(self, instruction: str, special: set[int]) -> int:
        """Return how many tokens an instruction is, counted as sentence-transformers does."""
        # Alone, and without a special token at its end.
        ids = self._cutter.cut([instruction], self._max_length, special_tokens=True).input_ids
        n_tokens = len(ids) - (1 if int(ids[-1]) in special else 0)
        if n_tokens + 1 >= self._max_length:
            raise ModelError(
                f"model.max_length {self._max_length} leaves no room for a text behind the {n_tokens} tokens "
                f"of {instruction[:60]!r}, which are not pooled"
            )
        return n_tokens


class Cutter:
    """Tokenises and truncates with one backend, in bounded time and memory for texts of any length."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._side = tokenizer.truncation_side
        self._words = words_of(self._backend)

    def cut(self, texts: Sequence[str], max_length: int, *, special_tokens: bool) -> PackedTokens:
        """Tokenise texts, each cut to max_length tokens; ``truncated`` says which had more."""
        words = self._words if self._side == "right" else None
        before, behind = (words.before, words.behind) if words is not None and special_tokens else ([], [])
        room = max_length - len(before) - len(behind)
        ids: list[list[int]] = []
        truncated = np.zeros(len(texts), dtype=np.bool_)
        for start in range(0, len(texts), ENCODE_TEXTS):
            part = texts[start : start + ENCODE_TEXTS]
            known = [None if words is None else words.ids(text, room + 1) for text in part]
            others = [text for text, found in zip(part, known, strict=True) if found is None]
            asked = iter(self._asked(others, max_length, special_tokens))
            for row, found in enumerate(known):
                if found is None:
                    kept, truncated[start + row] = next(asked)
                else:
                    kept, truncated[start + row] = [*before, *found[:room], *behind], len(found) > room
                ids.append(kept)
        return PackedTokens.of(ids, truncated)

    def _asked(
        self, texts: Sequence[str], max_length: int, special_tokens: bool
    ) -> Iterator[tuple[list[int], bool]]:
        """Yield what the tokenizer itself makes of each text, and whether it had more."""
        self._backend.enable_truncation(max_length, direction=self._side)
        # What is cut off on the left depends on the whole text.
        prefix = PREFIX_CHARS_PER_TOKEN * max_length if self._side == "right" else None
        whole = [text if prefix is None or len(text) <= prefix else "" for text in texts]
        encodings = self._backend.encode_batch_fast(whole, add_special_tokens=special_tokens)
        for text, encoding in zip(texts, encodings, strict=True):
            if prefix is not None and len(text) > prefix:
                encoding = self._cut_long(text, prefix, special_tokens)
            kept = encoding.ids
            # Asking for the overflow copies it, and a short row has none.
            yield kept, len(kept) >= max_length and bool(encoding.overflowing)

    def ids(self, texts: Sequence[str], *, special_tokens: bool) -> Iterator[list[int]]:
        """Yield all tokens of each text."""
        words = self._words
        before, behind = (words.before, words.behind) if words is not None and special_tokens else ([], [])
        for start in range(0, len(texts), ENCODE_TEXTS):
            part = texts[start : start + ENCODE_TEXTS]
            known = [None if words is None else words.ids(text) for text in part]
            others = [text for text, found in zip(part, known, strict=True) if found is None]
            self._backend.no_truncation()
            asked = iter(self._backend.encode_batch_fast(others, add_special_tokens=special_tokens))
            for found in known:
                yield next(asked).ids if found is None else [*before, *found, *behind]

    def places(self, text: str) -> list[tuple[int, int]]:
        """Return the characters of each token of a text."""
        self._backend.no_truncation()
        found: list[tuple[int, int]] = self._backend.encode(text, add_special_tokens=False).offsets
        return found

    def placed(self, text: str) -> Placed:
        """Return all tokens of a text, special ones included, and the characters of each."""
        self._backend.no_truncation()
        encoding = self._backend.encode(text, add_special_tokens=True)
        places = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        places[np.asarray(encoding.special_tokens_mask, np.bool_)] = 0
        return Placed(encoding.ids, places)

    def _cut_long(self, text: str, chars: int, special_tokens: bool) -> Any:
        """Tokenise a text by prefixes, longer and longer until the rest cannot matter."""
        while chars < len(text):
            # Not the fast variant, which does not say which word a token is of.
            encoding = self._backend.encode(text[:chars], add_special_tokens=special_tokens)
            if _rest_is_irrelevant(encoding):
                return encoding
            chars *= PREFIX_GROWTH
        return self._backend.encode_batch_fast([text], add_special_tokens=special_tokens)[0]


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """Load the fast tokenizer of a model folder, which reads texts as its tokenizer.json says.

    Raises:
        ModelError: there is none, or it is not a fast one.
    """
    return open_tokenizer(folder, trust_remote_code=trust_remote_code)[0]


def open_tokenizer(folder: Path, *, trust_remote_code: bool) -> tuple[Any, str | None]:
    """Load a tokenizer as `load_tokenizer` does, and say what transformers would have made of it instead.

    Raises:
        ModelError: there is none, or it is not a fast one.
    """
    # Without these, transformers 5 makes a tokenizer that knows its special tokens and no word.
    if not any(path.is_file() for pattern in VOCABULARY_FILES for path in folder.glob(pattern)):
        raise ModelError(f"{folder}: has no tokenizer files ({', '.join(VOCABULARY_FILES)})")
    for path in (folder / TOKENIZER_FILE, folder / "tokenizer_config.json"):
        if path.is_file():
            refuse_pointer(path)
    from transformers import AutoTokenizer  # takes seconds, and whoever only names a stage needs none

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {in_a_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{folder}: has no fast tokenizer (tokenizer.json)")
    return tokenizer, take_file(tokenizer, folder)


def _lower_case(backend: Any) -> None:
    """Lower-case texts before all that a tokenizer does to them."""
    from tokenizers.normalizers import Lowercase, Sequence

    backend.normalizer = Sequence([Lowercase(), *([backend.normalizer] if backend.normalizer else [])])


def _rest_is_irrelevant(encoding: Any) -> bool:
    """Tell whether the tokens kept would be the same, and truncated, if the text went on."""
    words = [word for word in encoding.word_ids if word is not None]
    over = [word for window in encoding.overflowing for word in window.word_ids if word is not None]
    if not words or not over:
        return False
    return over[-1] - words[-1] >= MARGIN_WORDS or len(over) >= MARGIN_TOKENS
