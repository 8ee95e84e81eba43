"""The bench job: one command, one table, one run, with the alternatives side by side."""

import json
import logging
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bge_ray.bench.contestants import ENCODERS, RERANKERS, Task, write_corpus
from bge_ray.bench.machine import copy_rate, count_flop, describe_machine, matrix_rate
from bge_ray.bench.models import make_encoder, make_reranker
from bge_ray.errors import SettingsError
from bge_ray.model.tokenizer import Tokenizer
from bge_ray.pipeline.embed import CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET
from bge_ray.settings import BenchSettings, Settings

logger = logging.getLogger(__name__)

CONTESTANT_TIMEOUT_S = 3600
SHARDS = 8


def run_bench(settings: Settings, titles: list[str], texts: list[str]) -> dict[str, Any]:
    """Measure every contestant on every shape and length mix.

    Args:
        settings: section bench; model.dtype, resources.num_encoders and batching.token_budget where set.
        titles: of the passages; the queries of the reranker's pairs.
        texts: the passages.

    Returns:
        Machine, ceilings, and one table for each shape and length mix; also written to bench.output.
    """
    bench = settings.bench
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = (
        ("float16" if device == "cuda" else "float32")
        if settings.model.dtype == "auto"
        else settings.model.dtype
    )
    ceiling = matrix_rate(device, dtype)
    outcome: dict[str, Any] = {
        "machine": describe_machine(),
        "device": device,
        "dtype": dtype,
        "matrix_flop_per_s": ceiling,
        "copy_bytes_per_s": copy_rate(device),
        "tables": [],
    }
    with tempfile.TemporaryDirectory(prefix="bge-ray-bench-") as work:
        for shape in bench.shapes:
            model = make_encoder(shape, Path(work) / f"{shape}-encoder")
            cross = make_reranker(shape, Path(work) / f"{shape}-reranker")
            for mix in bench.lengths:
                task, lengths = _prepare(
                    settings, mix, model, cross, titles, texts, Path(work) / f"{shape}-{mix}", device, dtype
                )
                table = _measure(bench, task, ENCODERS)
                _add_rates(table, lengths, count_flop(str(model), lengths), ceiling)
                outcome["tables"].append({"shape": shape, "lengths": mix, "rows": table})
            if bench.pairs:
                task, _ = _prepare(
                    settings,
                    "natural",
                    model,
                    cross,
                    titles[: bench.pairs],
                    texts[: bench.pairs],
                    Path(work) / f"{shape}-pairs",
                    device,
                    dtype,
                )
                outcome["tables"].append(
                    {"shape": shape, "lengths": "pairs", "rows": _measure(bench, task, RERANKERS)}
                )
    folder = Path(bench.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(outcome, indent=1))
    (folder / "bench.md").write_text(to_markdown(outcome))
    return outcome


def to_markdown(outcome: dict[str, Any]) -> str:
    """Return the tables as Markdown; the ratio is that of our job, or reranker, to each other row."""
    machine = outcome["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    rate = f"{outcome['matrix_flop_per_s'] / 1e9:,.0f} GFLOP/s"
    lines = [f"{where}, {outcome['dtype']}, matrix rate {rate}, torch {machine['torch']}"]
    for table in outcome["tables"]:
        lines += ["", f"**{table['shape']}, {table['lengths']}**", ""]
        note = ""
        first = next(iter(table["rows"].values()))["rows_per_s"]
        lines += [
            "| | rows/s | tokens/s | utilisation | ours is faster by | runs |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in table["rows"].items():
            tokens, used = row.get("tokens_per_s"), row.get("utilisation")
            cells = [
                name,
                f"{row['rows_per_s']:,.1f}",
                f"{tokens:,.0f}" if tokens else "",
                f"{used:.0%}" if used else "",
                f"{first / row['rows_per_s']:.2f}",
                ", ".join(f"{s:.1f} s" for s in row["seconds"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
            if "waited" in row:
                note = (
                    f"{row['padding_waste']:.1%} of its tokens are padding, encoders wait {row['waited']:.1%}"
                )
        lines += ["", f"Our job: {note}."] if note else []
    return "\n".join(lines) + "\n"


def _prepare(
    settings: Settings,
    mix: str | int,
    model: Path,
    cross: Path,
    titles: list[str],
    texts: list[str],
    folder: Path,
    device: str,
    dtype: str,
) -> tuple[Task, np.ndarray]:
    max_length = 512 if mix == "natural" else int(mix)
    tokenizer = Tokenizer(model, max_length)
    chosen = texts[: settings.bench.rows]
    if mix != "natural":  # so long that each is cut to the same number of tokens
        chosen = [(text + " ") * (1 + 6 * max_length // max(1, len(text))) for text in chosen]
    lengths = tokenizer.tokenise(chosen).lengths
    write_corpus(folder, chosen, titles, SHARDS)
    one_each = torch.cuda.device_count() if device == "cuda" else torch.get_num_threads()
    budget = settings.batching.token_budget
    task = Task(
        corpus=str(folder),
        model=str(model),
        reranker=str(cross),
        dtype=dtype,
        max_length=max_length,
        num_encoders=settings.resources.num_encoders or one_each,
        token_budget=(GPU_TOKEN_BUDGET if device == "cuda" else CPU_TOKEN_BUDGET)
        if budget == "auto"
        else budget,
        unit_rows=max(1, -(-len(chosen) // SHARDS)),
        device=device,
    )
    return task, lengths


def _measure(bench: BenchSettings, task: Task, contestants: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run the contestants in turn, as often as asked; returns seconds and the median rate of each."""
    names = [name for name in contestants if name not in bench.leave_out]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    said: dict[str, dict[str, Any]] = {}
    rows = 0
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(asdict(task)))
        file.flush()
        for repeat in range(bench.repeats):
            for name in names:
                result = _run_apart(name, file.name)
                seconds[name].append(result["seconds"])
                rows = result["rows"]
                said[name] = {
                    key: result[key] for key in ("padding_waste", "waited") if result[key] is not None
                }
                logger.info(
                    "run %d of %d: %s: %.1f rows/s", repeat + 1, bench.repeats, name, rows / result["seconds"]
                )
    return {
        name: {"seconds": times, "rows_per_s": rows / statistics.median(times)}
        for name, times in seconds.items()
    }


def _run_apart(name: str, task_file: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bge_ray.bench.contestants", name, task_file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CONTESTANT_TIMEOUT_S, check=False)  # noqa: S603
    if done.returncode:
        raise SettingsError(
            f"contestant {name} failed; leave it out with bench.leave_out:\n{done.stderr[-2000:]}"
        )
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _add_rates(table: dict[str, dict[str, Any]], lengths: np.ndarray, flop: float, ceiling: float) -> None:
    """Add real tokens a second, and the share of the machine's matrix rate that they amount to."""
    for row in table.values():
        median = statistics.median(row["seconds"])
        row["tokens_per_s"] = float(lengths.sum()) / median
        row["utilisation"] = flop / median / ceiling
