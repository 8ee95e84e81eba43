"""The page of a training: how the loss fell, and what held-out queries say of the model before and after."""

from typing import Any

from bge_ray.records.reports import HeldOut, TrainReport
from bge_ray.report.page import ACCENT, FAINT, Html, page, paragraph, picture, pictures, section, table, tiles
from bge_ray.report.sections import (
    advice_section,
    cost_rows,
    failures_section,
    left_out,
    left_out_figure,
    phase_bars,
    price_figure,
    run_section,
    stage_bars,
    wall_figure,
)
from bge_ray.report.words import count


def train_page(report: TrainReport) -> bytes:
    """Return the page of a training."""
    figures = [
        ("Steps", f"{report.steps:,}", f"of {count(report.batch_queries, 'query', 'queries')}"),
        *_gain(report),
        wall_figure(report),
        left_out_figure(report, report.left_out),
        price_figure(report),
    ]
    parts = [
        tiles(figures),
        failures_section(report),
        section("Before and after", *_before_after(report)),
        advice_section(report),
        section("Loss", *_curve(report)),
        section("Data", *_data(report)),
        section("Cost", table(cost_rows(report))),
        section("Where the time went", *_time(report)),
        run_section(report, _identity(report)),
    ]
    lead = report.outcome
    if report.complete:
        lead = f"{report.outcome}: {report.steps:,} steps of {report.batch_queries:,} queries"
    return page("Training", "good" if report.complete else "bad", lead, parts)


def _gain(report: TrainReport) -> list[tuple[str, str, str]]:
    found = report.figures
    if found is None:
        return []
    before = "a new head" if found.before is None else f"{found.before.mean:.3f} before"
    return [("MRR@10", f"{found.after.mean:.3f}", before)]


def _before_after(report: TrainReport) -> list[Html]:
    found = report.figures
    if found is None:
        return (
            [paragraph("Nothing was measured: train.held_out names no queries.")] if report.complete else []
        )
    rows = [
        (name, *_numbers(figure))
        for name, figure in (
            ("before", found.before),
            ("after", found.after),
            ("difference", found.difference),
        )
        if figure is not None
    ]
    among = "the texts of its own line" if report.kind == "reranker" else "the texts of all of them"
    words = f"{count(found.queries, 'held-out query', 'held-out queries')}, each against {among}."
    if found.before is None:
        words += " Before, the head was random."
    if found.p_value is not None:
        words += f" A difference as large comes by chance with p = {found.p_value:.4f}."
    return [paragraph(words), table(rows, ("model", "MRR@10", "interval (95 %)"))]


def _numbers(figure: HeldOut) -> tuple[str, str]:
    return f"{figure.mean:.4f}", f"{figure.low:.4f} to {figure.high:.4f}"


def _curve(report: TrainReport) -> list[Html]:
    if not report.curve:
        return []
    steps = [point.step for point in report.curve]

    def loss(axes: Any) -> None:
        losses = [point.loss for point in report.curve]
        axes.plot(steps, losses, color=FAINT, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=ACCENT)

    def rate(axes: Any) -> None:
        axes.plot(steps, [point.learning_rate for point in report.curve], color=ACCENT)

    return [pictures(picture("Loss", "step", "loss", loss), picture("Learning rate", "step", "rate", rate))]


def _smooth(values: list[float]) -> list[float]:
    """Return the mean of each value and its neighbours, a twentieth of all on both sides together."""
    reach = max(1, len(values) // 40)
    windows = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _data(report: TrainReport) -> list[Html]:
    words = (
        f"{report.examples:,} examples, in {report.steps * report.batch_queries:,} queries of all steps; "
        f"{report.left_out:,} more have the text of a held-out query and were not trained on."
    )
    return [paragraph(words), *left_out(report, "", report.data)] if report.left_out else [paragraph(words)]


def _time(report: TrainReport) -> list[Html]:
    stages = [(name, seconds, "") for name, seconds in report.stage_s.items()]
    return [phase_bars(report), *stage_bars(stages, "Of this run:")]


def _identity(report: TrainReport) -> list[tuple[str, str]]:
    return [
        ("Model", report.model.name + (", with a new head" if report.fresh_head else "")),
        ("Revision", report.model.revision or "none"),
        ("sha256 of its files", report.model.weights_sha256),
        ("Data", report.data),
        ("sha256 of the examples", report.data_sha256),
        ("Output", report.output),
        ("Began behind step", f"{report.resumed_from:,}"),
        ("Workers begun anew", f"{report.restarts:,}"),
    ]
