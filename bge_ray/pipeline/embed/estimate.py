"""What a run would do and roughly take, measured on a sample of its own first passages."""

import time
from dataclasses import dataclass

import numpy as np
import ray

from bge_ray.dataset.folder import Dataset
from bge_ray.formats.corpus import read_units
from bge_ray.formats.rows import check_rows
from bge_ray.model.run.batching import settle_budget
from bge_ray.model.spec import model_folder, text_feeder
from bge_ray.pipeline.embed.tasks import SpanTask
from bge_ray.pipeline.engine.cluster import Sizes
from bge_ray.records.outputs import VALUE_BYTES
from bge_ray.records.dataset import DatasetSpec
from bge_ray.records.plan import Plan
from bge_ray.settings.sections import Settings

SAMPLE_SPANS = 3
SAMPLE_ROWS = 256


@dataclass(frozen=True)
class Estimate:
    """What a run would do. The estimates rest on a sample and are None where nothing is to do.

    ``seconds`` is for all encoders together, start-up apart; ``memory_bytes`` of the object store.
    """

    objects: int
    units: int
    units_todo: int
    rows: int
    rows_todo: int
    tokens: int | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    output_bytes: int | None = None
    num_encoders: int | None = None
    cost: float | None = None

    def lines(self) -> list[str]:
        """Return the estimate for a person."""
        lines = [
            f"objects          {self.objects:,}",
            f"units            {self.units:,}, {self.units_todo:,} to do",
            f"rows             {self.rows:,}, {self.rows_todo:,} to do",
        ]
        if (
            self.tokens is None
            or self.seconds is None
            or self.output_bytes is None
            or self.memory_bytes is None
        ):
            return lines
        lines += [
            f"tokens           about {self.tokens:,}",
            f"time             about {self.seconds:,.0f} s on {self.num_encoders} encoders "
            f"({self.tokens_per_s:,.0f} tokens/s measured on a sample)",
            f"object store     about {self.memory_bytes / 1e6:,.0f} MB in flight",
            f"output           about {self.output_bytes / 1e6:,.1f} MB",
        ]
        return lines + ([f"cost             about {self.cost:,.2f}"] if self.cost is not None else [])


def estimate(
    dataset: Dataset,
    spec: DatasetSpec,
    plan: Plan,
    todo: list[SpanTask],
    sizes: Sizes | None,
    settings: Settings,
) -> Estimate:
    """Estimate a run by reading, tokenising and encoding a sample of what it would do.

    Args:
        dataset: the output.
        spec: what the data set is.
        plan: all objects.
        todo: the spans with something to do.
        sizes: of the stages, or None where nothing is to do.
        settings: for the token budget and the price.
    """
    units = plan.units()
    rows_todo = sum(task.unit.n_rows for span in todo for task in span.todo)
    base = Estimate(
        len(plan.objects), len(units), sum(len(s.todo) for s in todo), sum(u.n_rows for u in units), rows_todo
    )
    if not todo or sizes is None:
        return base
    texts = _sample(dataset, spec, todo)
    if not texts:
        return base
    measure = ray.remote(num_cpus=sizes.encoder_cpus, num_gpus=sizes.encoder_gpus)(_measure)
    tokens_per_row, rate = ray.get(
        measure.remote(
            spec,
            texts,
            sizes,
            settle_budget(settings.batching.token_budget, on_gpu=sizes.device != "cpu"),
            trust_remote_code=settings.model.trust_remote_code,
        )
    )
    tokens = int(tokens_per_row * rows_todo)
    seconds = tokens / (rate * sizes.num_encoders)
    vector_bytes = spec.model.dim * VALUE_BYTES[spec.dtype]
    in_flight = sizes.num_readers + 2 * sizes.num_encoders + sizes.num_writers
    largest = max(task.unit.n_rows for span in todo for task in span.todo)
    price = settings.report.price_per_hour
    return Estimate(
        **{name: getattr(base, name) for name in ("objects", "units", "units_todo", "rows", "rows_todo")},
        tokens=tokens,
        tokens_per_s=rate * sizes.num_encoders,
        seconds=seconds,
        memory_bytes=int(in_flight * largest * (vector_bytes + 8 * tokens_per_row)),
        output_bytes=int(rows_todo * (vector_bytes * 0.93 + 40)),
        num_encoders=sizes.num_encoders,
        cost=None if price is None else price * sizes.devices * seconds / 3600,
    )


def _sample(dataset: Dataset, spec: DatasetSpec, todo: list[SpanTask]) -> list[str]:
    """Return texts from a few spans spread over the corpus."""
    chosen = [todo[int(i)] for i in np.unique(np.linspace(0, len(todo) - 1, SAMPLE_SPANS))]
    texts: list[str] = []
    for span in chosen:
        first = {span.todo[0].unit.first_row}
        for _, rows in read_units(dataset.storage, span.corpus_object, span.span, spec.columns, first):
            passages, _ = check_rows(rows)
            texts += passages.texts[:SAMPLE_ROWS]
            break
    return texts


def _measure(
    spec: DatasetSpec, texts: list[str], sizes: Sizes, budget: int, *, trust_remote_code: bool
) -> tuple[float, float]:
    """Return (tokens a row, tokens/s of one encoder) on sample texts."""
    from bge_ray.model.run.model import Model, Place  # torch, only where there is a model

    tokens = text_feeder(spec.model, trust_remote_code=trust_remote_code).passages(texts)
    place = Place(sizes.device, sizes.encoder_threads, trust_remote_code)
    model = Model(spec.model, model_folder(spec.model), place)
    batches = model.cut(tokens.lengths, budget)
    result = model.empty_result(len(tokens))
    model.run(tokens, batches[:2], result)
    started = time.perf_counter()
    model.run(tokens, batches, result)
    total = int(tokens.lengths.sum())
    return total / len(tokens), total / (time.perf_counter() - started)
