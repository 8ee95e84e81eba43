"""What the figures of a run suggest to change, and from which value on."""

from typing import Any

# Shorter runs are mostly start-up and say little about settings.
MIN_STEADY_S = 60.0
LOW_UTILISATION = 0.8
# Of the encoders' time; below this, readers keep up.
HIGH_WAITING = 0.1
HIGH_PADDING = 0.1
HIGH_TRUNCATED = 0.2
# Of what corpus.max_rejected_fraction allows.
HIGH_REJECTED = 0.5
# Handing a unit on costs about 45 ms, so that a unit which computes for less than this wastes a tenth.
SMALL_UNIT_S = 0.45
MIN_UNITS = 20
LONG_STARTUP_S = 120.0
HIGH_STARTUP = 0.5


def advise(report: dict[str, Any]) -> list[str]:
    """Return what to change next, most valuable first; each line names the setting.

    Args:
        report: the facts of report.json, ``settings`` and ``model`` among them.
    """
    lines = [*_on_waiting(report), *_on_units(report), *_on_batches(report), *_on_rows(report)]
    if report["wall_s"] > LONG_STARTUP_S and report["startup_s"] > HIGH_STARTUP * report["wall_s"]:
        lines.append(
            f"{report['startup_s'] / report['wall_s']:.0%} of the time was start-up: keep the cluster warm, "
            "or run less often over more new objects."
        )
    return lines


def _on_waiting(report: dict[str, Any]) -> list[str]:
    if report["steady_s"] < MIN_STEADY_S or report["utilisation"] >= LOW_UTILISATION:
        return []
    busy = f"The encoders computed {report['utilisation']:.0%} of the time"
    if report["waiting"] >= HIGH_WAITING:
        readers = report["num_readers"]
        return [
            f"{busy} and waited for input {report['waiting']:.0%}: raise resources.num_readers above "
            f"{readers} (each takes a CPU core; they were busy {report['readers_busy']:.0%}), or add CPUs."
        ]
    return [
        f"{busy}, though input was there: too few units to keep {report['num_encoders']} encoders busy to "
        f"the end. Lower batching.unit_rows, or resources.num_encoders."
    ]


def _on_units(report: dict[str, Any]) -> list[str]:
    units = report["units_done"]
    if units < MIN_UNITS or report["stage_s"].get("encode", 0.0) / units >= SMALL_UNIT_S:
        return []
    unit_s = report["stage_s"].get("encode", 0.0) / units
    rows, limit = report["rows_in"] / units, report["settings"]["batching"]["unit_rows"]
    way = (
        f"raise batching.unit_rows above {limit:,}"
        if rows > 0.5 * limit
        else f"merge the corpus objects into larger ones (batching.unit_rows allows {limit:,})"
    )
    return [
        f"The units are small, {rows:,.0f} rows and {unit_s:.2f} s of encoding each, and handing one on "
        f"costs about 0.05 s: {way}."
    ]


def _on_batches(report: dict[str, Any]) -> list[str]:
    lines = []
    batching = report["settings"]["batching"]
    if report["memory_splits"]:
        lines.append(
            f"Batches that did not fit in memory and were halved: {report['memory_splits']:,}. Lower "
            f"batching.token_budget (it was {batching['token_budget']})."
        )
    if report["padding_waste"] > HIGH_PADDING:
        lines.append(
            f"{report['padding_waste']:.0%} of the computed tokens were padding: raise batching.unit_rows "
            f"above {batching['unit_rows']:,}, so that more texts are sorted by length together, or lower "
            "batching.token_budget."
        )
    return lines


def _on_rows(report: dict[str, Any]) -> list[str]:
    lines = []
    if report["rows_out"] and report["truncated"] > HIGH_TRUNCATED * report["rows_out"]:
        lines.append(
            f"{report['truncated'] / report['rows_out']:.0%} of the texts were cut at "
            f"{report['model']['max_length']:,} tokens: split them first, or raise model.max_length if the "
            "model has positions for more (which needs another output.uri)."
        )
    allowed = report["settings"]["corpus"]["max_rejected_fraction"] * report["rows_in"]
    if report["rows_rejected"] and report["rows_rejected"] > HIGH_REJECTED * allowed:
        lines.append(
            f"{report['rows_rejected']:,} rows were rejected, {allowed:,.0f} are allowed by "
            "corpus.max_rejected_fraction: mend the corpus (the folder rejected/ names each), or raise it."
        )
    return lines
