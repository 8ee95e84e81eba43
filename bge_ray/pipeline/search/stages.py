"""The stages of a search: stored queries, what is made of them, and the candidates of each.

A query that cannot be answered ends as one row with its reason; a group that cannot be done is given
up with an error; only defects raise.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.dataset.passing import Passes
from bge_ray.errors import BgeRayError, StorageError
from bge_ray.pipeline.engine.isolation import Attempt
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.rows import Fault, spread, with_faults, with_tokens
from bge_ray.pipeline.engine.tokenise import load_query_counter, load_text_feeder, tokenise
from bge_ray.pipeline.runs.groups import CANDIDATE_SCHEMA, SPAN_SCHEMA, GroupTask, Workplace
from bge_ray.pipeline.runs.holders import StoredRows
from bge_ray.pipeline.runs.intake import read_group
from bge_ray.pipeline.search.combine import Combining, Ranking, combine
from bge_ray.pipeline.search.filtering import FILTER, by_filter
from bge_ray.pipeline.search.finders import Finder
from bge_ray.pipeline.search.retrieve import Found
from bge_ray.records.model import Canary, ModelSpec
from bge_ray.records.tokens import PackedTokens


@dataclass(frozen=True)
class RetrieveJob:
    """What a search task must know: whom to ask, and what for; ``spans`` says whether chunks are found.

    ``stored`` tells what the data set holds of results. ``combining`` is None where what the one finder gives
    is the result. ``filters`` say how much passes those that queries have, by their SQL.
    """

    place: Workplace
    finders: tuple[Finder, ...]
    stored: StoredRows
    spans: bool
    combining: Combining | None = None
    filters: Mapping[str, Passes] = field(default_factory=dict)

    def k(self, sql: str | None = None) -> int:
        """Return the results of a query with a filter, or none, where the data set has them."""
        most = max(finder.among(sql, self.filters).k for finder in self.finders)
        return most if self.combining is None else min(self.combining.k, most)

    @property
    def more(self) -> pa.Schema:
        """The columns of candidates beyond those of CANDIDATE_SCHEMA."""
        scores = () if self.combining is None else self.combining.columns
        return pa.schema([*(SPAN_SCHEMA if self.spans else ()), *((name, pa.float32()) for name in scores)])


@dataclass(frozen=True)
class QueryJob:
    """What the tasks that read and tokenise queries must know.

    ``spec`` is of the model that is run on them, None where none is; ``counted`` of the tokens to be counted,
    as the data set of the ``canaries`` has them, None where they are not.
    """

    place: Workplace
    spec: ModelSpec | None
    counted: ModelSpec | None
    canaries: tuple[Canary, ...]
    trust_remote_code: bool


def read_queries_stage(batch: pa.Table, job: QueryJob) -> pa.Table:
    """Read the queries of a group that are to do, and tokenise them; or count their tokens, or both."""
    parcel = Parcel.from_batch(batch)
    with Attempt(job.place.ledger, f"read {parcel.name}") as attempt:
        if attempt.total_deaths >= job.place.max_attempts:
            return parcel.failed(f"its process died {attempt.total_deaths} times").to_batch()
        try:
            table = read_group(job.place.storage, parcel.task_as(GroupTask))
        except StorageError as error:
            return parcel.failed(str(error)).to_batch()
        started = time.time()
        queries = table["query"].to_pylist()
        # In this order: of both, what the model reads is what is told.
        made = [_counted(table, queries, attempt, job)] if job.counted is not None else []
        if job.spec is not None:
            table = made[0].table if made else table
            made.append(_tokenised(table, queries, attempt, job.spec, trust=job.trust_remote_code))
    table, tokens = made[-1].table, made[-1].tokens
    facts = {
        "tokenise_s": time.time() - started,
        "query_tokens": int(tokens.offsets[-1]),
        "truncated_queries": int(tokens.truncated.sum()),
    }
    faults = {row: fault for some in made for row, fault in some.faults.items()}
    return parcel.filled(with_faults(table, faults), **facts).to_batch()


@dataclass(frozen=True)
class _Made:
    """A table of queries with what was made of them, their tokens, and faults of those that could not be."""

    table: pa.Table
    tokens: PackedTokens
    faults: Mapping[int, Fault]


def _tokenised(
    table: pa.Table, queries: list[str], attempt: Attempt, spec: ModelSpec, *, trust: bool
) -> _Made:
    feeder = load_text_feeder(spec, trust_remote_code=trust)
    rows, tokens, faults = tokenise(
        attempt, "tokenising", len(table), lambda piece: feeder.queries([queries[i] for i in piece])
    )
    return _Made(with_tokens(table, rows, tokens), tokens, faults)


def _counted(table: pa.Table, queries: list[str], attempt: Attempt, job: QueryJob) -> _Made:
    if job.counted is None:
        raise ValueError("no tokens are to be counted")
    feeder, counter = load_query_counter(job.counted, job.canaries, trust_remote_code=job.trust_remote_code)
    rows, tokens, faults = tokenise(
        attempt, "counting", len(table), lambda piece: feeder.queries([queries[i] for i in piece])
    )
    counts = spread(counter.column(tokens), rows, len(table))
    return _Made(table.append_column(counter.output.name, counts), tokens, faults)


def retrieve_stage(batch: pa.Table, job: RetrieveJob) -> pa.Table:
    """Find the candidates of each query of a group: rows of CANDIDATE_SCHEMA, best first."""
    parcel = Parcel.from_batch(batch)
    if parcel.table is None:
        return batch
    started = time.time()
    try:
        return _retrieve(parcel, parcel.table, job, started).to_batch()
    except BgeRayError as error:
        return parcel.given_up(error).to_batch()


def _retrieve(parcel: Parcel, table: pa.Table, job: RetrieveJob, started: float) -> Parcel:
    table = with_faults(table, _filter_faults(table, job))
    able = table.filter(pc.is_null(table["reason"]))
    unable = table.filter(pc.is_valid(table["reason"]))
    turn = parcel.task_as(GroupTask).number
    asked = [finder.find(able, job.filters, job.stored, turn) for finder in job.finders]
    found, search_s = [one for one, _ in asked], sum(seconds for _, seconds in asked)
    results: Found | Ranking = found[0]
    resolve_s = time.time() - started - search_s
    spent = {"search_s": search_s, "resolve_s": resolve_s}
    if job.combining is not None:
        by_passage = job.finders[0].retrieval.group == "passage"
        results = combine(found, able, job.stored, job.combining, by_passage=by_passage)
        spent["combine_s"] = time.time() - started - search_s - resolve_s
    rows = able.select(["row_no", "query_id", "query"]).take(pa.array(results.numbers))
    for name in ("passage_id", "vector_id", *job.more.names):
        rows = rows.append_column(name, results.rows[name])
    rows = rows.append_column("first_score", pa.array(results.scores.astype(np.float64)))
    silent = able.filter(pa.array(~np.isin(np.arange(len(able)), results.numbers)))
    facts = {
        "unknown_ids": sum(one.unknown for one in found),
        "doubled_passages": sum(one.doubled for one in found),
        "refilled_queries": sum(one.refilled for one in found),
        **_filter_facts(able, job, len(rows)),
    }
    every = [rows, unable, _without_result(silent, job.filters)]
    rows = pa.concat_tables(_as_candidates(some, job.more) for some in every)
    return parcel.filled(rows, **spent, **facts)


def _filter_faults(table: pa.Table, job: RetrieveJob) -> dict[int, Fault]:
    """Return why queries cannot be answered of whose filter cannot be told what passes it."""
    return {
        int(number): ("bad_filter", f"{sql}: {job.filters[sql].fault}")
        for sql, numbers in by_filter(table)
        if sql is not None and job.filters[sql].fault is not None
        for number in numbers
    }


def _filter_facts(able: pa.Table, job: RetrieveJob, n_results: int) -> dict[str, int]:
    """Return what filters did to n queries that were answered, or not, with so many results."""
    expected = filtered = few = compared = 0
    for sql, numbers in by_filter(able):
        k = job.k(sql)
        expected += len(numbers) * k
        if sql is not None:
            filtered += len(numbers)
            few += len(numbers) * (k < job.k())
            compared += len(numbers) * all(f.among(sql, job.filters).compares_all for f in job.finders)
    return {
        "missing_results": expected - n_results,
        "filtered_queries": filtered,
        "few_passing": few,
        "compared_all": compared,
    }


def _without_result(queries: pa.Table, filters: Mapping[str, Passes]) -> pa.Table:
    asked = queries[FILTER].to_pylist() if FILTER in queries.column_names else [None] * len(queries)
    told = [
        f"nothing passes its filter {sql}"
        if sql is not None and not filters[sql].rows
        else "nothing was found for it"
        for sql in asked
    ]
    detail = pa.array(told, pa.string())
    queries = queries.drop_columns(["reason", "detail"]).append_column("detail", detail)
    return queries.append_column("reason", pa.array(["no_result"] * len(queries), pa.string()))


def _as_candidates(table: pa.Table, more: pa.Schema) -> pa.Table:
    """Return a table with the columns of CANDIDATE_SCHEMA and some more, null where it has none."""
    schema = pa.schema([*CANDIDATE_SCHEMA, *more])
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
