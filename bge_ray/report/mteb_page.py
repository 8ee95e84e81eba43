"""The page of an mteb run: scores by task and model, means beside published ones, and who was measured."""

from collections.abc import Iterable

from bge_ray.records.reports import Mean, MtebReport
from bge_ray.report.page import Html, bullets, page, paragraph, section, table, tiles
from bge_ray.report.sections import failures_section, phase_bars, run_section, stage_bars, wall_figure
from bge_ray.report.words import count, duration


def mteb_page(report: MtebReport) -> bytes:
    """Return the page of an mteb run."""
    tasks = list(dict.fromkeys(score.task for score in report.results))
    figures = [
        ("Models", f"{len(report.contestants):,}", "by weights and settings"),
        ("Tasks", f"{len(tasks):,}", count(len(report.results), "result")),
        wall_figure(report),
    ]
    parts = [
        tiles(figures),
        failures_section(report),
        section("Means", *_means(report)),
        section("Scores", *_scores(report, tasks)),
        section("Who was measured", *_contestants(report)),
        section("Left out", *_left_out(report)),
        section("Where the time went", phase_bars(report), *_stages(report)),
        run_section(
            report, [("Output", report.output), ("mteb", report.mteb_version), ("Rules", report.rules)]
        ),
    ]
    done = f"{count(len(report.results), 'result')} on {count(len(tasks), 'task')}"
    lead = f"{report.outcome}: {done}" if report.complete else report.outcome
    return page("MTEB", "good" if report.complete else "bad", lead, parts)


def difference(mean: Mean) -> str:
    """Return by how much a mean is above the published one, with its sign; nothing where one is missing."""
    if mean.score is None or mean.published is None:
        return ""
    return f"{mean.score - mean.published:+.2f}"


def _means(report: MtebReport) -> Iterable[Html]:
    rows = [
        (
            mean.type or mean.name,
            mean.model,
            f"{mean.done} of {mean.tasks}",
            "" if mean.score is None else f"{mean.score:.2f}",
            "" if mean.published is None else f"{mean.published:.2f}",
            difference(mean),
        )
        for mean in report.means
    ]
    shown = table(rows, ("mean over tasks", "model", "tasks", "score", "published", "difference"))
    if shown:
        yield paragraph(
            "In per cent. A mean of which a task is missing is none; a kind weighs as many tasks as it has."
        )
        yield shown


def _scores(report: MtebReport, tasks: list[str]) -> Iterable[Html]:
    models = [f"{one.name} {one.revision}" for one in report.contestants]
    found = {(score.model, score.task): score for score in report.results}
    kinds = {score.task: score.type for score in report.results}
    rows = []
    for task in tasks:
        scores = [found.get((model, task)) for model in models]
        rows.append((task, kinds[task], *("" if one is None else f"{100 * one.score:.2f}" for one in scores)))
    shown = table(rows, ("task", "type", *models))
    if shown:
        yield paragraph(
            "Main scores in per cent, as mteb reckons them. Empty is a task that is none for the model."
        )
        yield shown


def _contestants(report: MtebReport) -> Iterable[Html]:
    rows = [
        (
            one.name,
            one.revision,
            one.model or "",
            one.search or "",
            one.reranker or "",
            one.dtype,
            f"{one.max_length:,}",
            _spent(report, f"{one.name} {one.revision}"),
        )
        for one in report.contestants
    ]
    yield table(
        rows, ("name", "revision", "encoder", "search", "reranker", "dtype", "max_length", "evaluation")
    )
    yield bullets(f"{one.name}: {one.note}" for one in report.contestants if one.note)


def _spent(report: MtebReport, model: str) -> str:
    return duration(sum(score.seconds or 0.0 for score in report.results if score.model == model))


def _left_out(report: MtebReport) -> Iterable[Html]:
    rows = [(task, f"{left_out:,}") for task, left_out in sorted(report.left_out.items())]
    shown = table(rows, ("task", "passages without a vector and queries without a result"))
    if shown:
        yield paragraph("Of what this run did, over all models; the log names them.")
        yield shown


def _stages(report: MtebReport) -> list[Html]:
    stages = sorted(report.stage_s.items(), key=lambda entry: -entry[1])
    return stage_bars(((name, seconds, "") for name, seconds in stages), "By kinds of tasks:")
