"""What a campaign came to: figures for machines and a table for people."""

from collections import Counter
from typing import Any


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the lines of trials.jsonl."""
    blows = Counter(blow.partition(" @ ")[0] for line in lines for run in line["blows"] for blow in run)
    noise: Counter[str] = Counter()
    for line in lines:
        noise.update(line["noise"])
    return {
        "trials": len(lines),
        "ok": sum(line["outcome"] == "ok" for line in lines),
        "broken": [line["trial"] for line in lines if line["outcome"] != "ok"],
        "runs": sum(line["runs"] for line in lines),
        "kills": dict(blows.most_common()),
        "injected": dict(noise.most_common()),
        "rows_checked": sum(line["rows"] for line in lines),
        "rows_lost": sum(line["lost"] for line in lines),
        "rows_doubled": sum(line["doubled"] for line in lines),
        "with_index": sum("index" in line["jobs"] for line in lines),
        "with_changed_corpus": sum(line["change"] is not None for line in lines),
        "on_a_cluster": sum(line["cluster"] for line in lines),
        "seconds": round(sum(line["seconds"] for line in lines), 1),
    }


def as_markdown(summary: dict[str, Any]) -> str:
    """Return the summary as a table."""
    rows = [
        ("trials", summary["trials"]),
        ("of them all guarantees held", summary["ok"]),
        ("on a cluster of two nodes, with a corpus that changed, with an index", _three(summary)),
        ("runs of a job", summary["runs"]),
        ("kills and restarts", _counts(summary["kills"])),
        ("requests failed on purpose", _counts(summary["injected"])),
        ("rows checked", f"{summary['rows_checked']:,}"),
        ("rows lost", summary["rows_lost"]),
        ("rows doubled", summary["rows_doubled"]),
        ("trials with a broken guarantee", ", ".join(map(str, summary["broken"])) or "none"),
    ]
    return "\n".join(["| what | how many |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _three(summary: dict[str, Any]) -> str:
    return f"{summary['on_a_cluster']}, {summary['with_changed_corpus']}, {summary['with_index']}"


def _counts(counts: dict[str, int]) -> str:
    each = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"{sum(counts.values())} ({each})" if counts else "0"
