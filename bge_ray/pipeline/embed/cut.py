"""Passages of a unit to the pieces that a model reads: whole texts, or their chunks; and their tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bge_ray.formats.rows import Passages
from bge_ray.pipeline.engine.isolation import Attempt
from bge_ray.pipeline.engine.rows import Fault, spread, with_faults
from bge_ray.pipeline.engine.tokenise import in_pieces, load_chunker, load_text_feeder, tokenise
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.ids import MAX_CHUNKS_PER_ROW, IdArray
from bge_ray.records.tokens import PackedTokens


@dataclass(frozen=True)
class Texts:
    """The texts of n passages of some units, and ``rows`` (n,), their rows in the table of these units."""

    rows: IdArray
    joined: list[str]
    bodies: list[str]
    titles: list[str]

    @staticmethod
    def of(parts: Sequence[tuple[int, Passages]]) -> "Texts":
        """Lay the passages of units end to end, each unit with the number of its first row in the table."""
        return Texts(
            np.concatenate([np.zeros(0, np.int64), *(passages.rows + first for first, passages in parts)]),
            [text for _, passages in parts for text in passages.texts],
            [body for _, passages in parts for body in passages.bodies],
            [title for _, passages in parts for title in passages.titles],
        )


@dataclass(frozen=True)
class Pieces:
    """The m pieces of some passages, in their order.

    ``passages`` (m,) says which passage each is of, ``numbers`` (m,) which piece of it, ``spans`` (m, 2)
    which characters of the text in the corpus. ``read`` is what the model reads, and of late chunks also
    where they are in it: what decides the vector. ``tokens``, with m results, are those of all pieces where
    cutting needed them, and None where texts are whole and nobody has tokenised them yet.
    """

    passages: IdArray
    numbers: IdArray
    spans: npt.NDArray[np.int64]
    read: list[str]
    tokens: PackedTokens | None


def cut_passages(
    attempt: Attempt, prefix: str, passages: Texts, spec: DatasetSpec, *, trust_remote_code: bool
) -> tuple[Pieces, dict[int, Fault]]:
    """Cut passages as the data set says; the passages that cannot be come back as faults.

    Args:
        attempt: the attempt this is part of.
        prefix: makes the places of this call distinct within the attempt.
        passages: the texts of n passages.
        spec: of the data set.
        trust_remote_code: of the tokenizer.

    Returns:
        The pieces, and faults by the number of the passage.
    """
    if spec.chunking is None:
        instruction = load_text_feeder(spec.model, trust_remote_code=trust_remote_code).passage_instruction
        n = len(passages.joined)
        lengths = np.asarray([len(body) for body in passages.bodies], np.int64)
        spans = np.stack([np.zeros(n, np.int64), lengths], axis=1)
        read = [instruction + text for text in passages.joined]
        return Pieces(np.arange(n, dtype=np.int64), np.zeros(n, np.int64), spans, read, None), {}
    faults: dict[int, Fault] = {}
    chunker = load_chunker(spec.model, spec.chunking, trust_remote_code=trust_remote_code)

    def cut(piece: IdArray) -> Pieces:
        chunks = chunker.cut([passages.titles[n] for n in piece], [passages.bodies[n] for n in piece])
        for n, estimated in chunks.too_many.items():
            faults[int(piece[n])] = _too_many(estimated)
        return Pieces(piece[chunks.texts], chunks.numbers, chunks.spans, chunks.read, chunks.tokens)

    done, killed = in_pieces(attempt, prefix, len(passages.joined), cut)
    return _joined([pieces for _, pieces in done]), faults | killed


def tokens_of(
    attempt: Attempt,
    prefix: str,
    passages: Texts,
    pieces: Pieces,
    wanted: IdArray,
    spec: DatasetSpec,
    *,
    trust_remote_code: bool,
) -> tuple[IdArray, PackedTokens, dict[int, Fault]]:
    """Return the tokens of some pieces.

    Args:
        attempt: the attempt this is part of.
        prefix: makes the places of this call distinct within the attempt.
        passages: what the pieces are of.
        pieces: all of them.
        wanted: (k,) numbers of those that are asked for, ascending.
        spec: of the data set.
        trust_remote_code: of the tokenizer.

    Returns:
        The numbers of the pieces that have tokens, ascending; their tokens; and faults of the others, by the
        number of the piece.
    """
    if pieces.tokens is not None:
        return wanted, pieces.tokens.take_results(wanted), {}
    feeder = load_text_feeder(spec.model, trust_remote_code=trust_remote_code)
    texts = [passages.joined[n] for n in pieces.passages[wanted].tolist()]
    done, tokens, faults = tokenise(
        attempt, prefix, len(texts), lambda some: feeder.passages([texts[n] for n in some])
    )
    return wanted[done], tokens, {int(wanted[n]): fault for n, fault in faults.items()}


def with_pieces(
    table: pa.Table, passages: Texts, pieces: Pieces, faults: dict[int, Fault], spec: DatasetSpec
) -> tuple[pa.Table, IdArray]:
    """Return a table of corpus rows with a row for each piece, in place of the row of its passage.

    Args:
        table: a row for each row of some units, rejected ones included, with its ``vector_id``.
        passages: the accepted ones.
        pieces: of these.
        faults: by the number of the passage; such a passage keeps its one row, with the reason in it.
        spec: of the data set.

    Returns:
        The table, and the (m,) row of each piece in it.
    """
    n_rows = len(table)
    table = with_faults(table, {int(passages.rows[n]): fault for n, fault in faults.items()})
    row_of_piece = passages.rows[pieces.passages]
    counts = np.maximum(np.bincount(row_of_piece, minlength=n_rows), 1)
    at = (np.cumsum(counts) - counts)[row_of_piece] + pieces.numbers
    if len(pieces.read) and pieces.numbers.any():
        table = table.take(pa.array(np.repeat(np.arange(n_rows), counts)))
        ids = table["vector_id"].to_numpy().copy()
        ids[at] |= pieces.numbers
        table = table.set_column(table.schema.get_field_index("vector_id"), "vector_id", pa.array(ids))
    columns = {}
    if spec.chunking is not None:
        columns["chunk_no"] = pa.array(pieces.numbers.astype(np.int32))
        columns["start"] = pa.array(pieces.spans[:, 0].astype(np.int32))
        columns["end"] = pa.array(pieces.spans[:, 1].astype(np.int32))
        if spec.chunking.keep_text:
            bodies = (passages.bodies[n] for n in pieces.passages.tolist())
            texts = [body[a:b] for body, (a, b) in zip(bodies, pieces.spans.tolist(), strict=True)]
            columns["chunk_text"] = pa.array(texts, pa.string())
    return with_columns(table, at, columns), at


def with_columns(table: pa.Table, at: IdArray, columns: Mapping[str, pa.Array]) -> pa.Table:
    """Add columns of the (m,) rows at ``at``; the other rows have nulls in them."""
    for name, values in columns.items():
        table = table.append_column(name, spread(values, at, len(table)))
    return table


def _too_many(chunks: int) -> Fault:
    return (
        "too_many_chunks",
        f"{chunks} chunks, {MAX_CHUNKS_PER_ROW} are the most of a text: raise chunking.max_tokens or cut it",
    )


def _joined(parts: Sequence[Pieces]) -> Pieces:
    """Lay pieces of successive passages end to end."""
    nothing = np.zeros(0, np.int64)
    return Pieces(
        np.concatenate([nothing, *(part.passages for part in parts)]),
        np.concatenate([nothing, *(part.numbers for part in parts)]),
        np.concatenate([nothing.reshape(0, 2), *(part.spans for part in parts)]),
        [text for part in parts for text in part.read],
        PackedTokens.concatenate([part.tokens for part in parts if part.tokens is not None]),
    )
