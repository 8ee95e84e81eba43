"""The stages of reranking, for the rerank job and for a search that reranks: texts, tokens, scores."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bge_ray.errors import BgeRayError
from bge_ray.pipeline.engine.flow import by_actors, by_tasks
from bge_ray.pipeline.engine.isolation import Attempt
from bge_ray.pipeline.engine.model_stage import ModelJob, ModelStage
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.pools import Pool, Tasks
from bge_ray.pipeline.engine.rows import with_faults, with_tokens
from bge_ray.pipeline.engine.tokenise import load_pair_feeder, tokenise
from bge_ray.pipeline.rerank.texts import TextSource, add_texts
from bge_ray.pipeline.runs.groups import GroupTask, Workplace
from bge_ray.pipeline.runs.parts import Totals
from bge_ray.records.model import ModelSpec
from bge_ray.records.reports import Scoring
from bge_ray.report.facts import RunFacts
from bge_ray.settings.sections import Settings

if TYPE_CHECKING:
    from ray.data import Dataset


@dataclass(frozen=True)
class PairJob:
    """What the tasks that join and tokenise pairs must know; the first ``depth`` of a query are scored."""

    place: Workplace
    spec: ModelSpec
    trust_remote_code: bool
    depth: int


def by_reranker(
    rows: "Dataset",
    tasks: Tasks,
    pool: Pool,
    pair: PairJob,
    score: ModelJob,
    texts: TextSource | None,
) -> "Dataset":
    """Run groups of candidates through texts, tokens and the reranker; what comes out are their units."""
    rows = by_tasks(rows, texts_stage, tasks, source=texts, depth=pair.depth)
    rows = by_tasks(rows, pair_stage, tasks, job=pair)
    return by_actors(rows, ModelStage, pool, score)


def make_score_job(settings: Settings, place: Workplace, spec: ModelSpec, pool: Pool) -> ModelJob:
    """Return what the reranker pool must know; the automatic budget goes by its device."""
    return ModelJob(
        stage="score",
        spec=spec,
        device=pool.device,
        threads=pool.threads,
        token_budget=settings.rerank.token_budget,
        trust_remote_code=settings.rerank.trust_remote_code,
        ledger=place.ledger,
        max_attempts=place.max_attempts,
        units_at_once=pool.units_at_once,
    )


def texts_stage(batch: pa.Table, source: TextSource | None, depth: int) -> Iterator[pa.Table]:
    """Add the texts to a group's candidates, and yield its units one by one."""
    parcel = Parcel.from_batch(batch)
    if parcel.table is None:
        yield batch
        return
    started = time.time()
    table = parcel.table
    try:
        if source is not None:
            table = add_texts(table, source, depth)
    except BgeRayError as error:
        yield parcel.given_up(error).to_batch()
        return
    facts: Mapping[str, object] = {**parcel.facts, "texts_s": time.time() - started}
    rows = table["row_no"].to_numpy()
    task = parcel.task_as(GroupTask)
    for unit in task.todo:
        mine = (rows >= unit.first_row) & (rows < unit.first_row + unit.n_rows)
        yield task.of_unit(unit).parcel().filled(table.filter(pa.array(mine)), **facts).to_batch()
        facts = {}  # what the group cost is counted once, with its first unit


def pair_stage(batch: pa.Table, job: PairJob) -> pa.Table:
    """Tokenise the pairs of a unit; their texts stay behind."""
    parcel = Parcel.from_batch(batch)
    if parcel.table is None:
        return batch
    with Attempt(job.place.ledger, f"pair {parcel.name}") as attempt:
        if attempt.total_deaths >= job.place.max_attempts:
            return parcel.failed(f"its process died {attempt.total_deaths} times").to_batch()
        return _pair(parcel, parcel.table, job, attempt).to_batch()


def _pair(parcel: Parcel, table: pa.Table, job: PairJob, attempt: Attempt) -> Parcel:
    started = time.time()
    feeder = load_pair_feeder(job.spec, trust_remote_code=job.trust_remote_code)
    able = pc.and_(pc.is_valid(table["text"]), pc.is_null(table["reason"]))
    scored = np.flatnonzero(able.to_numpy()).astype(np.int64)
    pairs = table.select(["query", "text"]).take(pa.array(scored))
    queries, texts = pairs["query"].to_pylist(), pairs["text"].to_pylist()
    rows, tokens, faults = tokenise(
        attempt,
        "tokenising",
        len(scored),
        lambda piece: feeder.pairs([queries[i] for i in piece], [texts[i] for i in piece]),
    )
    table = with_faults(table, {int(scored[i]): fault for i, fault in faults.items()})
    table = with_tokens(table.drop_columns(["text", "query"]), scored[rows], tokens)
    return parcel.filled(
        table,
        pair_s=time.time() - started,
        pair_tokens=int(tokens.offsets[-1]),
        truncated_pairs=int(tokens.truncated.sum()),
    )


def summarise_scoring(spec: ModelSpec, facts: RunFacts, totals: Totals, counts: Mapping[str, int]) -> Scoring:
    """Return what the reranker pool did, for a report.

    Args:
        spec: of the reranker.
        facts: of this run.
        totals: of the published run.
        counts: by name, of the published run, or of this run as far as it came.
    """
    steady, pool = facts.steady_s, facts.workers.counts.get("rerankers", 0)
    tokens, padded = counts.get("pair_tokens", 0), counts.get("padded_tokens", 0)
    return Scoring(
        model=dataclasses.asdict(spec),
        pairs_out=totals.results.get("score", 0),
        pairs_rejected=totals.pairs_rejected,
        pair_tokens=tokens,
        truncated_pairs=counts.get("truncated_pairs", 0),
        padding_waste=1 - tokens / padded if padded else 0.0,
        pair_tokens_per_s=facts.counts["pair_tokens"] / steady if steady else 0.0,
        num_rerankers=pool,
        utilisation=facts.device_s / (steady * pool) if steady and pool else 0.0,
    )
