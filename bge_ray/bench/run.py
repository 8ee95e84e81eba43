"""The bench job: one command, one table, one run, with the alternatives side by side."""

import itertools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bge_ray.bench.contestants import ENCODERS, NOT_HERE, RERANKERS, write_corpus
from bge_ray.bench.machine import copy_rate, count_flop, describe_machine, matrix_rate
from bge_ray.bench.models import make_encoder, make_reranker
from bge_ray.bench.task import NotHereError, Result, Task
from bge_ray.errors import SettingsError
from bge_ray.formats.docstrings import find_docstrings
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.spec import resolve_encoder
from bge_ray.settings.sections import BenchSettings, ModelSettings, Settings

logger = logging.getLogger(__name__)

RUN_TIMEOUT_S = 3600
# What one encoder does while the other has ended its last is a small part of the whole.
UNITS = 16
# A GPU does the few rows that a CPU core can in a tenth of a second, and below one token budget a unit.
CPU_ROWS, CPU_PAIRS = 3_000, 2_000
GPU_ROWS, GPU_PAIRS, GPU_UNIT_ROWS = 2_000_000, 200_000, 50_000
# So many tokens a text are a docstring's; of longer ones there are as many fewer.
NATURAL_TOKENS = 128
# Of a simulated pool: seconds a unit (as 50,000 short passages on a fast GPU take; none), units an encoder.
SIMULATED = ((10.0, 12), (0.0, 60))


def bench_docstrings(settings: Settings) -> dict[str, Any]:
    """Measure over the docstrings of this Python; see `run_bench`."""
    rows, pairs = _amounts(settings.bench, _device())
    passages = list(itertools.islice(find_docstrings(), max(rows, pairs)))
    return run_bench(settings, [title for _, title, _ in passages], [text for *_, text in passages])


def run_bench(settings: Settings, titles: list[str], texts: list[str]) -> dict[str, Any]:
    """Measure every contestant on every shape and length mix.

    Args:
        settings: section bench; model.dtype, resources.num_encoders and batching.token_budget where set.
        titles: of the passages; the queries of the reranker's pairs.
        texts: the passages; where there are fewer than bench asks for, they come again, in another order.

    Returns:
        Machine, ceilings, one table for each shape and length mix, and the simulated pool; also written
        to bench.output.
    """
    bench = settings.bench
    device = _device()
    rows, pairs = _amounts(bench, device)
    chosen = settings.model.dtype
    dtype = {"cuda": "float16", "cpu": "float32"}[device] if chosen == "auto" else chosen
    rates = {name: matrix_rate(device, name) for name in ("float32", "bfloat16", "float16")}
    outcome: dict[str, Any] = {
        "machine": describe_machine(),
        "device": device,
        "dtype": dtype,
        "matrix_flop_per_s": rates,
        "copy_bytes_per_s": copy_rate(device),
        "tables": [],
        "scheduling": [],
    }
    with tempfile.TemporaryDirectory(prefix="bge-ray-bench-") as work:
        for shape in bench.shapes:
            folder = Path(work) / shape
            basis = _basis(settings, shape, folder, device, dtype)
            for mix in bench.lengths:
                some = rows if mix == "natural" else rows * NATURAL_TOKENS // max(NATURAL_TOKENS, int(mix))
                task, lengths = _task(basis, mix, some, (titles, texts), folder / str(mix))
                table = _measure(bench, task, ENCODERS)
                flop = count_flop(basis.model, lengths, one_token=basis.one_token)
                _add_rates(table, lengths, flop, rates[dtype])
                outcome["tables"].append({"shape": shape, "lengths": mix, "rows": table})
            if pairs:
                task, _ = _task(basis, "natural", pairs, (titles, texts), folder / "pairs")
                table = _measure(bench, task, RERANKERS)
                outcome["tables"].append({"shape": shape, "lengths": "pairs", "rows": table})
    if bench.simulated_gpus:
        outcome["scheduling"] = [
            run
            for unit_s, units_each in SIMULATED
            for run in _schedule(bench.simulated_gpus, unit_s, units_each)
        ]
    target = Path(bench.output)
    target.mkdir(parents=True, exist_ok=True)
    (target / "bench.json").write_text(json.dumps(outcome, indent=1))
    (target / "bench.md").write_text(to_markdown(outcome))
    return outcome


def to_markdown(outcome: dict[str, Any]) -> str:
    """Return the tables as Markdown; the ratio is that of our job, or reranker, to each other row."""
    machine = outcome["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in outcome["matrix_flop_per_s"].items())
    copied = outcome["copy_bytes_per_s"] / 1e9
    lines = [
        f"{where}, torch {machine['torch']}; contestants run in {outcome['dtype']}",
        "",
        f"Matrix rate in GFLOP/s: {rates}; copies {copied:,.1f} GB/s",
    ]
    for table in outcome["tables"]:
        lines += ["", f"**{table['shape']}, {table['lengths']}**", "", *_table_lines(table["rows"])]
    if outcome["scheduling"]:
        lines += ["", "**Simulated encoders, one driver**", "", *_scheduling_lines(outcome["scheduling"])]
    return "\n".join(lines) + "\n"


def _table_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| | rows/s | tokens/s | utilisation | ours is faster by | runs |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(rows.values()))
    notes = []
    for name, row in rows.items():
        if "not_here" in row:
            notes += ["", f"{name}: {row['not_here']}."]
            continue
        tokens, used = row.get("tokens_per_s"), row.get("utilisation")
        cells = [
            name,
            f"{row['rows_per_s']:,.1f}",
            f"{tokens:,.0f}" if tokens else "",
            f"{used:.0%}" if used else "",
            f"{first['rows_per_s'] / row['rows_per_s']:.2f}",
            ", ".join(f"{s:.1f} s" for s in row["seconds"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        if row.get("waited") is not None:
            waste, waited = row["padding_waste"], row["waited"]
            notes += [
                "",
                f"{name}: {waste:.1%} of its tokens are padding, encoders wait {waited:.1%} of the time.",
            ]
    return lines + notes


def _scheduling_lines(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| encoders | seconds a unit | at once | units | units/s | busy | driver memory | driver CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        cells = [
            str(run["encoders"]),
            f"{run['unit_s']:g}",
            str(run["units_at_once"]),
            f"{run['units']:,}",
            f"{run['units_per_s']:.1f}",
            f"{run['busy']:.1%}" if run["busy"] is not None else "",
            f"{run['driver_bytes'] / 1e6:,.0f} MB",
            f"{run['driver_cpu']:.0%} of a core",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


@dataclass(frozen=True)
class _Basis:
    """What the tasks of one shape have in common."""

    settings: Settings
    model: str
    one_token: bool
    reranker: str
    device: str
    dtype: str


def _basis(settings: Settings, shape: str, folder: Path, device: str, dtype: str) -> _Basis:
    model = str(make_encoder(shape, folder / "encoder"))
    spec = resolve_encoder(ModelSettings(name=model), on_gpu=device == "cuda")
    reranker = str(make_reranker(shape, folder / "reranker"))
    return _Basis(settings, model, spec.pooling != "mean", reranker, device, dtype)


def _task(
    basis: _Basis, mix: str | int, n_rows: int, passages: tuple[list[str], list[str]], folder: Path
) -> tuple[Task, np.ndarray]:
    """Write n rows of a length mix; returns what contestants get, and the (n,) tokens of the rows."""
    settings = basis.settings
    titles, texts = (repeated(column, n_rows) for column in passages)
    max_length = 512 if mix == "natural" else int(mix)
    if mix != "natural":  # so long that each is cut to the same number of tokens
        texts = [(text + " ") * (1 + 6 * max_length // max(1, len(text))) for text in texts]
    lengths = TextFeeder(Path(basis.model), max_length).passages(texts).lengths
    on_gpu = basis.device == "cuda"
    units = max(1, -(-n_rows // GPU_UNIT_ROWS)) if on_gpu else UNITS
    write_corpus(folder, texts, titles, settings.bench.files or units)
    one_each = torch.cuda.device_count() if on_gpu else torch.get_num_threads()
    task = Task(
        corpus=str(folder),
        model=basis.model,
        reranker=basis.reranker,
        dtype=basis.dtype,
        max_length=max_length,
        num_encoders=settings.resources.num_encoders or one_each,
        token_budget=settings.batching.token_budget,
        unit_rows=max(1, -(-len(texts) // units)),
        device=basis.device,
    )
    return task, lengths


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _amounts(bench: BenchSettings, device: str) -> tuple[int, int]:
    """Return how many rows and pairs there are to be."""
    rows, pairs = (GPU_ROWS, GPU_PAIRS) if device == "cuda" else (CPU_ROWS, CPU_PAIRS)
    return rows if bench.rows == "auto" else bench.rows, pairs if bench.pairs == "auto" else bench.pairs


def repeated(items: list[str], count: int) -> list[str]:
    """Return the first of some items, or, where there are too few, all of them again and again.

    In the second case they are shuffled, always in the same way, so that every unit has some of all.
    """
    if count <= len(items):
        return items[:count]
    order = np.random.default_rng(0).permutation(count) % len(items)
    return [items[place] for place in order.tolist()]


def _measure(bench: BenchSettings, task: Task, contestants: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run the contestants in turn, as often as asked; returns seconds and the median rate of each."""
    names = [name for name in contestants if name not in bench.leave_out]
    results: dict[str, list[Result]] = {name: [] for name in names}
    not_here: dict[str, str] = {}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(asdict(task)))
        file.flush()
        for repeat in range(bench.repeats):
            for name in [name for name in names if name not in not_here]:
                try:
                    result = Result(**_run_apart("bge_ray.bench.contestants", name, file.name))
                except NotHereError as error:
                    not_here[name] = str(error)
                    continue
                results[name].append(result)
                rate = result.rows / result.seconds
                logger.info("run %d of %d: %s: %.1f rows/s", repeat + 1, bench.repeats, name, rate)
    return {
        name: _summary(found) if found else {"not_here": not_here[name]} for name, found in results.items()
    }


def _summary(results: list[Result]) -> dict[str, Any]:
    median = sorted(results, key=lambda result: result.seconds)[len(results) // 2]
    return {
        "seconds": [result.seconds for result in results],
        "rows_per_s": median.rows / statistics.median(result.seconds for result in results),
        "padding_waste": median.padding_waste,
        "waited": median.waited,
    }


def _schedule(encoders: int, unit_s: float, units_each: int) -> list[dict[str, Any]]:
    found = _run_apart("bge_ray.bench.scheduling", str(encoders), str(unit_s), str(units_each))
    runs: list[dict[str, Any]] = found["runs"]
    for run in runs:
        told = (encoders, unit_s, run["units_at_once"], run["units_per_s"])
        logger.info("%d simulated encoders, %g s a unit, %d at once: %.1f units/s", *told)
    return runs


def _run_apart(module: str, *words: str) -> dict[str, Any]:
    """Run a module of ours in a process of its own; returns the JSON of its last line."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)  # noqa: S603
    if done.returncode == NOT_HERE:
        raise NotHereError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise SettingsError(
            f"{module} {words[0]} failed; leave a contestant out with bench.leave_out:\n{done.stderr[-2000:]}"
        )
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _add_rates(table: dict[str, dict[str, Any]], lengths: np.ndarray, flop: float, ceiling: float) -> None:
    """Add real tokens a second, and the share of the machine's matrix rate that they amount to."""
    for row in table.values():
        if "seconds" in row:
            median = statistics.median(row["seconds"])
            row["tokens_per_s"] = float(lengths.sum()) / median
            row["utilisation"] = flop / median / ceiling
