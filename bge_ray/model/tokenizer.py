"""Texts to packed token ids, on the CPU, exactly as the model's own tokenizer cuts them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from bge_ray.errors import ModelError
from bge_ray.schema import PackedTokens

# Texts beyond this many characters a token are tokenised by a prefix: the rest cannot matter.
PREFIX_CHARS_PER_TOKEN = 16
ENCODE_TEXTS = 1024


class Tokenizer:
    """A fast tokenizer with a fixed truncation; not thread-safe."""

    def __init__(self, folder: Path, max_length: int, *, trust_remote_code: bool = False) -> None:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"{folder}: has no fast tokenizer (tokenizer.json)")
        if max_length <= tokenizer.num_special_tokens_to_add():
            raise ModelError(f"model.max_length {max_length} leaves no room beside the special tokens")
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.enable_truncation(max_length)
        self._prefix_chars = PREFIX_CHARS_PER_TOKEN * max_length

    def tokenise(self, texts: Sequence[str]) -> PackedTokens:
        """Tokenise texts, special tokens included, each cut to max_length tokens."""
        ids: list[np.ndarray] = []
        truncated = np.zeros(len(texts), dtype=np.bool_)
        for start in range(0, len(texts), ENCODE_TEXTS):
            part = texts[start : start + ENCODE_TEXTS]
            encodings = self._backend.encode_batch_fast([text[: self._prefix_chars] for text in part])
            for row, (text, encoding) in enumerate(zip(part, encodings, strict=True)):
                if len(text) > self._prefix_chars and len(encoding.overflowing) < 2:
                    encoding = self._tokenise_long(text)
                ids.append(np.asarray(encoding.ids, dtype=np.int32))
                truncated[start + row] = bool(encoding.overflowing)
        offsets = np.zeros(len(texts) + 1, dtype=np.int32)
        np.cumsum([len(i) for i in ids], out=offsets[1:])
        return PackedTokens(np.concatenate(ids) if ids else np.zeros(0, np.int32), offsets, truncated)

    def _tokenise_long(self, text: str):  # type: ignore[no-untyped-def]  # tokenizers.Encoding has no stubs
        """Tokenise a text whose first prefix gave too few tokens (long words, white space), by longer ones.

        Two windows of overflow mean that the cut in the text lies well behind the last token kept.
        """
        chars = self._prefix_chars
        while True:
            chars *= 4
            encoding = self._backend.encode_batch_fast([text[:chars]])[0]
            if chars >= len(text) or len(encoding.overflowing) >= 2:
                return encoding
