"""(query, passage) pairs to packed token ids, cut and joined as FlagReranker does it.

The query keeps at most 3/4 of max_length, and the passage gives way to the rest (``only_second``). A
cross-encoder's special tokens and segment types are those of its tokenizer's own pair template; an LLM
reranker's are a prompt (`feed.prompts`).
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
    """Special tokens before the query, between query and passage, and after the passage.

    ``has_types``: the model is told where the passage begins.
    """

    head: Ids
    middle: Ids
    tail: Ids
    has_types: bool

    @property
    def n_special(self) -> int:
        """Special tokens of one pair."""
        return len(self.head) + len(self.middle) + len(self.tail)


@dataclass(frozen=True)
class PairLimits:
    """Most tokens of a query, of a passage, and of a pair with its special tokens; the passage gives way."""

    query: int
    passage: int
    pair: int


class PairFeeder:
    """The tokenizer of a reranker, which joins pairs; not thread-safe."""

    def __init__(
        self,
        tokenizer: Any,
        template: PairTemplate,
        limits: PairLimits,
        *,
        query_instruction: str = "",
        passage_instruction: str = "",
    ) -> None:
        """Take a tokenizer and how it joins pairs.

        Args:
            tokenizer: as `load_tokenizer` returns it.
            template: what stands around query and passage.
            limits: a query of ``limits.query`` tokens must leave room for a token of the passage.
            query_instruction: put before each query, and cut with it.
            passage_instruction: put before each passage.
        """
        self._template = template
        self._limits = limits
        self._instructions = (query_instruction, passage_instruction)
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
        template, limits = self._template, self._limits
        query_rows, query_tokens = self._cut_once(self._instructions[0], queries, limits.query)
        passage_rows, passage_tokens = self._cut_once(self._instructions[1], passages, limits.passage)
        pieces: list[Ids] = []
        lengths = np.zeros(len(queries), dtype=np.int64)
        type_starts = np.zeros(len(queries), dtype=np.int32)
        truncated = query_tokens.truncated[query_rows] | passage_tokens.truncated[passage_rows]
        for row, (q, p) in enumerate(zip(query_rows, passage_rows, strict=True)):
            query = _row(query_tokens, q)
            room = limits.pair - template.n_special - len(query)
            passage = _row(passage_tokens, p)
            truncated[row] |= len(passage) > room
            pieces += [template.head, query, template.middle, passage[:room], template.tail]
            type_starts[row] = len(template.head) + len(query) + len(template.middle)
            lengths[row] = type_starts[row] + min(len(passage), room) + len(template.tail)
        offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
        input_ids = np.concatenate([np.zeros(0, np.int32), *pieces])
        types = type_starts if template.has_types else None
        return PackedTokens(input_ids, offsets.astype(np.int32), truncated, types)

    def _cut_once(
        self, instruction: str, texts: Sequence[str], max_length: int
    ) -> tuple[npt.NDArray[np.int64], PackedTokens]:
        """Return (n,) places among the distinct texts, and the tokens of those behind an instruction."""
        places: dict[str, int] = {}
        rows = np.asarray([places.setdefault(text, len(places)) for text in texts], dtype=np.int64)
        distinct = [instruction + text for text in places]
        return rows, self._cutter.cut(distinct, max_length, special_tokens=False)


def tokenizer_pairs(
    folder: Path,
    max_length: int,
    query_max_length: int | None = None,
    *,
    query_instruction: str = "",
    passage_instruction: str = "",
    trust_remote_code: bool = False,
) -> PairFeeder:
    """Load the tokenizer of a model folder, which joins pairs by a template of its own.

    Args:
        folder: a folder that `fetch_model` returned.
        max_length: tokens of a pair, special tokens included.
        query_max_length: tokens kept of a query; None for three quarters of that.
        query_instruction: put before each query.
        passage_instruction: put before each passage.
        trust_remote_code: run Python code found in the folder.

    Raises:
        ModelError: there is no fast tokenizer, its pair template is of another kind, or max_length leaves no
            room for a passage behind a long query.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    template = read_template(tokenizer, folder)
    kept = query_share(max_length) if query_max_length is None else query_max_length
    if kept < 1 or kept + template.n_special >= max_length:
        raise ModelError(
            f"rerank.max_length {max_length} leaves no room for a passage behind a query of "
            f"{kept} tokens and {template.n_special} special tokens"
        )
    return PairFeeder(
        tokenizer,
        template,
        PairLimits(kept, max_length, max_length),
        query_instruction=query_instruction,
        passage_instruction=passage_instruction,
    )


def query_share(max_length: int) -> int:
    """Return how many tokens of a pair a query may take unless asked otherwise."""
    return max_length * 3 // 4


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
