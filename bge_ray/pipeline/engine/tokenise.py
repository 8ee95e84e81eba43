"""Texts to token ids in a CPU task that loads no model, with the row that kills the tokenizer left out."""

import functools
import os
from collections.abc import Callable, Sequence

import numpy as np

from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.spec import pair_feeder, text_feeder
from bge_ray.pipeline.engine.isolation import Attempt, run_isolated
from bge_ray.pipeline.engine.rows import Fault
from bge_ray.records.ids import IdArray
from bge_ray.records.model import ModelSpec
from bge_ray.records.tokens import PackedTokens

PIECE_ROWS = 1024


def tokenise(
    attempt: Attempt, prefix: str, n_rows: int, run: Callable[[IdArray], PackedTokens]
) -> tuple[IdArray, PackedTokens, dict[int, Fault]]:
    """Tokenise n texts piece by piece.

    Args:
        attempt: the attempt this is part of.
        prefix: makes the places of this call distinct within the attempt.
        n_rows: n.
        run: tokenises the texts of some numbers.

    Returns:
        The (m,) numbers of the texts that were tokenised, ascending; their tokens; and faults of the others.
    """
    done: list[tuple[IdArray, PackedTokens]] = []
    faults: dict[int, Fault] = {}

    def run_pieces(pieces: Sequence[IdArray]) -> None:
        done.extend((piece, run(piece)) for piece in pieces)

    def reject(row: int, detail: str) -> None:
        faults[row] = ("killed_worker", detail)

    everything = np.arange(n_rows, dtype=np.int64)
    pieces = [everything[i : i + PIECE_ROWS] for i in range(0, n_rows, PIECE_ROWS)]
    run_isolated(attempt, prefix, pieces, run_pieces, reject)
    rows = np.concatenate([everything[:0], *(piece for piece, _ in done)])
    return rows, PackedTokens.concatenate([tokens for _, tokens in done]), faults


@functools.lru_cache(maxsize=2)
def load_text_feeder(spec: ModelSpec, *, trust_remote_code: bool) -> TextFeeder:
    """Return what turns texts into an encoder's tokens; it is kept for the next task of this process."""
    # Ray counts one CPU for this task; the tokenizer's own threads would take the others, too.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return text_feeder(spec, trust_remote_code=trust_remote_code)


@functools.lru_cache(maxsize=2)
def load_pair_feeder(spec: ModelSpec, *, trust_remote_code: bool) -> PairFeeder:
    """Return what turns pairs into a reranker's tokens; see `load_text_feeder`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return pair_feeder(spec, trust_remote_code=trust_remote_code)
