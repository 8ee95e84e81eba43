"""How often a text has each token: the output that BM25 is made of. It takes a tokenizer and no model."""

import time
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from bge_ray.model.feed.texts import load_tokenizer
from bge_ray.model.run.batching import token_budget_batches
from bge_ray.model.run.result import Block, Result
from bge_ray.records.ids import IdArray
from bge_ray.records.model import BM25, ModelSpec
from bge_ray.records.outputs import Output
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import Auto

# Counted at once; numpy holds each token a few times.
COUNTED_TOKENS = 1_000_000


class TermCounter:
    """Counts the tokens of rows; special ones stand for no part of a text, and have no count."""

    def __init__(self, output: Output, left_out: Collection[int], n_skipped: int = 0) -> None:
        """Take what is made, and what is not counted.

        Args:
            output: of which ``dim`` is above every token.
            left_out: ids of tokens that are not counted.
            n_skipped: of the other tokens of a row so many at its start are not counted: an instruction.
        """
        self.output = output
        self._left_out = np.zeros(output.dim, np.bool_)
        self._left_out[list(left_out)] = True
        self._n_skipped = n_skipped

    def block(self, tokens: PackedTokens, rows: IdArray) -> Block:
        """Return the counts of (m,) rows of n."""
        some = tokens.take(rows)
        row_of = np.repeat(np.arange(len(rows)), some.lengths)
        kept = ~self._left_out[some.input_ids]
        if self._n_skipped:
            number = np.cumsum(kept)
            before = np.concatenate([np.zeros(1, np.int64), number])[some.offsets[:-1]]
            kept &= number - np.repeat(before, some.lengths) > self._n_skipped
        keys, counts = np.unique(row_of[kept] * self.output.dim + some.input_ids[kept], return_counts=True)
        of_row = keys // self.output.dim
        largest = np.zeros(len(rows), np.float32)
        np.maximum.at(largest, of_row, counts.astype(np.float32))
        return Block(
            values=np.minimum(counts, np.finfo(self.output.dtype).max).astype(self.output.dtype),
            largest=largest,
            lengths=np.bincount(of_row, minlength=len(rows)).astype(np.int64),
            indices=(keys % self.output.dim).astype(np.int32),
        )

    def column(self, tokens: PackedTokens) -> pa.Array:
        """Return the counts of n rows as `Output.type` holds them."""
        rows = np.arange(len(tokens), dtype=np.int64)
        result = Result((self.output,), len(tokens))
        result.put(rows, [self.block(tokens, rows)])
        return result.columns()[self.output.name]


def term_counter(spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> TermCounter:
    """Return what counts the tokens of texts behind a spec's instruction for passages, without its own.

    Raises:
        ModelError: there is no fast tokenizer.
        KeyError: the spec has no such output.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    left_out = set(tokenizer.all_special_ids)
    # Without blanks at its end, which are a token of their own only where no word follows.
    instruction = tokenizer.backend_tokenizer.encode(
        spec.passage_instruction.rstrip(), add_special_tokens=False
    )
    n_skipped = sum(token not in left_out for token in instruction.ids)
    return TermCounter(spec.output(BM25), left_out, n_skipped)


class TermModel:
    """What counts where nothing else is made: stands in for a `Model`, without torch and without weights."""

    def __init__(self, spec: ModelSpec, folder: Path, *, trust_remote_code: bool) -> None:
        """Take a spec of counts alone.

        Raises:
            ModelError: there is no fast tokenizer.
        """
        self.spec = spec
        self._counter = term_counter(spec, folder, trust_remote_code=trust_remote_code)

    def settle_budget(self, asked: int | Auto) -> int:
        """Return how many tokens are counted at once."""
        return COUNTED_TOKENS if asked == "auto" else asked

    def cut(self, tokens: PackedTokens, budget: int) -> list[IdArray]:
        """Cut n rows into batches, as `Model.cut`."""
        return token_budget_batches(tokens.lengths, budget, packed=True)

    def empty_result(self, n_rows: int) -> Result:
        """Return a result of n rows that `run` fills."""
        return Result(self.spec.outputs, n_rows)

    def warm_up(self, budget: int) -> None:
        """Do nothing: there is nothing to compile or to claim."""

    def run(self, tokens: PackedTokens, batches: Sequence[IdArray], result: Result) -> None:
        """Count the tokens of the rows of the given batches into ``result``, as `Model.run`."""
        started = time.perf_counter()
        for rows in batches:
            result.put(rows, [self._counter.block(tokens, rows)])
            result.batches += 1
            result.padded_tokens += int(tokens.lengths_of(rows).sum())
        result.busy_s += time.perf_counter() - started
