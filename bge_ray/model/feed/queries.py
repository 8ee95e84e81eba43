"""Queries to vectors: the instruction in front, then the same tokenizer and encoder as the passages."""

from collections.abc import Sequence

from bge_ray.model.encoder import Encoded, Encoder
from bge_ray.model.feed.tokenizer import Tokenizer


def encode_queries(
    queries: Sequence[str], tokenizer: Tokenizer, encoder: Encoder, *, token_budget: int
) -> Encoded:
    """Encode queries with the instruction of the encoder's spec.

    Args:
        queries: n texts without an instruction.
        tokenizer: of the encoder's model folder.
        encoder: its spec says which instruction the model was trained with.
        token_budget: most tokens of one forward pass.

    Returns:
        n rows; a query without a vector is named in ``faults``.
    """
    tokens = tokenizer.tokenise(queries, instruction=encoder.spec.query_instruction)
    result = encoder.empty_result(len(queries))
    encoder.encode(tokens, encoder.cut(tokens.lengths, token_budget), result)
    return result
