"""Runs: the schema of ranked candidates, their order, and the TREC form of them.

It writes; `candidates` reads runs, as it reads candidate lists of any origin.
"""

from collections.abc import Sequence

import pyarrow as pa

from bge_ray.errors import CorpusError

RUN_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("passage_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("tag", pa.string(), nullable=False),
    ]
)


def sort_candidates(passage_ids: Sequence[str], scores: Sequence[float]) -> list[int]:
    """Return the positions by (-score, passage_id): the same order wherever the candidates came from."""
    return sorted(range(len(passage_ids)), key=lambda i: (-scores[i], passage_ids[i]))


def encode_trec(table: pa.Table) -> bytes:
    """Return a table of RUN_SCHEMA as lines ``query_id Q0 passage_id rank score tag``.

    Scores are written in full, so that reading them gives the same numbers and the same order.

    Raises:
        CorpusError: an id or the tag is empty or holds white space, which separates the fields.
    """
    for name in ("query_id", "passage_id", "tag"):
        for value in table[name].unique().to_pylist():
            if not value or value.split() != [value]:
                raise CorpusError(
                    f"{name} {value!r} cannot stand in a TREC run: white space separates its fields"
                )
    columns = (table[name].to_pylist() for name in RUN_SCHEMA.names)
    return "".join(f"{q} Q0 {p} {r} {s!r} {t}\n" for q, p, r, s, t in zip(*columns, strict=True)).encode()
