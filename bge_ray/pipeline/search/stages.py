"""The stages of a search: stored queries, their vectors, and the candidates of each.

A query that cannot be answered ends as one row with its reason; a group that cannot be done is given
up with an error; only defects raise.
"""

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
# Candidates whose vectors are in memory at once to be scored again.
RESCORED_AT_ONCE = 50_000


@dataclass(frozen=True)
class RetrieveJob:
    """What a search task must know; ``fetched`` results a query are asked for, ``k`` are kept."""

    place: Workplace
    root: str
    shards: ShardMap
    searchers: tuple[ActorHandle, ...]
    k: int
    fetched: int
    effort: int | None
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
    queries = _matrix(able[EMBEDDING])
    scores, ids = np.empty((0, job.k), np.float32), np.empty((0, job.k), np.int64)
    if len(able):
        scores, ids = search_all(job.searchers, queries, job.fetched, job.effort, watch=lambda: None)
    searched = time.time()
    places = read_places(job.place.storage, job.root, job.shards, _distinct(ids), ["passage_id"])
    known = np.isin(ids, places["vector_id"].to_numpy())
    facts = {
        "unknown_ids": int(((ids != NO_RESULT) & ~known).sum()),
        "missing_results": int((ids == NO_RESULT).sum()),
    }
    if job.rescores and len(able):
        scores, ids = _rescore(job, queries, np.where(known, ids, NO_RESULT))
        known = ids != NO_RESULT
    found, doubled = _rows(able, scores, ids, known, places, job.k)
    answered = np.isin(able["row_no"].to_numpy(), found["row_no"].to_numpy())
    silent = able.filter(pa.array(~answered))
    facts["doubled_passages"] = doubled
    rows = pa.concat_tables([found, _as_candidates(unable), _without_result(silent)])
    return parcel.filled(rows, search_s=searched - started, resolve_s=time.time() - searched, **facts)


def _rescore(job: RetrieveJob, queries: FloatArray, ids: IdArray) -> Results:
    """Score candidates again from their stored vectors, some queries at a time."""

    def fetch(wanted: IdArray) -> npt.NDArray[np.floating]:
        return _matrix(
            read_places(job.place.storage, job.root, job.shards, wanted, ["embedding"])["embedding"]
        )

    step = max(1, RESCORED_AT_ONCE // ids.shape[1])
    parts = [
        rescore(queries[start : start + step], ids[start : start + step], fetch, job.k)
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
) -> tuple[pa.Table, int]:
    """Return at most k candidates a query, ties by passage id, and how many more were the same passage.

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
        return _as_candidates(found), 0
    rows = found["row_no"].to_numpy()
    numbers = whole(found["passage_id"]).dictionary_encode().indices.to_numpy()
    _, first = np.unique(rows * len(found) + numbers, return_index=True)
    first.sort()
    rows = rows[first]
    rank = np.arange(len(first)) - np.searchsorted(rows, rows)
    return _as_candidates(found.take(pa.array(first[rank < k]))), len(found) - len(first)


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
