"""The stages of a search: stored queries, their vectors, and the candidates of each.

A query that cannot be answered ends as one row with its reason; a group that cannot be done is given
up with an error; only defects raise.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from ray.actor import ActorHandle

from bge_ray.dataset.lookup import ShardMap, read_places
from bge_ray.dataset.read import Vectors, read_vectors
from bge_ray.errors import BgeRayError, StorageError
from bge_ray.index.topk import NO_RESULT, Results, exact_topk, rescore
from bge_ray.pipeline.engine.isolation import Attempt
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.rows import with_faults, with_tokens
from bge_ray.pipeline.engine.tokenise import load_text_feeder, tokenise
from bge_ray.pipeline.index.searchers import search_all
from bge_ray.pipeline.runs.groups import CANDIDATE_SCHEMA, GroupTask, Workplace
from bge_ray.pipeline.runs.intake import read_group
from bge_ray.records.arrays import whole
from bge_ray.records.dataset import FileFact
from bge_ray.records.ids import FloatArray, IdArray
from bge_ray.records.model import EMBEDDING, ModelSpec
from bge_ray.storage.objects import Storage

# Vectors that an exact searcher keeps from one group of queries to the next.
KEPT_VECTOR_BYTES = 256 << 20
# Results of all queries of a group: what ids, scores and their sorting take is some hundred megabytes.
GROUP_RESULTS = 2_000_000
# Where passages fell together, so many times as many results are fetched, or lists probed, as before.
REFILL = 4
# Candidates whose vectors are in memory at once to be scored again.
RESCORED_AT_ONCE = 50_000


@dataclass(frozen=True)
class RetrieveJob:
    """What a search task must know.

    ``k`` results a query are kept, ``fetched`` are asked for at first, and no more than ``most``, which are
    all there are. ``effort`` is that of the index, None in an exact search, and at most ``largest_effort``.
    """

    place: Workplace
    root: str
    shards: ShardMap
    searchers: tuple[ActorHandle, ...]
    k: int
    fetched: int
    most: int
    effort: int | None
    largest_effort: int
    rescores: bool


@dataclass(frozen=True)
class QueryJob:
    """What the tasks that read and tokenise queries must know."""

    place: Workplace
    spec: ModelSpec
    trust_remote_code: bool


def read_queries_stage(batch: pa.Table, job: QueryJob) -> pa.Table:
    """Read the queries of a group that are to do, and tokenise them."""
    parcel = Parcel.from_batch(batch)
    with Attempt(job.place.ledger, f"read {parcel.name}") as attempt:
        if attempt.total_deaths >= job.place.max_attempts:
            return parcel.failed(f"its process died {attempt.total_deaths} times").to_batch()
        try:
            table = read_group(job.place.storage, parcel.task_as(GroupTask))
        except StorageError as error:
            return parcel.failed(str(error)).to_batch()
        started = time.time()
        feeder = load_text_feeder(job.spec, trust_remote_code=job.trust_remote_code)
        queries = table["query"].to_pylist()
        rows, tokens, faults = tokenise(
            attempt, "tokenising", len(table), lambda piece: feeder.queries([queries[i] for i in piece])
        )
    facts = {
        "tokenise_s": time.time() - started,
        "query_tokens": int(tokens.offsets[-1]),
        "truncated_queries": int(tokens.truncated.sum()),
    }
    return parcel.filled(with_faults(with_tokens(table, rows, tokens), faults), **facts).to_batch()


class ShardSearcher:
    """Searches embedding shards exactly, side by side with others of its kind; stands in for a Searcher."""

    def __init__(self, storage: Storage, root: str, facts: Sequence[FileFact], threads: int) -> None:
        """Note which shards to search; they are read at the first search."""
        from bge_ray.index.package import use_threads

        self._storage, self._root, self._facts = storage, root, facts
        self._kept: dict[str, list[Vectors]] = {}
        self._kept_bytes = 0
        use_threads(threads)

    def search(self, queries: FloatArray, k: int, effort: int | None) -> Results:  # noqa: ARG002
        """Return the best k over all shards of this actor.

        Raises:
            StorageError: a shard is missing or damaged.
            IndexBuildError: a query is bad.
        """
        return exact_topk(queries, (block for fact in self._facts for block in self._blocks(fact)), k)

    def _blocks(self, fact: FileFact) -> list[Vectors]:
        if fact.path in self._kept:
            return self._kept[fact.path]
        blocks = list(read_vectors(self._storage, self._root, fact))
        size = sum(vectors.nbytes + ids.nbytes for vectors, ids in blocks)
        if self._kept_bytes + size <= KEPT_VECTOR_BYTES:
            self._kept[fact.path] = blocks
            self._kept_bytes += size
        return blocks


def retrieve_stage(batch: pa.Table, job: RetrieveJob) -> pa.Table:
    """Find the candidates of each query of a group: rows of CANDIDATE_SCHEMA, best first."""
    parcel = Parcel.from_batch(batch)
    if parcel.table is None:
        return batch
    started = time.time()
    try:
        return _retrieve(parcel, parcel.table, job, started).to_batch()
    except BgeRayError as error:
        return parcel.failed(str(error)).to_batch()


def _retrieve(parcel: Parcel, table: pa.Table, job: RetrieveJob, started: float) -> Parcel:
    able = table.filter(pc.is_null(table["reason"]))
    unable = table.filter(pc.is_valid(table["reason"]))
    first = Ask(job.fetched, job.effort)
    todo = [(able, first)] if len(able) else []
    answers: list[Answer] = []
    refilled = 0
    while todo:
        asked, ask = todo.pop()
        step = max(1, GROUP_RESULTS // ask.fetched)
        if len(asked) > step:
            todo += [(asked.slice(start, step), ask) for start in range(0, len(asked), step)]
            continue
        answer = _answer(asked, job, ask)
        # Passages that fell together, or are gone from the data set, leave places: those queries ask again.
        wider = ask.wider(job, holes=answer.holes)
        if wider is not None and answer.lacking.any():
            todo.append((asked.filter(pa.array(answer.lacking)), wider))
            refilled += int(answer.lacking.sum()) if ask == first else 0
            answer = answer.of(asked, ~answer.lacking)
        answers.append(answer)
    found = pa.concat_tables([_as_candidates(able.slice(0, 0)), *(answer.rows for answer in answers)])
    found = found.take(pa.array(np.argsort(found["row_no"].to_numpy(), kind="stable")))
    answered = np.isin(able["row_no"].to_numpy(), found["row_no"].to_numpy())
    silent = able.filter(pa.array(~answered))
    rows = pa.concat_tables([found, _as_candidates(unable), _without_result(silent)])
    search_s = sum(answer.search_s for answer in answers)
    facts = {
        "unknown_ids": sum(int(answer.unknown.sum()) for answer in answers),
        "doubled_passages": sum(int(answer.doubled.sum()) for answer in answers),
        "missing_results": len(able) * job.k - len(found),
        "refilled_queries": refilled,
    }
    return parcel.filled(rows, search_s=search_s, resolve_s=time.time() - started - search_s, **facts)


@dataclass(frozen=True)
class Ask:
    """How many results the searchers are asked for, and how hard they look."""

    fetched: int
    effort: int | None

    def wider(self, job: RetrieveJob, *, holes: bool) -> "Ask | None":
        """Return what to ask next where results lack, or None where all was asked for.

        Args:
            job: says how much there is.
            holes: whether less was found than asked for, so that a greater effort finds more.
        """
        fetched = max(self.fetched, min(REFILL * self.fetched, job.most, GROUP_RESULTS))
        effort = self.effort
        if holes and effort is not None:
            effort = min(REFILL * effort, max(effort, job.largest_effort))
        wider = Ask(fetched, effort)
        return None if wider == self else wider


@dataclass(frozen=True)
class Answer:
    """Candidates of some queries, and (n,) what became of the results of each.

    ``lacking`` have fewer than k, ``unknown`` counts results that the data set does not have, ``doubled``
    those that were the same passage as a better one; ``holes`` tells whether any found fewer than asked for.
    """

    rows: pa.Table
    lacking: npt.NDArray[np.bool_]
    unknown: IdArray
    doubled: IdArray
    holes: bool
    search_s: float

    def of(self, queries: pa.Table, chosen: npt.NDArray[np.bool_]) -> "Answer":
        """Return what some of the (n,) queries were answered; the time is that of all."""
        inside = np.isin(self.rows["row_no"].to_numpy(), queries["row_no"].to_numpy()[chosen])
        return dataclasses.replace(
            self,
            rows=self.rows.filter(pa.array(inside)),
            lacking=self.lacking[chosen],
            unknown=self.unknown[chosen],
            doubled=self.doubled[chosen],
        )


def _answer(queries: pa.Table, job: RetrieveJob, ask: Ask) -> Answer:
    """Search, score again, and resolve ids to passages."""
    vectors = _matrix(queries[EMBEDDING])
    started = time.time()
    scores, ids = search_all(job.searchers, vectors, ask.fetched, ask.effort, watch=lambda: None)
    search_s = time.time() - started
    places = read_places(job.place.storage, job.root, job.shards, _distinct(ids), ["passage_id"])
    known = np.isin(ids, places["vector_id"].to_numpy())
    real = ids != NO_RESULT
    unknown = (real & ~known).sum(axis=1)
    if job.rescores:
        scores, ids = _rescore(job, vectors, np.where(known, ids, NO_RESULT))
        known = ids != NO_RESULT
    rows, kept = _rows(queries, scores, ids, known, places, job.k)
    return Answer(
        rows=rows,
        lacking=kept < job.k,
        unknown=unknown,
        doubled=known.sum(axis=1) - kept,
        holes=bool((real.sum(axis=1) < min(ask.fetched, job.most)).any()),
        search_s=search_s,
    )


def _rescore(job: RetrieveJob, queries: FloatArray, ids: IdArray) -> Results:
    """Score all candidates again from their stored vectors, some queries at a time."""

    def fetch(wanted: IdArray) -> npt.NDArray[np.floating]:
        return _matrix(
            read_places(job.place.storage, job.root, job.shards, wanted, ["embedding"])["embedding"]
        )

    width = ids.shape[1]
    step = max(1, RESCORED_AT_ONCE // width)
    parts = [
        rescore(queries[start : start + step], ids[start : start + step], fetch, width)
        for start in range(0, len(ids), step)
    ]
    return np.concatenate([s for s, _ in parts]), np.concatenate([i for _, i in parts])


def _rows(
    queries: pa.Table,
    scores: FloatArray,
    ids: IdArray,
    known: npt.NDArray[np.bool_],
    places: pa.Table,
    k: int,
) -> tuple[pa.Table, IdArray]:
    """Return at most k candidates a query, ties by passage id, and (n,) how many passages each query had.

    A passage id that was embedded twice (in two objects of the corpus) counts once, with its best score.
    """
    which, _ = np.nonzero(known)
    positions = np.searchsorted(places["vector_id"].to_numpy(), ids[known])
    found = queries.select(["row_no", "query_id", "query"]).take(pa.array(which))
    found = found.append_column("passage_id", places["passage_id"].take(pa.array(positions)))
    found = found.append_column("vector_id", pa.array(ids[known]))
    found = found.append_column("first_score", pa.array(scores[known].astype(np.float64)))
    order = [("row_no", "ascending"), ("first_score", "descending"), ("passage_id", "ascending")]
    found = found.sort_by([*order, ("vector_id", "ascending")])
    if not len(found):
        return _as_candidates(found), np.zeros(len(queries), np.int64)
    rows = found["row_no"].to_numpy()
    numbers = whole(found["passage_id"]).dictionary_encode().indices.to_numpy()
    _, first = np.unique(rows * len(found) + numbers, return_index=True)
    first.sort()
    rows = rows[first]
    rank = np.arange(len(first)) - np.searchsorted(rows, rows)
    asked = queries["row_no"].to_numpy()
    distinct = np.searchsorted(rows, asked, side="right") - np.searchsorted(rows, asked)
    return _as_candidates(found.take(pa.array(first[rank < k]))), distinct


def _without_result(queries: pa.Table) -> pa.Table:
    rows = _as_candidates(queries.drop_columns(["reason", "detail"]))
    reason = pa.array(["no_result"] * len(rows), pa.string())
    detail = pa.array(["the index has nothing for it"] * len(rows), pa.string())
    return rows.set_column(
        rows.schema.get_field_index("reason"), CANDIDATE_SCHEMA.field("reason"), reason
    ).set_column(rows.schema.get_field_index("detail"), CANDIDATE_SCHEMA.field("detail"), detail)


def _as_candidates(table: pa.Table) -> pa.Table:
    """Return a table with the columns of CANDIDATE_SCHEMA, null where it has none."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in CANDIDATE_SCHEMA
    ]
    return pa.table(columns, schema=CANDIDATE_SCHEMA)


def _distinct(ids: IdArray) -> IdArray:
    return np.unique(ids[ids != NO_RESULT])


def _matrix(column: pa.ChunkedArray) -> npt.NDArray[np.floating]:
    """Return a fixed-size-list column as (n, dim)."""
    dim = column.type.list_size
    chunks = [
        chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), dim) for chunk in column.chunks
    ]
    return np.concatenate(chunks) if chunks else np.empty((0, dim), np.float32)
