"""What an LLM reranker reads of a pair: both texts under their letters, and a question at the end.

Source: FlagEmbedding, inference/reranker/decoder_only: bos, ``A: query``, a line's end, ``B: passage``, a
line's end and the prompt, all tokenised apart. The query keeps query_max_length tokens, the passage
max_length; what stands before the last separator is cut to max_length and the tokens of a separator and the
prompt, so that a row has at most max_length + 2 (separator + prompt) tokens. Nothing ends it.
"""

from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from bge_ray.errors import ModelError
from bge_ray.model.feed.pairs import Ids, PairLimits, PairTemplate

SEPARATOR = "\n"
QUERY_LETTER, PASSAGE_LETTER = "A: ", "B: "
YES_OR_NO = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by "
    "providing a prediction of either 'Yes' or 'No'."
)
PREDICT = "Predict whether passage B contains an answer to query A."

# Whether a row begins with the tokenizer's first token: always, or where it has one that is not its padding.
Beginning: TypeAlias = Literal["always", "if_distinct"]


def prompt_template(
    tokenizer: Any, prompt: str, folder: Path, *, beginning: Beginning, has_types: bool = False
) -> PairTemplate:
    """Return what stands around query and passage.

    Args:
        tokenizer: as `load_tokenizer` returns it.
        prompt: the question after the passage.
        folder: of the model, for messages.
        beginning: whether a row begins with the tokenizer's first token.
        has_types: the model is told where the passage begins.

    Raises:
        ModelError: the tokenizer lacks the first token, or has none for the prompt.
    """
    bos = tokenizer.bos_token_id
    if beginning == "always" and bos is None:
        raise ModelError(f"{folder}: its tokenizer has no bos_token, with which each of its rows begins")
    begins = bos is not None and (beginning == "always" or bos != tokenizer.pad_token_id)
    separator = _ids(tokenizer, SEPARATOR)
    question = _ids(tokenizer, prompt)
    if not len(question):
        raise ModelError(f"rerank.prompt {prompt!r}: is no token to the tokenizer of {folder}")
    return PairTemplate(
        head=np.asarray([bos] if begins else [], dtype=np.int32),
        middle=separator,
        tail=np.concatenate([separator, question]),
        has_types=has_types,
    )


def prompt_limits(template: PairTemplate, max_length: int, query_max_length: int) -> PairLimits:
    """Return the most tokens of query, passage and pair, of which the tail is never cut."""
    return PairLimits(query_max_length, max_length, max_length + 2 * len(template.tail))


def _ids(tokenizer: Any, text: str) -> Ids:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    return np.asarray(backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)
