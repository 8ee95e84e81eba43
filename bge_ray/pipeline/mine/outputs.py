"""The files of a mining run, made of its parts: training files for two trainers, and the audit."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.pipeline.mine.rules import NEGATIVE, POSITIVE
from bge_ray.pipeline.mine.stages import Row
from bge_ray.pipeline.runs.parts import FACTS_KEY, ParquetFile, PieceFile, Totals, Writer
from bge_ray.records.reports import Gaps, MinedExample
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder

FLAG, TUPLES, LISTS, AUDIT = "negatives.jsonl", "tuples.parquet", "lists.parquet", "audit.parquet"
MINED_FILES = (FLAG, TUPLES, LISTS, AUDIT)
AUDIT_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("passage_id", pa.string(), nullable=False),
        pa.field("vector_id", pa.int64()),
        pa.field("rank", pa.int32()),
        pa.field("score", pa.float64()),
        pa.field("teacher_score", pa.float32()),
        pa.field("cosine", pa.float32()),
        pa.field("overlap", pa.float32()),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
LIST_SCHEMA = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("docs", pa.list_(pa.string()), nullable=False),
        pa.field("labels", pa.list_(pa.int64()), nullable=False),
    ]
)
# Of each verdict, in the report.
EXAMPLES = 3
# Of the lowest positive's score minus a negative's.
GAP_EDGES = tuple(round(0.05 * step, 2) for step in range(1, 20))


def tuple_schema(negatives: int) -> pa.Schema:
    """Return the columns of tuples.parquet: an anchor, a positive and so many negatives."""
    names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, negatives + 1))]
    return pa.schema([pa.field(name, pa.string(), nullable=False) for name in names])


@dataclass
class Mined:
    """What the files of a run hold, as its report tells it."""

    queries: int = 0
    negatives: int = 0
    tuples: int = 0
    examples: tuple[MinedExample, ...] = ()
    gaps: Gaps = field(default_factory=Gaps)


@dataclass(frozen=True)
class MinedOutput:
    """The folder of a mining run; what was written of it is told to ``mined``."""

    folder: OwnedFolder
    negatives: int
    teacher: bool
    mined: Mined

    def open(self, storage: Storage, work: str, stack: contextlib.ExitStack) -> Writer:
        """Return what writes the training files and the audit."""
        return _MinedWriter(storage, work, self, stack)


class _MinedWriter:
    def __init__(self, storage: Storage, work: str, output: MinedOutput, stack: contextlib.ExitStack) -> None:
        stem = join(work, "pieces")
        self._output = output
        self._flag = PieceFile(storage, join(stem, "negatives"))
        self._tuples = ParquetFile(storage, join(stem, "tuples"), tuple_schema(output.negatives), stack)
        self._lists = ParquetFile(storage, join(stem, "lists"), LIST_SCHEMA, stack)
        self._audit = ParquetFile(storage, join(stem, "audit"), AUDIT_SCHEMA, stack)
        self._queries = self._negatives = self._n_tuples = 0
        self._gaps = np.zeros(len(GAP_EDGES) + 1, np.int64)
        self._examples: list[MinedExample] = []

    def write(self, part: pa.Table) -> None:
        self._audit.write(audit_rows(part))
        self._add_examples(json.loads(part.schema.metadata[FACTS_KEY])["mined_examples"])
        wanted = pc.and_(
            pc.is_in(part["verdict"], pa.array([POSITIVE, NEGATIVE])), pc.is_null(part["reason"])
        )
        tuples: list[list[str]] = []
        lists: list[Row] = []
        for positives, negatives in _with_negatives(part.filter(wanted).to_pylist()):
            self._flag.write(flag_line(positives, negatives, teacher=self._output.teacher))
            query = positives[0]["query_text"]
            texts = [row["passage_text"] for row in negatives]
            if len(negatives) == self._output.negatives:
                tuples += [[query, row["passage_text"], *texts] for row in positives]
            docs = [row["passage_text"] for row in positives] + texts
            labels = [1] * len(positives) + [0] * len(negatives)
            lists.append({"query": query, "docs": docs, "labels": labels})
            lowest = min(row["score"] for row in positives)
            gaps = [lowest - row["score"] for row in negatives]
            np.add.at(self._gaps, np.searchsorted(GAP_EDGES, gaps, side="right"), 1)
            self._negatives += len(negatives)
        self._queries += len(lists)
        self._n_tuples += len(tuples)
        names = tuple_schema(self._output.negatives).names
        rows = [dict(zip(names, row, strict=True)) for row in tuples]
        self._tuples.write(pa.Table.from_pylist(rows, schema=tuple_schema(self._output.negatives)))
        self._lists.write(pa.Table.from_pylist(lists, schema=LIST_SCHEMA))

    def _add_examples(self, found: list[Row]) -> None:
        for row in found:
            if sum(there.verdict == row["verdict"] for there in self._examples) < EXAMPLES:
                self._examples.append(MinedExample(**row))

    def publish(self, totals: Totals) -> None:
        folder, mined = self._output.folder, self._output.mined
        totals.files.append(self._flag.publish(folder, FLAG, self._queries))
        totals.files.append(self._tuples.publish(folder, TUPLES))
        totals.files.append(self._lists.publish(folder, LISTS))
        totals.files.append(self._audit.publish(folder, AUDIT))
        mined.queries, mined.negatives, mined.tuples = self._queries, self._negatives, self._n_tuples
        mined.examples = tuple(self._examples)
        mined.gaps = Gaps(GAP_EDGES, tuple(self._gaps.tolist()))


def audit_rows(part: pa.Table) -> pa.Table:
    """Return the rows of a part that are about a passage, each with its verdict or its fault."""
    rows = part.filter(pc.is_valid(part["passage_id"]))
    reason = pc.coalesce(rows["reason"], rows["verdict"])
    columns: dict[str, Any] = {name: rows[name] for name in AUDIT_SCHEMA.names if name in rows.column_names}
    columns |= {"kept": pc.equal(reason, NEGATIVE), "reason": reason}
    return pa.table([columns[name] for name in AUDIT_SCHEMA.names], schema=AUDIT_SCHEMA)


def flag_line(positives: list[Row], negatives: list[Row], *, teacher: bool) -> bytes:
    """Return a query with its passages as a line that FlagEmbedding trains on.

    Its scores are the teacher's, or else those of the vectors; ids and what else the query came with are
    further keys.
    """
    score = "teacher_score" if teacher else "score"
    record: dict[str, Any] = {"query_id": positives[0]["query_id"], "query": positives[0]["query_text"]}
    for name, rows in (("pos", positives), ("neg", negatives)):
        record[name] = [row["passage_text"] for row in rows]
        record[f"{name}_id"] = [row["passage_id"] for row in rows]
        record[f"{name}_scores"] = [row[score] for row in rows]
    record |= json.loads(positives[0]["labels"] or "{}")
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _with_negatives(rows: list[Row]) -> Iterator[tuple[list[Row], list[Row]]]:
    """Yield positives and negatives of each query that has both, the best first."""
    for _, group in itertools.groupby(rows, key=lambda row: row["row_no"]):
        sides: dict[str, list[Row]] = {POSITIVE: [], NEGATIVE: []}
        for row in group:
            sides[row["verdict"]].append(row)
        if sides[POSITIVE] and sides[NEGATIVE]:
            yield sides[POSITIVE], sides[NEGATIVE]
