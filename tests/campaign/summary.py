"""What a campaign came to: figures for machines and a table for people."""

from collections import Counter
from typing import Any


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the lines of trials.jsonl."""
    blows = Counter(blow.partition(" @ ")[0] for line in lines for run in line["blows"] for blow in run)
    codes = Counter(str(code) for line in lines for code in line["exit_codes"])
    noise: Counter[str] = Counter()
    for line in lines:
        noise.update(line["noise"])
    return {
        "trials": len(lines),
        "ok": sum(line["outcome"] == "ok" for line in lines),
        "broken": [line["trial"] for line in lines if line["outcome"] != "ok"],
        "lives": dict(Counter(job for line in lines for job in line["jobs"]).most_common()),
        "runs": sum(line["runs"] for line in lines),
        "exit_codes": dict(codes.most_common()),
        "kills": dict(blows.most_common()),
        "injected": dict(noise.most_common()),
        "rows_checked": sum(line["rows"] for line in lines),
        "rows_lost": sum(line["lost"] for line in lines),
        "rows_doubled": sum(line["doubled"] for line in lines),
        "foreign_laid": sum(line["foreign"]["laid"] for line in lines),
        "foreign_touched": sum(len(line["foreign"]["touched"]) for line in lines),
        "foreign_refused": sum(line["foreign"]["refused"] for line in lines),
        "reports_checked": sum(line["reports"] for line in lines),
        "runs_compared": sum(line["run_files"]["compared"] for line in lines),
        "runs_same_bytes": sum(line["run_files"]["same_bytes"] for line in lines),
        "with_changed_corpus": sum(line["change"] is not None for line in lines),
        "with_chunks": sum(line["chunked"] for line in lines),
        "with_changed_corpus_and_chunks": sum(
            line["chunked"] and line["change"] is not None for line in lines
        ),
        "with_texts_sought_in_the_whole_corpus": sum(line["reuse"] == "corpus" for line in lines),
        "with_a_grace": sum(bool(line["grace_s"]) for line in lines),
        "on_a_cluster": sum(line["cluster"] for line in lines),
        "seconds": round(sum(line["seconds"] for line in lines), 1),
    }


def as_markdown(summary: dict[str, Any]) -> str:
    """Return the summary as a table."""
    kinds = (
        *("on_a_cluster", "with_changed_corpus", "with_chunks", "with_changed_corpus_and_chunks"),
        *("with_texts_sought_in_the_whole_corpus", "with_a_grace"),
    )
    rows = [
        ("trials", summary["trials"]),
        ("of them all guarantees held", summary["ok"]),
        (
            "on two nodes; with a corpus that changed, chunks, both; texts sought everywhere; a grace",
            ", ".join(str(summary[kind]) for kind in kinds),
        ),
        ("lives that were struck at", _counts(summary["lives"])),
        ("runs of a job, calm ones among them, by exit code", _counts(summary["exit_codes"])),
        ("kills and restarts", _counts(summary["kills"])),
        ("requests failed on purpose", _counts(summary["injected"])),
        ("rows checked", f"{summary['rows_checked']:,}"),
        ("rows lost", summary["rows_lost"]),
        ("rows doubled", summary["rows_doubled"]),
        (
            "search and rerank runs compared, of them byte for byte the clean run's",
            f"{summary['runs_compared']}, {summary['runs_same_bytes']}",
        ),
        ("reports that said complete, each file of theirs checked", summary["reports_checked"]),
        ("foreign files laid", summary["foreign_laid"]),
        ("foreign files touched", summary["foreign_touched"]),
        ("runs refused for a foreign file in the way", summary["foreign_refused"]),
        ("trials with a broken guarantee", ", ".join(map(str, summary["broken"])) or "none"),
    ]
    return "\n".join(["| what | how many |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _counts(counts: dict[str, int]) -> str:
    each = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"{sum(counts.values())} ({each})" if counts else "0"
