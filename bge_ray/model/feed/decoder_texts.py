"""Texts to token ids for embedders that pool the last token: what a text ends with is seen to here.

Queries of a model that learns from examples are cut and joined as FlagEmbedding does it (inference/embedder/
decoder_only/icl.py): the query is cut to its share and decoded again, so that what stands behind it stays.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bge_ray.errors import ModelError
from bge_ray.model.feed.ends import PROBE
from bge_ray.model.feed.pipeline import Expected
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.records.model import ModelSpec
from bge_ray.records.tokens import PackedTokens

# No prompt has as many tokens.
ANY_LENGTH = 1 << 20


class DecoderFeeder(TextFeeder):
    """The tokenizer of an LLM embedder with its template, examples, and first and last token."""

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        *,
        vocab_size: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the tokenizer of a model folder.

        Args:
            spec: of the model.
            folder: a folder that `fetch_model` returned.
            vocab_size: how many tokens the model knows, if that is known.
            trust_remote_code: run Python code found in the folder.

        Raises:
            ModelError: there is none, it is not a fast one, its vocabulary lacks the first or last token, or
                max_length has no room for a token of text.
        """
        before, self._behind = spec.around_query()
        super().__init__(
            folder,
            spec.max_length,
            query_instruction=before,
            passage_instruction=spec.passage_instruction,
            expected=Expected(vocab_size=vocab_size),
            trust_remote_code=trust_remote_code,
        )
        self._head, self._tail = self._missing_ends(spec)
        self._examples = "".join(
            f"<instruct>{e.instruction}\n<query>{e.query}\n<response>{e.response}\n\n" for e in spec.examples
        )
        self._joins = bool(self._behind or self._examples)
        # By these literal tokens, whatever the vocabulary calls its own.
        self._query_room = spec.max_length - self._n_tokens("<s>") - self._n_tokens(f"{self._behind}</s>")
        room = spec.max_length - self._tokenizer.num_special_tokens_to_add() - self._added
        if room < 1 or (self._joins and self._query_room < 1):
            raise ModelError(f"model.max_length {spec.max_length} leaves no room beside the special tokens")

    def queries(self, texts: Sequence[str]) -> PackedTokens:
        """Tokenise n queries in their template, each cut to max_length tokens, examples not counted."""
        if not self._joins:
            return super().queries(texts)
        filled = [self._query_instruction + text for text in texts]
        cut = self._cutter.cut(filled, self._query_room, special_tokens=False)
        rows = [cut.input_ids[a:b].tolist() for a, b in zip(cut.offsets[:-1], cut.offsets[1:], strict=True)]
        decoded = self._tokenizer.batch_decode(rows)
        around = self._n_tokens(self._examples) + self._n_tokens(self._behind)
        longest = (around + self._max_length + 8) // 8 * 8 + 8
        tokens = self._ended([self._examples + text + self._behind for text in decoded], longest)
        return PackedTokens(tokens.input_ids, tokens.offsets, tokens.truncated | cut.truncated)

    def _cut(self, instruction: str, texts: Sequence[str]) -> PackedTokens:
        return self._ended([instruction + text for text in texts], self._max_length)

    def uncut(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield all tokens of each text as it is, the first and the last token included."""
        for ids in super().uncut(texts):
            yield [*self._head.tolist(), *ids, *self._tail.tolist()]

    def _ended(self, texts: Sequence[str], max_length: int) -> PackedTokens:
        """Tokenise texts, each cut to max_length tokens, the first and the last token among them."""
        tokens = self._cutter.cut(texts, max_length - self._added, special_tokens=True)
        if not self._added:
            return tokens
        pieces = []
        for start, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
            pieces += [self._head, tokens.input_ids[start:end], self._tail]
        input_ids = np.concatenate([np.zeros(0, np.int32), *pieces])
        grown = np.arange(len(tokens) + 1, dtype=np.int32) * np.int32(self._added)
        return PackedTokens(input_ids, tokens.offsets + grown, tokens.truncated)

    @property
    def _added(self) -> int:
        return len(self._head) + len(self._tail)

    def _missing_ends(self, spec: ModelSpec) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return the ids to put before and behind what the tokenizer makes of a text; each none or one."""
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        ids = backend.encode(PROBE).ids
        missing = []
        for token, there in ((spec.first_token, ids[0]), (spec.last_token, ids[-1])):
            wanted = None if token is None else backend.token_to_id(token)
            if token is not None and wanted is None:
                raise ModelError(
                    f"{spec.name}: its vocabulary has no {token}, which every text begins or ends with"
                )
            missing.append(np.asarray([] if wanted in (None, there) else [wanted], dtype=np.int32))
        return missing[0], missing[1]

    def _n_tokens(self, text: str) -> int:
        """Return how many tokens a text has by itself."""
        return int(self._cutter.cut([text], ANY_LENGTH, special_tokens=False).lengths[0])
