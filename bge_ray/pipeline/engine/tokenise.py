"""Texts to token ids in a CPU task that loads no model, with the row that kills the tokenizer left out."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from bge_ray.model.feed.chunks import Chunker
from bge_ray.model.feed.pairs import PairFeeder
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.run.terms import TermCounter, TermModel, term_counter
from bge_ray.model.spec import model_folder, pair_feeder, text_feeder
from bge_ray.pipeline.engine.isolation import Attempt, run_isolated
from bge_ray.pipeline.engine.rows import Fault
from bge_ray.records.chunking import Chunking
from bge_ray.records.ids import IdArray
from bge_ray.records.model import Canary, ModelSpec
from bge_ray.records.tokens import PackedTokens

PIECE_ROWS = 1024

T = TypeVar("T")


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
    done, faults = in_pieces(attempt, prefix, n_rows, run)
    rows = np.concatenate([np.zeros(0, np.int64), *(piece for piece, _ in done)])
    return rows, PackedTokens.concatenate([tokens for _, tokens in done]), faults


def in_pieces(
    attempt: Attempt, prefix: str, n_rows: int, run: Callable[[IdArray], T]
) -> tuple[list[tuple[IdArray, T]], dict[int, Fault]]:
    """Do n texts piece by piece; see `tokenise`.

    Returns:
        The numbers of each piece, ascending, with what was made of it; and faults of the texts left out.
    """
    done: list[tuple[IdArray, T]] = []
    faults: dict[int, Fault] = {}

    def run_pieces(pieces: Sequence[IdArray]) -> None:
        done.extend((piece, run(piece)) for piece in pieces)

    def reject(row: int, detail: str) -> None:
        faults[row] = ("killed_worker", detail)

    everything = np.arange(n_rows, dtype=np.int64)
    pieces = [everything[i : i + PIECE_ROWS] for i in range(0, n_rows, PIECE_ROWS)]
    run_isolated(attempt, prefix, pieces, run_pieces, reject)
    return done, faults


@functools.lru_cache(maxsize=2)
def load_text_feeder(spec: ModelSpec, *, trust_remote_code: bool) -> TextFeeder:
    """Return what turns texts into an encoder's tokens; it is kept for the next task of this process."""
    # Ray counts one CPU for this task; the tokenizer's own threads would take the others, too.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return text_feeder(spec, trust_remote_code=trust_remote_code)


@functools.lru_cache(maxsize=2)
def load_query_counter(
    spec: ModelSpec, canaries: tuple[Canary, ...], *, trust_remote_code: bool
) -> tuple[TextFeeder, TermCounter]:
    """Return what counts the tokens of queries as those of passages were counted.

    Args:
        spec: of the data set's model, with counts as its only output.
        canaries: of the data set.
        trust_remote_code: run Python code found in the model folder.

    Raises:
        DatasetMismatchError: the tokenizer makes other tokens of the canaries' texts.
    """
    from bge_ray.model.canary import check_canaries

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder = model_folder(spec)
    model = TermModel(spec, folder, trust_remote_code=trust_remote_code)
    check_canaries(canaries, model, text_feeder(spec, trust_remote_code=trust_remote_code))
    # A query is counted as it is, whatever is put before it for the model.
    bare = dataclasses.replace(
        spec, query_instruction="", passage_instruction="", query_template="", examples=()
    )
    counter = term_counter(bare, folder, trust_remote_code=trust_remote_code)
    return text_feeder(bare, trust_remote_code=trust_remote_code), counter


@functools.lru_cache(maxsize=2)
def load_chunker(spec: ModelSpec, rules: Chunking, *, trust_remote_code: bool) -> Chunker:
    """Return what cuts texts for an encoder; see `load_text_feeder`, of which it has its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Chunker(text_feeder(spec, trust_remote_code=trust_remote_code), rules)


@functools.lru_cache(maxsize=2)
def load_pair_feeder(spec: ModelSpec, *, trust_remote_code: bool) -> PairFeeder:
    """Return what turns pairs into a reranker's tokens; see `load_text_feeder`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return pair_feeder(spec, trust_remote_code=trust_remote_code)
