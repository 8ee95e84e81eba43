"""The whole job on the device: reading, tokenising, encoding and committing, beside its bare loop."""

import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bge_ray.bench.device.plan import Note, Plan, run_within
from bge_ray.bench.device.shapes import natural_lengths
from bge_ray.bench.models import TOKENIZER_FILES, make_encoder
from bge_ray.errors import SettingsError
from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
from bge_ray.pipeline.engine.pools import UNITS_AT_A_GPU
from bge_ray.settings.sections import ModelSettings

ROWS_A_FILE = 25_000
SHAPE = "base"
# Units at once in an actor, and what is changed against the defaults; the most telling first.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "defaults": (UNITS_AT_A_GPU, {}),
    "one unit at a time": (1, {}),
    "units of 50,000 rows": (UNITS_AT_A_GPU, {"batching.unit_bytes": 250_000_000}),
    "two encoders on the GPU": (
        UNITS_AT_A_GPU,
        {"resources.num_encoders": 2, "resources.gpus_per_encoder": 0.5},
    ),
}
_COMMAND = """
from bge_ray.command import main
from bge_ray.pipeline.engine import pools
pools.UNITS_AT_A_GPU = {units}
main()
"""


def run(plan: Plan, note: Note) -> None:
    """Note what each way of running the job came to, and the loop over the same texts without Ray."""
    model = make_job_model(plan)
    corpus = make_corpus(plan)
    note("corpus", {"rows": corpus[1], "tokens": corpus[2]})
    found: dict[str, Any] = {}
    for name, (units, settings) in RUNS.items():
        if plan.left < (35 if plan.on_gpu else 15):
            found[name] = {"left_out": "no time was left"}
        else:
            found[name] = _run(plan, model, corpus[0], (units, settings), plan.left)
        note("runs", found)
        if name == "defaults":
            note("loop", _loop(plan, model, corpus[0]))


def make_job_model(plan: Plan) -> Path:
    """Return the folder of a random model with the tokenizer of the plan.

    Raises:
        SettingsError: there is none.
    """
    if plan.tokenizer is None:
        raise SettingsError("no tokenizer: install bge-ray[demo], or name a folder by --tokenizer")
    source = Path(plan.tokenizer)
    folder = Path(plan.work) / "job-model"
    if not plan.on_gpu:
        return source
    if not (folder / "config.json").is_file():
        make_encoder(SHAPE, folder, source)
    return folder


def make_corpus(plan: Plan) -> tuple[Path, int, int]:
    """Write shuffled words of the tokenizer's vocabulary, of natural lengths.

    Returns:
        The folder, its rows, and about how many tokens they have.
    """
    # Texts are repeated, as a million take longer to make than to embed; nothing here looks for repeats.
    folder, (n_rows, repeats) = Path(plan.work) / "corpus", (250_000, 4) if plan.on_gpu else (1_500, 1)
    lengths = natural_lengths(n_rows)
    if not folder.is_dir():
        folder.mkdir()
        text = (Path(str(plan.tokenizer)) / TOKENIZER_FILES[0]).read_text()
        words = [w for w in json.loads(text)["model"]["vocab"] if w.isascii() and w.isalpha() and len(w) > 2]
        picked = np.random.default_rng(2).integers(0, len(words), 4_000_000)
        at = 0
        for start in range(0, n_rows, ROWS_A_FILE):
            texts = []
            for length in lengths[start : start + ROWS_A_FILE].tolist():
                if at + length > len(picked):
                    at = 0
                texts.append(" ".join([words[i] for i in picked[at : at + length - 2]]))
                at += length
            column = pa.array(texts)
            for turn in range(repeats):
                first = turn * n_rows + start
                ids = [str(i) for i in range(first, first + len(texts))]
                pq.write_table(
                    pa.table({"id": ids, "text": column}), folder / f"part-{first // ROWS_A_FILE:04d}.parquet"
                )
    return folder, repeats * n_rows, repeats * int(lengths.sum())


def texts_of(corpus: Path, most: int) -> list[str]:
    """Return the first texts of a corpus."""
    texts: list[str] = []
    for path in sorted(corpus.glob("*.parquet")):
        texts += pq.read_table(path, columns=["text"])["text"].to_pylist()
        if len(texts) >= most:
            break
    return texts[:most]


def _loop(plan: Plan, model_path: Path, corpus: Path) -> dict[str, float]:
    """Run the units of the job without Ray, storage and tokenising."""
    spec = resolve_encoder(ModelSettings(name=str(model_path)), on_gpu=plan.on_gpu)
    model = Model(spec, model_folder(spec), Place(plan.device, torch.get_num_threads()))
    budget = model.settle_budget("auto")
    rows = 50_000 if plan.on_gpu else 300
    tokens = text_feeder(spec).passages(texts_of(corpus, rows))
    batches = model.cut(tokens, budget)
    model.warm_up(budget)
    taken = []
    for _ in range(8 if plan.on_gpu else 3):
        started = time.perf_counter()
        model.run(tokens, batches, model.empty_result(len(tokens)))
        taken.append(time.perf_counter() - started)
    second = statistics.median(taken)
    return {"tokens_per_s": float(tokens.lengths.sum()) / second, "rows_per_s": len(tokens) / second}


def _run(
    plan: Plan, model: Path, corpus: Path, how: tuple[int, dict[str, Any]], seconds: float
) -> dict[str, Any]:
    units, settings = how
    out = Path(plan.work) / "job-out"
    shutil.rmtree(out, ignore_errors=True)
    keys = {
        "corpus.uri": str(corpus),
        "corpus.title_column": "null",
        "output.uri": str(out),
        "output.reuse": "off",
        "model.name": str(model),
        **settings,
    }
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-c", _COMMAND.format(units=units), "embed", *words]
    started = time.monotonic()
    log = Path(plan.work) / "job.log"
    run_within(command, log, seconds)
    report_path = out / "report.json"
    if not report_path.is_file():
        return {"error": log.read_text()[-1500:], "wall_s": time.monotonic() - started}
    report = json.loads(report_path.read_text())
    names = (
        "complete",
        "rows_out",
        "tokens",
        "wall_s",
        "startup_s",
        "steady_s",
        "tokens_per_s",
        "utilisation",
        "waiting",
        "padding_waste",
        "stage_s",
        "phase_s",
        "workers",
        "device",
        "readers_busy",
        "advice",
    )
    found = {name: report.get(name) for name in names}
    found["log"] = log.read_text()[-6000:]
    return found | {"steady_tokens_per_s": report["tokens"] / report["steady_s"]}
