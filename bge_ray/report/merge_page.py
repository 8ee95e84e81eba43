"""The page of a merge: which models went in, and by which weights."""

from bge_ray.records.reports import MergeReport
from bge_ray.report.page import page, paragraph, section, table, tiles
from bge_ray.report.sections import failures_section, phase_bars, run_section, wall_figure
from bge_ray.report.words import count, short


def merge_page(report: MergeReport) -> bytes:
    """Return the page of a merge."""
    figures = [
        ("Models", f"{len(report.models):,}", "merged into one"),
        ("Parameters", short(report.parameters), f"in {count(report.rows_out, 'tensor')}"),
        wall_figure(report),
    ]
    how = (
        f"by the losses on {report.examples:,} examples" if report.examples else "by weights that were given"
    )
    rows = [
        (
            model.name,
            f"{model.weight:.6f}",
            "" if model.loss is None else f"{model.loss:.4f}",
            model.revision or "",
            model.weights_sha256,
        )
        for model in report.models
    ]
    parts = [
        tiles(figures),
        failures_section(report),
        section(
            "Models",
            paragraph(f"Weighed {how}; configuration and tokenizer are the first one's."),
            table(rows, ("model", "weight", "loss", "revision", "sha256 of its files")),
        ),
        section("Where the time went", phase_bars(report)),
        run_section(report, [("Output", report.output)]),
    ]
    lead = f"{report.outcome}: {count(report.parameters, 'parameter')}" if report.complete else report.outcome
    return page("Merge of models", "good" if report.complete else "bad", lead, parts)
