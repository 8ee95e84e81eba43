"""What a run would do and roughly take, measured on a sample of its own first passages."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import ray

from bge_ray.dataset.reuse import KnownTexts, hash_array, read_hashes
from bge_ray.formats.corpus import read_units
from bge_ray.formats.rows import check_rows
from bge_ray.model.feed.chunks import Chunker
from bge_ray.model.spec import model_folder, text_feeder
from bge_ray.pipeline.embed.prepare import Planned
from bge_ray.pipeline.embed.sources import nearest
from bge_ray.pipeline.embed.tasks import ReadTask, SpanTask
from bge_ray.pipeline.engine.pools import Pool, Sizes
from bge_ray.records.chunking import Chunking
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.model import ModelSpec
from bge_ray.records.outputs import row_bytes
from bge_ray.records.plan import Removal
from bge_ray.records.schemas import hash_texts
from bge_ray.settings.sections import Auto, Settings
from bge_ray.storage.objects import Storage

# Spans of small objects have few rows each, so more of them are looked at until there are rows enough.
SAMPLE_SPANS, MIN_SAMPLE_SPANS = 64, 3
SAMPLE_ROWS = 768
# What a GPU does with it takes milliseconds, so it does it over and over for so long.
GPU_SAMPLE_S = 1.0
# What handing a parcel from stage to stage takes, and what committing a unit, in seconds. The second is CPU
# time: 4.4 ms on a disk, and about 4 ms for each of two requests to S3; see docs/measured.md.
PARCEL_S, COMMIT_S = 0.045, 0.01


@dataclass(frozen=True)
class Share:
    """How many of some rows have vectors that can be reused; None where that cannot be told cheaply."""

    rows: int
    known: int | None

    @property
    def left(self) -> float:
        """Share of the rows that is to be encoded, as far as is known."""
        return 1.0 if not self.known else 1 - self.known / self.rows

    def __str__(self) -> str:
        if self.known is None:
            return "not known: texts are cut when they are read; what follows is without"
        return f"{self.known:,} of {self.rows:,} rows looked at have their texts' vectors"


@dataclass(frozen=True)
class Estimate:
    """What a run would do. The estimates rest on a sample and are None where nothing is to do.

    ``seconds`` is for all encoders together, start-up apart; ``memory_bytes`` of the object store.
    ``shares``: the run will look for its texts in all of the data set and of the corpus, which an estimate
    does not.
    """

    objects: int
    units: int
    units_todo: int
    rows: int
    rows_todo: int
    removal: Removal = field(default_factory=Removal)
    tokens: int | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    output_bytes: int | None = None
    num_encoders: int | None = None
    cost: float | None = None
    sample_runs: int = 1
    reused: "Share | None" = None
    shares: bool = False

    def lines(self) -> list[str]:
        """Return the estimate for a person."""
        lines = [
            f"objects          {self.objects:,}",
            f"units            {self.units:,}, {self.units_todo:,} to do",
            f"rows             {self.rows:,}, {self.rows_todo:,} to do",
        ]
        if self.removal:
            lines.append(f"gone             {self.removal}; they go from the data set")
        if (
            self.tokens is None
            or self.seconds is None
            or self.output_bytes is None
            or self.memory_bytes is None
        ):
            return lines
        if self.reused is not None:
            lines.append(f"reused           {self.reused}")
        if self.shares:
            lines.append(
                "shared           not known: texts elsewhere, and repeats, are found by the run alone"
            )
        lines += [
            f"tokens           about {self.tokens:,} to encode",
            f"time             about {self.seconds:,.0f} s on {self.num_encoders} encoders "
            f"({self.tokens_per_s:,.0f} tokens/s measured on a sample{_often(self.sample_runs)})",
            f"object store     about {self.memory_bytes / 1e6:,.0f} MB in flight",
            f"output           about {self.output_bytes / 1e6:,.1f} MB",
        ]
        return lines + ([f"cost             about {self.cost:,.2f}"] if self.cost is not None else [])


def estimate(planned: Planned, sizes: Sizes | None, settings: Settings) -> Estimate:
    """Estimate a run by reading, tokenising and encoding a sample of what it would do.

    Args:
        planned: the data set, its plan, and what is to do.
        sizes: of the stages, or None where nothing is to do.
        settings: for the token budget and the price.
    """
    units, todo = planned.plan.units(), planned.todo_units
    base = Estimate(
        objects=len(planned.plan.objects),
        units=len(units),
        units_todo=len(todo),
        rows=sum(unit.n_rows for unit in units),
        rows_todo=planned.todo_rows,
        removal=planned.removal,
    )
    if sizes is None or not todo:
        return base
    encoders, model = sizes.pools["encoders"], planned.spec.model
    budget = settings.batching.token_budget
    sampling = ray.remote(num_cpus=0)(sample_task)
    sample = _sample(planned)
    texts = sampling.remote(planned.dataset.storage, sample, planned.spec.columns)
    share: Share | None = None
    if any(span.sources for span in sample):
        looking = ray.remote(num_cpus=0)(share_task)
        share = ray.get(looking.remote(planned.dataset.storage, planned.dataset.root, planned.spec, sample))
    chunking = planned.spec.chunking
    measure = ray.remote(num_cpus=encoders.cpus, num_gpus=encoders.gpus)(measure_task)
    trust = settings.model.trust_remote_code
    measured = ray.get(measure.remote(model, chunking, texts, encoders, budget, trust))
    if measured is None:
        return base
    tokens_per_row, pieces_per_row, rate = measured.tokens, measured.pieces, measured.rate
    tokens = int(tokens_per_row * planned.todo_rows * (1.0 if share is None else share.left))
    handed_on = sum(task.n_parcels for task in planned.todo) * PARCEL_S + len(todo) * COMMIT_S
    seconds = tokens / (rate * encoders.count) + handed_on
    output_bytes = pieces_per_row * row_bytes(model.outputs, tokens_per_row / pieces_per_row)
    in_flight = 2 * encoders.count + sum(tasks.count for tasks in sizes.tasks.values())
    largest = max(_largest_parcel(task) for task in planned.todo)
    price = settings.report.price_per_hour
    return dataclasses.replace(
        base,
        tokens=tokens,
        tokens_per_s=rate * encoders.count,
        seconds=seconds,
        memory_bytes=int(in_flight * largest * (output_bytes + 8 * tokens_per_row)),
        output_bytes=int(planned.todo_rows * (output_bytes * 0.93 + 56 * pieces_per_row)),
        num_encoders=encoders.count,
        sample_runs=measured.runs,
        reused=share,
        shares=planned.places is not None,
        cost=None if price is None else price * encoders.devices * seconds / 3600,
    )


def _often(runs: int) -> str:
    return f", the median of {runs:,} runs in {GPU_SAMPLE_S:g} s" if runs > 1 else ""


def _largest_parcel(task: ReadTask) -> int:
    """Return the rows of the largest parcel that comes of a reading task."""
    rows = [unit.unit.n_rows for unit in task.todo]
    return sum(rows) if task.is_group else max(rows)


def _sample(planned: Planned) -> list[SpanTask]:
    """Return some spans with something to do, the same each time, from all over the corpus."""
    spans = [span for task in planned.todo for span in task.spans if span.todo]
    return [spans[place] for place in np.random.default_rng(0).permutation(len(spans))[:SAMPLE_SPANS]]


def sample_task(storage: Storage, spans: Sequence[SpanTask], columns: Columns) -> list[tuple[str, str, str]]:
    """Return passages of the first units of some spans; in a task, because a unit may be large.

    Each is its title, its text, and the two as a model reads them.
    """
    texts: list[tuple[str, str, str]] = []
    for span in spans:
        if len(texts) >= SAMPLE_ROWS:
            break
        first = {span.todo[0].unit.first_row}
        for _, rows in read_units(storage, span.corpus_object, span.span, columns, first):
            found = check_rows(rows)[0]
            some = zip(found.titles, found.bodies, found.texts, strict=True)
            texts += itertools.islice(some, SAMPLE_ROWS // MIN_SAMPLE_SPANS)
    return texts


def share_task(storage: Storage, root: str, spec: DatasetSpec, spans: Sequence[SpanTask]) -> Share:
    """Return how many rows of the sample's spans have vectors in the shards that a run would look at."""
    if spec.chunking is not None:
        return Share(0, None)
    looked = known = 0
    for span in spans:
        if looked >= SAMPLE_ROWS:
            break
        unit = span.todo[0].unit
        facts = [source.fact for source in nearest(span.sources, unit.first_row, unit.n_rows)]
        there = KnownTexts.of(facts, read_hashes(storage, root, facts))
        for _, rows in read_units(storage, span.corpus_object, span.span, spec.columns, {unit.first_row}):
            texts = check_rows(rows)[0].texts[: SAMPLE_ROWS // MIN_SAMPLE_SPANS]
            hashes = hash_array(hash_texts(spec.model.passage_instruction + text for text in texts))
            looked += len(texts)
            known += int(np.count_nonzero(there.find(hashes) >= 0))
    return Share(looked, known)


@dataclass(frozen=True)
class Measured:
    """Of a sample: tokens a row, vectors a row, tokens/s of one encoder (the median of ``runs`` runs)."""

    tokens: float
    pieces: float
    rate: float
    runs: int


def measure_task(
    spec: ModelSpec,
    chunking: Chunking | None,
    sample: list[tuple[str, str, str]],
    pool: Pool,
    budget: int | Auto,
    trust_remote_code: bool,
) -> Measured | None:
    """Measure one encoder on the texts of `sample_task`; None without any."""
    from bge_ray.model.run.model import Place, open_model  # torch, only where there is a model

    if not sample:
        return None
    titles, bodies, texts = zip(*sample, strict=True)
    feeder = text_feeder(spec, trust_remote_code=trust_remote_code)
    if chunking is None:
        tokens = feeder.passages(texts)
    else:
        tokens = Chunker(feeder, chunking).cut(titles, bodies).tokens
    model = open_model(spec, model_folder(spec), Place(pool.device, pool.threads, trust_remote_code))
    settled = model.settle_budget(budget)
    batches = model.cut(tokens, settled)
    model.warm_up(settled)
    model.run(tokens, batches[:2], model.empty_result(tokens.n_results))
    seconds: list[float] = []
    while not seconds or (pool.gpus and sum(seconds) < GPU_SAMPLE_S):
        # A result of its own: one that is filled already is written to faster than a new one.
        result = model.empty_result(tokens.n_results)
        started = time.perf_counter()
        model.run(tokens, batches, result)
        seconds.append(time.perf_counter() - started)
    total, n_rows = int(tokens.lengths.sum()), len(texts)
    return Measured(
        total / n_rows, tokens.n_results / n_rows, total / statistics.median(seconds), len(seconds)
    )
