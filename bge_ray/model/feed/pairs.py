"""(query, passage) pairs to packed token ids, cut and joined as FlagReranker does it.

The query keeps at most 3/4 of max_length, the passage gives way to the rest (``only_second``), and
the special tokens and segment types are those of the tokenizer's own pair template.
Source: FlagEmbedding, inference/reranker/encoder_only/base.py, 1.3 and transformers 4's prepare_for_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bge_ray.errors import ModelError
from bge_ray.model.feed.texts import Cutter, load_tokenizer
from bge_ray.records.tokens import PackedTokens

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PairTemplate:
    """Special tokens before the query, between query and passage, and after the passage."""

    head: Ids
    middle: Ids
    tail: Ids
    has_types: bool

    @property
    def n_special(self) -> int:
        """Special tokens of one pair."""
        return len(self.head) + len(self.middle) + len(self.tail)


class PairFeeder:
    """The tokenizer of a cross-encoder, which joins pairs; not thread-safe."""

    def __init__(self, folder: Path, max_length: int, *, trust_remote_code: bool = False) -> None:
        """Load the tokenizer of a model folder.

        Raises:
            ModelError: there is no fast tokenizer, its pair template is of another kind, or max_length
                leaves no room for a passage behind a long query.
        """
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        self._template = read_template(tokenizer, folder)
        self._max_length = max_length
        self._query_max_length = max_length * 3 // 4
        if self._query_max_length < 1 or self._query_max_length + self._template.n_special >= max_length:
            raise ModelError(
                f"rerank.max_length {max_length} leaves no room for a passage behind a query of "
                f"{self._query_max_length} tokens and {self._template.n_special} special tokens"
            )
        self._cutter = Cutter(tokenizer)

    def pairs(self, queries: Sequence[str], passages: Sequence[str]) -> PackedTokens:
        """Tokenise n pairs; a text that occurs in several is tokenised once.

        Args:
            queries: n texts.
            passages: n texts.

        Returns:
            n rows; ``truncated`` says whether tokens of the query or the passage were left out.
        """
        if len(queries) != len(passages):
            raise ValueError(f"{len(queries)} queries and {len(passages)} passages are no pairs")
        query_rows, query_tokens = self._cut_once(queries, self._query_max_length)
        passage_rows, passage_tokens = self._cut_once(passages, self._max_length)
        template = self._template
        pieces: list[Ids] = []
        lengths = np.zeros(len(queries), dtype=np.int64)
        type_starts = np.zeros(len(queries), dtype=np.int32)
        truncated = query_tokens.truncated[query_rows] | passage_tokens.truncated[passage_rows]
        for row, (q, p) in enumerate(zip(query_rows, passage_rows, strict=True)):
            query = _row(query_tokens, q)
            room = self._max_length - template.n_special - len(query)
            passage = _row(passage_tokens, p)
            truncated[row] |= len(passage) > room
            pieces += [template.head, query, template.middle, passage[:room], template.tail]
            type_starts[row] = len(template.head) + len(query) + len(template.middle)
            lengths[row] = type_starts[row] + min(len(passage), room) + len(template.tail)
        offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
        input_ids = np.concatenate([np.zeros(0, np.int32), *pieces])
        types = type_starts if template.has_types else None
        return PackedTokens(input_ids, offsets.astype(np.int32), truncated, types)

    def _cut_once(self, texts: Sequence[str], max_length: int) -> tuple[npt.NDArray[np.int64], PackedTokens]:
        """Return (n,) places among the distinct texts, and the tokens of those."""
        places: dict[str, int] = {}
        rows = np.asarray([places.setdefault(text, len(places)) for text in texts], dtype=np.int64)
        return rows, self._cutter.cut(list(places), max_length, special_tokens=False)


def read_template(tokenizer: Any, folder: Path) -> PairTemplate:
    """Read a tokenizer's pair template off a pair it joins.

    Raises:
        ModelError: query and passage do not follow each other whole, or the segment types do not
            change where the passage begins.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    joined = backend.encode("a", "a a")
    owners = [-1 if owner is None else owner for owner in joined.sequence_ids]
    ids = np.asarray(joined.ids, dtype=np.int32)
    of_query = np.flatnonzero(np.equal(owners, 0))
    of_passage = np.flatnonzero(np.equal(owners, 1))
    # FlagReranker leaves the segment types out unless the model's tokenizer names them.
    has_types = "token_type_ids" in tokenizer.model_input_names
    in_order = (
        len(of_query)
        and len(of_passage)
        and np.array_equal(of_query, np.arange(of_query[0], of_query[-1] + 1))
        and np.array_equal(of_passage, np.arange(of_passage[0], of_passage[-1] + 1))
        and of_query[-1] < of_passage[0]
    )
    if not in_order:
        raise ModelError(f"{folder}: its tokenizer joins pairs in a way that is not supported")
    types = np.asarray(joined.type_ids)
    if has_types and types.any() and not np.array_equal(types, np.arange(len(types)) >= of_passage[0]):
        raise ModelError(f"{folder}: its tokenizer gives segment types in a way that is not supported")
    return PairTemplate(
        head=ids[: of_query[0]],
        middle=ids[of_query[-1] + 1 : of_passage[0]],
        tail=ids[of_passage[-1] + 1 :],
        has_types=has_types and bool(types.any()),
    )


def _row(tokens: PackedTokens, row: int) -> Ids:
    return tokens.input_ids[tokens.offsets[row] : tokens.offsets[row + 1]]
