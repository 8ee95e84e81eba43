"""The end of a unit and of a run: its part, created whole; then all parts, in order, as run files.

A part is its own marker: one object, named by the fingerprint of its unit, there in full or not at all.
What a twin of the task writes later changes nothing.
"""

import contextlib
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bge_ray.errors import CorpusError, IncompleteRunError, StorageError
from bge_ray.formats.runs import RUN_SCHEMA, encode_trec
from bge_ray.index.fusion import scaled
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.runs.groups import (
    CANDIDATE_SCHEMA,
    SPAN_SCHEMA,
    GroupTask,
    GroupUnit,
    Workplace,
    part_uri,
)
from bge_ray.pipeline.runs.intake import Rejections
from bge_ray.records.arrays import whole
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import IdArray
from bge_ray.records.reports import RejectedRow
from bge_ray.report.facts import EXAMPLES_PER_REASON
from bge_ray.storage.concatenate import Piece
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder

PART_SCHEMA = pa.schema([f for f in CANDIDATE_SCHEMA if f.name not in ("query", "text")])
# What a reranked run is ordered by where the first stage has a share in it.
BOTH_SCORES = pa.schema([CANDIDATE_SCHEMA.field("first_score"), pa.field("reranker_score", pa.float32())])
FACTS_KEY = b"bge_ray.facts"
# A piece of a run file, and the rows of a Parquet row group: what the driver holds of a run.
PIECE_BYTES = 16 << 20
GROUP_ROWS = 200_000
READ_AHEAD = 8
# What `publish` puts into the folder of a run; the first of several has what was left out of all.
RUN_FILES = ("run.parquet", "run.trec")
LEFT_OUT = "rejected.parquet"
LEFT_OUT_SCHEMA = pa.schema([(name, pa.string()) for name in ("query_id", "passage_id", "reason", "detail")])


def part_stage(batch: pa.Table, place: Workplace, more: Sequence[str] = ()) -> pa.Table:
    """Write the part of a unit; what goes on to the driver is a receipt without a table.

    Args:
        batch: of one parcel.
        place: where parts lie.
        more: columns beside those of PART_SCHEMA: scores of a reranker's layers, spans of chunks.
    """
    parcel = Parcel.from_batch(batch)
    if parcel.table is None:
        return batch
    return write_part(parcel, parcel.table.select([*PART_SCHEMA.names, *more]), place)


def write_part(parcel: Parcel, table: pa.Table, place: Workplace) -> pa.Table:
    """Write the part of a parcel's unit, and return its receipt, or the parcel given up, as a batch.

    Args:
        parcel: of one unit.
        table: what the part holds: ``row_no``, ``query_id``, ``passage_id``, ``reason``, ``detail`` and more.
        place: where parts lie.
    """
    (unit,) = parcel.task_as(GroupTask).todo
    # Every input row is there, with a candidate, a score or a reason.
    counted = pc.count_distinct(table["row_no"]).as_py()
    if counted != unit.n_rows:
        return parcel.failed(f"{counted} input rows came out, {unit.n_rows} went in").to_batch()
    facts = {**parcel.facts, "written": time.time()}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({FACTS_KEY: json.dumps(facts)}), sink, compression="zstd")
    try:
        place.storage.create(place.part_uri(unit.fingerprint), bytes(sink.getvalue()))
    except StorageError as error:
        return parcel.failed(str(error)).to_batch()
    counts = {"queries": pc.count_distinct(table["query_id"]).as_py(), "rows": len(table)}
    return parcel.filled(None, **facts, **counts).to_batch()


class Writer(Protocol):
    """Writes files of one output, part by part."""

    def write(self, part: pa.Table) -> None:
        """Take the next part in."""

    def publish(self, totals: "Totals") -> None:
        """Give what was written its final names, and tell the totals of it."""


class Output(Protocol):
    """What a run makes of its parts, in one folder."""

    @property
    def folder(self) -> OwnedFolder:
        """Where it is published."""

    def open(self, storage: Storage, work: str, stack: contextlib.ExitStack) -> Writer:
        """Return what writes it; its pieces lie below the work folder until the stack is left."""


@dataclass(frozen=True)
class RunOutput:
    """One run to publish: where, under which name, and which column of the parts orders it.

    ``spans`` says that results are chunks, or passages found by one. ``scores`` are the columns that stand
    beside the score of a result: by each of several outputs, and by each layer of a reranker. Above 0
    ``first_stage_share`` is that of first_score in the score of a reranked run, which then names both.
    """

    folder: OwnedFolder
    tag: str
    column: str  # first_score or score
    scores: tuple[str, ...] = ()
    spans: bool = False
    first_stage_share: float = 0.0

    @property
    def schema(self) -> pa.Schema:
        """Columns of run.parquet: those of any run, vector id, span, a reranker's probability, scores."""
        schema = pa.schema(
            [*RUN_SCHEMA, pa.field("vector_id", pa.int64()), *(SPAN_SCHEMA if self.spans else ())]
        )
        names = ("probability", *self.scores) if self.column == "score" else self.scores
        fields = [*schema, *(pa.field(name, pa.float32()) for name in names)]
        return pa.schema([*fields, *(BOTH_SCORES if self.first_stage_share else ())])

    def open(self, storage: Storage, work: str, stack: contextlib.ExitStack) -> Writer:
        """Return what writes the run in both forms."""
        return _RunWriter(storage, work, self, stack)


@dataclass
class Totals:
    """What the parts of a run add up to; ``files`` are what was published of it, by URI."""

    queries: int = 0
    rows: int = 0
    pairs_rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[RejectedRow] = field(default_factory=list)
    files: list[FileFact] = field(default_factory=list)
    facts: Counter[str] = field(default_factory=Counter)
    results: dict[str, int] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)
    without_trec: list[str] = field(default_factory=list)


def publish(
    storage: Storage,
    work: str,
    units: Sequence[GroupUnit],
    outputs: Sequence[Output],
    rejections: Rejections,
    check: Callable[[Totals], None],
) -> Totals:
    """Put the parts together as the files of each output, and what was left out as rejected.parquet.

    Memory: a row group, whatever the size of the run.

    Args:
        storage: for all requests.
        work: folder of the parts.
        units: in order.
        outputs: what to write; the folder of the first has what was left out.
        rejections: what was left out of the input.
        check: told what the parts add up to before anything appears under a final name; raises to refuse.

    Raises:
        IncompleteRunError: a part is not what its name promises.
        OutputCollisionError: a foreign file has a name of ours.
        StorageError: reading or writing failed for good.
    """
    totals = Totals()
    with contextlib.ExitStack() as stack:
        writers = [output.open(storage, work, stack) for output in outputs]
        rejected = _RejectedWriter(storage, work, stack)
        rejected.write_rejections(rejections)
        for unit, table in zip(units, _read_parts(storage, work, units), strict=True):
            _count(unit, table, totals)
            left_out = table.filter(pc.is_valid(table["reason"])).select(LEFT_OUT_SCHEMA.names)
            rejected.write(left_out)
            totals.examples += _examples(left_out, totals.examples)
            for writer in writers:
                writer.write(table)
        check(totals)
        for writer in writers:
            writer.publish(totals)
        totals.files.append(rejected.publish(outputs[0].folder, LEFT_OUT))
    return totals


def _examples(left_out: pa.Table, there: Sequence[RejectedRow]) -> list[RejectedRow]:
    """Return a few rows of each reason, fewer where some are there."""
    shown = Counter(example.reason for example in there)
    chosen = [
        left_out.filter(pc.equal(left_out["reason"], reason)).slice(0, EXAMPLES_PER_REASON - shown[reason])
        for reason in pc.unique(left_out["reason"]).to_pylist()
    ]
    return [RejectedRow(**row) for rows in chosen for row in rows.to_pylist()]


def rank_rows(table: pa.Table, column: str) -> pa.Table:
    """Return the rows with a value in ``column`` by query, falling value, passage id and chunk, with ranks.

    Args:
        table: rows of PART_SCHEMA of whole queries.
        column: of numbers.
    """
    table = table.filter(pc.is_valid(table[column]))
    table = table.append_column("query_no", pa.array(_query_numbers(table)))
    order = [("query_no", "ascending"), (column, "descending"), ("passage_id", "ascending")]
    table = table.sort_by([*order, ("vector_id", "ascending")])
    places = table["query_no"].to_numpy()
    rank = np.arange(1, len(table) + 1) - np.searchsorted(places, places)
    return table.append_column("rank", pa.array(rank.astype(np.int32)))


def _query_numbers(table: pa.Table) -> IdArray:
    """Return the numbers of queries in order of appearance: a rerank unit has a row number a pair."""
    numbers: IdArray = whole(table["query_id"]).dictionary_encode().indices.cast(pa.int64()).to_numpy()
    return numbers


def _fused(table: pa.Table, share: float) -> pa.Table:
    """Return the rows that a reranker scored, their candidates' scores with a share in ``score``."""
    table = table.filter(pc.is_valid(table["score"]))
    numbers = _query_numbers(table)
    order = np.argsort(numbers, kind="stable")
    score = np.zeros(len(table))
    for name, part in (("first_score", share), ("score", 1 - share)):
        values = table[name].to_numpy()[order]
        score[order] += part * scaled(numbers[order], values)
    place = table.schema.get_field_index("score")
    named = table.append_column("reranker_score", table["score"])
    return named.set_column(place, "score", pa.array(score))


def _run_rows(table: pa.Table, output: RunOutput) -> pa.Table:
    if output.first_stage_share:
        table = _fused(table, output.first_stage_share)
    table = rank_rows(table, output.column)
    values = table[output.column].to_numpy().astype(np.float64)
    both = BOTH_SCORES.names if output.first_stage_share else ()
    logits = table["reranker_score"].to_numpy() if both else values
    columns = {
        "query_id": table["query_id"],
        "passage_id": table["passage_id"],
        "rank": table["rank"],
        "score": values,
        "tag": [output.tag] * len(table),
        "vector_id": table["vector_id"],
        "probability": sigmoid(logits),
        **{name: table[name] for name in (SPAN_SCHEMA.names if output.spans else ())},
        **{name: table[name] for name in (*output.scores, *both)},
    }
    return pa.table([columns[name] for name in output.schema.names], schema=output.schema)


def _passages(rows: pa.Table) -> pa.Table:
    """Return the best row of each passage of each query, ranked anew: the one there is, or of its chunks."""
    keys = [
        whole(rows[name]).dictionary_encode().indices.cast(pa.int64()) for name in ("query_id", "passage_id")
    ]
    queries, passages = (key.to_numpy() for key in keys)
    _, first = np.unique(queries * (len(rows) + 1) + passages, return_index=True)
    if len(first) == len(rows):
        return rows
    first.sort()
    queries = queries[first]
    rank = np.arange(1, len(first) + 1) - np.searchsorted(queries, queries)
    place = rows.schema.get_field_index("rank")
    return rows.take(pa.array(first)).set_column(place, rows.schema.field(place), pa.array(rank, pa.int32()))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return (n,) float32 probabilities of logits, without overflow."""
    return (0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))).astype(np.float32)


def _count(unit: GroupUnit, table: pa.Table, totals: Totals) -> None:
    counted = pc.count_distinct(table["row_no"]).as_py()
    if counted != unit.n_rows:
        raise IncompleteRunError(f"part {unit.fingerprint[:12]}: {counted} rows, {unit.n_rows} were planned")
    totals.queries += pc.count_distinct(table["query_id"]).as_py()
    totals.rows += len(table)
    without = pc.and_(pc.is_valid(table["reason"]), pc.is_valid(table["passage_id"]))
    totals.pairs_rejected += pc.sum(without).as_py() or 0
    totals.reasons.update(pc.drop_null(table["reason"]).to_pylist())
    facts = json.loads(table.schema.metadata[FACTS_KEY])
    moments = ("encode_started", "encode_ended", "score_started", "score_ended", "written")
    amounts = {key: value for key, value in facts.items() if isinstance(value, int | float)}
    totals.facts.update({key: value for key, value in amounts.items() if key not in moments})


def _read_parts(storage: Storage, work: str, units: Sequence[GroupUnit]) -> Iterator[pa.Table]:
    """Yield the parts in order, some of them fetched ahead."""

    def read(unit: GroupUnit) -> pa.Table:
        data = storage.read(part_uri(work, unit.fingerprint))
        return pq.read_table(pa.BufferReader(data), use_threads=False)

    with ThreadPoolExecutor(READ_AHEAD) as pool:
        waiting = [pool.submit(read, unit) for unit in units[:READ_AHEAD]]
        for following in range(READ_AHEAD, len(units) + READ_AHEAD):
            if not waiting:
                return
            table = waiting.pop(0).result()
            if following < len(units):
                waiting.append(pool.submit(read, units[following]))
            yield table


class PieceFile(io.RawIOBase):
    """A file to append to whose bytes become objects of bounded size, and one object at the end."""

    def __init__(self, storage: Storage, stem: str) -> None:
        """Begin a file without bytes; its pieces are named by the stem and their number."""
        super().__init__()
        self._storage, self._stem = storage, stem
        self._sha, self._bytes = hashlib.sha256(), 0
        self._held = bytearray()
        self._pieces: list[Piece] = []

    def writable(self) -> bool:
        """Tell that it can be written to."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes, and return how many."""
        view = memoryview(data)
        self._sha.update(view)
        self._bytes += view.nbytes
        self._held += view
        if len(self._held) >= PIECE_BYTES:
            self._flush_piece()
        return view.nbytes

    def publish(self, folder: OwnedFolder, name: str, rows: int) -> FileFact:
        """Make a file of all that was written."""
        sha256 = self._sha.hexdigest()
        if not self._pieces:
            folder.put(name, bytes(self._held))
        else:
            if self._held:
                self._flush_piece()
            folder.put_pieces(name, self._pieces, sha256)
        return FileFact(join(folder.uri, name), self._bytes, sha256, rows)

    def _flush_piece(self) -> None:
        uri = f"{self._stem}-{len(self._pieces):06d}"
        self._storage.write(uri, bytes(self._held))
        self._pieces.append(Piece(uri, len(self._held)))
        self._held = bytearray()


class ParquetFile:
    """A Parquet file written row group by row group."""

    def __init__(self, storage: Storage, stem: str, schema: pa.Schema, stack: contextlib.ExitStack) -> None:
        """Begin a file without rows, which is open until the stack is left."""
        self._file = PieceFile(storage, stem)
        sink = stack.enter_context(pa.PythonFile(self._file, mode="w"))
        self._writer = stack.enter_context(pq.ParquetWriter(sink, schema, compression="zstd"))
        self._held: list[pa.Table] = []
        self._rows = self._all_rows = 0

    def write(self, table: pa.Table) -> None:
        """Append rows of the schema."""
        self._held.append(table)
        self._rows += len(table)
        self._all_rows += len(table)
        if self._rows >= GROUP_ROWS:
            self._flush()

    def publish(self, folder: OwnedFolder, name: str) -> FileFact:
        """Make a file of all that was written."""
        self._flush()
        self._writer.close()
        return self._file.publish(folder, name, self._all_rows)

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.concat_tables(self._held).combine_chunks())
        self._held, self._rows = [], 0


class _RunWriter:
    """Writes one run in both forms; the TREC form is given up at the first id that it cannot hold."""

    def __init__(self, storage: Storage, work: str, output: RunOutput, stack: contextlib.ExitStack) -> None:
        self._output = output
        stem = join(work, "pieces", output.column)
        self._parquet = ParquetFile(storage, f"{stem}-parquet", output.schema, stack)
        self._trec: PieceFile | None = PieceFile(storage, f"{stem}-trec")
        self._why_not = ""
        self._results = self._answered = 0

    def write(self, part: pa.Table) -> None:
        rows = _run_rows(part, self._output)
        self._results += len(rows)
        self._answered += pc.count_distinct(rows["query_id"]).as_py()
        self._parquet.write(rows)
        if self._trec is not None:
            try:
                self._trec.write(encode_trec(_passages(rows).select(RUN_SCHEMA.names)))
            except CorpusError as error:
                self._trec, self._why_not = None, str(error)

    def publish(self, totals: Totals) -> None:
        folder, column = self._output.folder, self._output.column
        totals.files.append(self._parquet.publish(folder, "run.parquet"))
        if self._trec is not None:
            totals.files.append(self._trec.publish(folder, "run.trec", self._results))
        else:
            # An old run.trec beside a new run.parquet would be taken for its twin.
            folder.remove(["run.trec"])
            totals.without_trec.append(self._why_not)
        totals.results[column], totals.answered[column] = self._results, self._answered


class _RejectedWriter:
    """Writes what was left out, with its reason."""

    def __init__(self, storage: Storage, work: str, stack: contextlib.ExitStack) -> None:
        self._file = ParquetFile(storage, join(work, "pieces", "rejected"), LEFT_OUT_SCHEMA, stack)

    def write_rejections(self, found: Rejections) -> None:
        columns = [found.query_ids, found.passage_ids, found.reasons, found.details]
        self.write(pa.table(columns, schema=LEFT_OUT_SCHEMA))

    def write(self, table: pa.Table) -> None:
        self._file.write(table.cast(LEFT_OUT_SCHEMA).replace_schema_metadata(None))

    def publish(self, folder: OwnedFolder, name: str) -> FileFact:
        return self._file.publish(folder, name)
