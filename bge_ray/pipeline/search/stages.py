"""The stages of a search: stored queries, their vectors, and the candidates of each.

A query that cannot be answered ends as one row with its reason; a group that cannot be done is given
up with an error; only defects raise.
"""

import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.actor import ActorHandle

from bge_ray.errors import BgeRayError, StorageError
from bge_ray.index.topk import Results
from bge_ray.pipeline.engine.isolation import Attempt
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.rows import with_faults, with_tokens
from bge_ray.pipeline.engine.tokenise import load_text_feeder, tokenise
from bge_ray.pipeline.index.searchers import search_all
from bge_ray.pipeline.runs.groups import CANDIDATE_SCHEMA, SPAN_SCHEMA, GroupTask, Workplace
from bge_ray.pipeline.runs.intake import read_group
from bge_ray.pipeline.search.retrieve import Retrieval, retrieve
from bge_ray.records.arrays import dense_rows
from bge_ray.records.ids import FloatArray
from bge_ray.records.model import EMBEDDING, ModelSpec


@dataclass(frozen=True)
class RetrieveJob:
    """What a search task must know: whom to ask, and what for; ``spans`` says whether chunks are found."""

    place: Workplace
    searchers: tuple[ActorHandle, ...]
    retrieval: Retrieval
    spans: bool


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
    search_s = 0.0

    def search(queries: FloatArray, fetched: int, effort: int | None) -> Results:
        nonlocal search_s
        began = time.time()
        found = search_all(job.searchers, queries, fetched, effort, watch=lambda: None)
        search_s += time.time() - began
        return found

    found = retrieve(dense_rows(able[EMBEDDING]), search, job.retrieval)
    rows = able.select(["row_no", "query_id", "query"]).take(pa.array(found.numbers))
    for name in ("passage_id", "vector_id", *(SPAN_SCHEMA.names if job.spans else ())):
        rows = rows.append_column(name, found.rows[name])
    rows = rows.append_column("first_score", pa.array(found.scores.astype(np.float64)))
    silent = able.filter(pa.array(~np.isin(np.arange(len(able)), found.numbers)))
    facts = {
        "unknown_ids": found.unknown,
        "doubled_passages": found.doubled,
        "missing_results": len(able) * job.retrieval.k - len(rows),
        "refilled_queries": found.refilled,
    }
    every = [rows, unable, _without_result(silent)]
    rows = pa.concat_tables(_as_candidates(some, spans=job.spans) for some in every)
    return parcel.filled(rows, search_s=search_s, resolve_s=time.time() - started - search_s, **facts)


def _without_result(queries: pa.Table) -> pa.Table:
    detail = pa.array(["the index has nothing for it"] * len(queries), pa.string())
    queries = queries.drop_columns(["reason", "detail"]).append_column("detail", detail)
    return queries.append_column("reason", pa.array(["no_result"] * len(queries), pa.string()))


def _as_candidates(table: pa.Table, *, spans: bool) -> pa.Table:
    """Return a table with the columns of CANDIDATE_SCHEMA, and of SPAN_SCHEMA, null where it has none."""
    schema = pa.schema([*CANDIDATE_SCHEMA, *(SPAN_SCHEMA if spans else ())])
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
