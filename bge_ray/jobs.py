"""Every job as a command runs it: what it says of itself, which settings it reads, and its answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.settings.sections import Settings

# Settings, whether this is a dry run, and the stop request that signals reach, to the answer to be printed.
Action: TypeAlias = Callable[[Settings, bool, StopRequest], str]


@dataclass(frozen=True)
class Job:
    """A subcommand.

    ``reads`` are the sections and single keys of the settings that it reads, which `--help` lists. ``report``
    is where its report lies, as the key of a folder and a name in it, such as "output.uri/report.html"; None
    if it writes none.
    """

    name: str
    says: str
    reads: tuple[str, ...]
    action: Action
    report: str | None = None


def _embed(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    """Embed, and index on request, or say what would be done."""
    from bge_ray.pipeline.embed.job import embed, plan_only

    if dry_run:
        return "\n".join(plan_only(settings).lines())
    result = embed(settings, stop)
    outcome = f"{result.report.outcome}; report at {settings.output.uri}/report.html"
    if not settings.index.build:
        return outcome
    from bge_ray.pipeline.index.job import index_outcome

    return f"{outcome}\n{index_outcome(settings, stop)}"


def _index(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    from bge_ray.pipeline.index.job import index_outcome, plan_index

    if dry_run:
        return plan_index(settings)
    return index_outcome(settings, stop)


def _search(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    from bge_ray.pipeline.search.job import plan_search, search
    from bge_ray.storage.objects import join

    if dry_run:
        return plan_search(settings)
    report = search(settings, stop)
    return (
        f"{report.outcome}: {report.queries_out:,} of {report.queries_in:,} queries answered, "
        f"{report.results:,} results in {join(str(settings.search.output), 'run.parquet')}"
    )


def _rerank(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    from bge_ray.pipeline.rerank.job import plan_rerank, rerank
    from bge_ray.storage.objects import join

    if dry_run:
        return plan_rerank(settings)
    report = rerank(settings, stop)
    return (
        f"{report.outcome}: {report.pairs_out:,} of {report.pairs_in:,} pairs scored, "
        f"{report.queries:,} queries in {join(str(settings.rerank.output), 'run.parquet')}"
    )


def _mine(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    from bge_ray.pipeline.mine.job import mine, plan_mine

    if dry_run:
        return plan_mine(settings)
    report = mine(settings, stop)
    return (
        f"{report.outcome}: {report.negatives:,} negatives for {report.queries_out:,} of "
        f"{report.queries_in:,} queries in {settings.mine.output}/negatives.jsonl"
    )


def _merge(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    from bge_ray.pipeline.merge.job import merge, plan_merged

    if dry_run:
        return plan_merged(settings)
    report = merge(settings, stop)
    weights = ", ".join(f"{model.weight:.4f} {model.name}" for model in report.models)
    return f"{report.outcome}: {report.parameters:,} parameters of {weights} in {settings.merge.output}"


def _train(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    from bge_ray.pipeline.train.job import plan_train, train

    if dry_run:
        return plan_train(settings)
    report = train(settings, stop)
    figures = report.figures
    if figures is None:
        told = "nothing held out"
    elif figures.before is None:
        told = f"MRR@10 {figures.after.mean:.3f}"
    else:
        told = f"MRR@10 {figures.before.mean:.3f} before, {figures.after.mean:.3f} after"
    return f"{report.outcome}: {report.steps:,} steps, {told}, in {settings.train.output}"


def _mteb(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    from bge_ray.pipeline.mteb.job import mteb, plan_mteb
    from bge_ray.report.words import count

    if dry_run:
        return plan_mteb(settings)
    report = mteb(settings, stop)
    means = [
        f"{mean.name} {mean.score:.2f} ({mean.model})" for mean in report.means if mean.score is not None
    ]
    return "; ".join(
        [
            f"{report.outcome}: {count(len(report.results), 'result')} in {settings.mteb.output}/results",
            *means,
        ]
    )


def _evaluate(settings: Settings, dry_run: bool, _: StopRequest) -> str:
    from bge_ray.evaluate import evaluate, plan_evaluate
    from bge_ray.report.metrics_page import to_markdown

    return plan_evaluate(settings) if dry_run else to_markdown(evaluate(settings))


def _migrate(settings: Settings, dry_run: bool, stop: StopRequest) -> str:
    from bge_ray.migrate import migrate, plan_migrate

    return plan_migrate(settings) if dry_run else migrate(settings, stop)


def _bench(settings: Settings, dry_run: bool, _: StopRequest) -> str:
    if dry_run:
        bench = settings.bench
        return f"{bench.rows:,} passages, {bench.repeats} runs each, shapes {', '.join(bench.shapes)}"
    from bge_ray.bench.run import bench_docstrings, to_markdown

    return to_markdown(bench_docstrings(settings))


EVALUATE = Job(
    "evaluate",
    "Measure runs against judgements, side by side, with significance.",
    ("evaluate", "output.storage_timeout_s"),
    _evaluate,
    "evaluate.output/metrics.md",
)
JOBS = (
    Job(
        "embed",
        "Embed a corpus into Parquet shards, doing only what is not done yet.",
        ("corpus", "chunking", "model", "batching", "output", "resources", "report", "index"),
        _embed,
        "output.uri/report.html",
    ),
    Job(
        "index",
        "Build a FAISS index from embedding shards, and measure its recall.",
        ("output", "index", "model", "resources", "report"),
        _index,
        "output.uri/index/report.html",
    ),
    Job(
        "search",
        "Answer queries from a data set, as a TREC run and Parquet.",
        ("output", "search", "model", "batching", "resources", "report", "rerank", "corpus"),
        _search,
        "search.output/report.html",
    ),
    Job(
        "rerank",
        "Score candidate lists with a cross-encoder, as a TREC run and Parquet.",
        ("output", "corpus", "rerank", "search", "resources", "report"),
        _rerank,
        "rerank.output/report.html",
    ),
    Job(
        "mine",
        "Mine hard negatives for training, out of a data set that was embedded.",
        ("output", "mine", "search", "model", "batching", "resources", "report", "rerank", "corpus"),
        _mine,
        "mine.output/report.html",
    ),
    Job(
        "merge",
        "Merge models of one architecture into one, by given weights or by their losses on examples.",
        ("merge", "model", "report", "output.storage_timeout_s"),
        _merge,
        "merge.output/report.html",
    ),
    Job(
        "train",
        "Train an embedder or a reranker on queries with their positives and hard negatives.",
        ("train", "model", "rerank", "resources.address", "report", "output.storage_timeout_s"),
        _train,
        "train.output/report.html",
    ),
    Job(
        "mteb",
        "Measure models and rerankers on tasks of mteb, through embed, search and rerank.",
        (
            "mteb",
            "model",
            "rerank",
            "index",
            "search",
            "chunking",
            "batching",
            "output",
            "resources",
            "report",
        ),
        _mteb,
        "mteb.output/report.html",
    ),
    EVALUATE,
    Job(
        "migrate",
        "Embed with another model beside the data set in use, compare both, and move the pointer to it.",
        (
            *("migrate", "corpus", "chunking", "model", "batching", "output", "resources", "report", "index"),
            *("search", "evaluate.qrels", "evaluate.k"),
        ),
        _migrate,
        "migrate.output/migration.md",
    ),
    Job(
        "bench",
        "Measure tokens/s and utilisation of this machine beside what a user would pick instead.",
        ("bench", "model.dtype", "batching.token_budget", "resources.num_encoders"),
        _bench,
    ),
)
