"""What a nightly run encodes of real rows: some changed, went and came, files were renamed and copied.

    python -m tests.support.reuse_scale --rows 20000 --kills 5 --work /tmp/reuse

The corpus is the docstrings of this Python. The figures of docs/measured.md are this program's.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.support.corpora import docstrings, jsonl_bytes, parquet_bytes
from tests.support.datasets import check_nothing_left_over, read_manifest, read_shards
from tests.support.models import make_encoder
from tests.support.runs import JobProcess

FILES = 10
SHARE = 0.01
# Which texts share a batch decides the last bits of their vectors.
LAST_BITS = 1e-5


@dataclass(frozen=True)
class Night:
    """A corpus in a folder, and what changed in it."""

    corpus: Path
    changed: int
    deleted: int
    added: int


def make_corpus(folder: Path, n_rows: int) -> list[list[dict[str, str]]]:
    """Write rows as files, Parquet and JSONL in turn; returns the rows of each."""
    rows = docstrings(int(n_rows * (1 + SHARE)) + 1)[:n_rows]
    folder.mkdir(parents=True)
    files = [rows[k * n_rows // FILES : (k + 1) * n_rows // FILES] for k in range(FILES)]
    for k, some in enumerate(files):
        _write(folder / _name(k), some)
    return files


def change_corpus(folder: Path, files: list[list[dict[str, str]]], seed: int = 0) -> Night:
    """Change, delete and add 1 % of the rows, in all files but two: one is renamed, one copied."""
    rng = random.Random(seed)
    n_rows = sum(map(len, files))
    places = [(k, n) for k in range(2, FILES) for n in range(len(files[k]))]
    each = int(n_rows * SHARE)
    struck = rng.sample(places, 2 * each)
    new = docstrings(n_rows + each + 1)[n_rows : n_rows + each]
    edited: list[list[dict[str, str] | None]] = [list(rows) for rows in files]
    for k, n in struck[:each]:
        edited[k][n] = {**files[k][n], "text": files[k][n]["text"] + f" Changed in night {seed}."}
    for k, n in struck[each:]:
        edited[k][n] = None
    for row in new:
        k = rng.randrange(2, FILES)
        edited[k].insert(rng.randrange(len(edited[k])), {**row, "id": f"new {row['id']}"})
    for k in range(2, FILES):
        _write(folder / _name(k), [row for row in edited[k] if row is not None])
    (folder / _name(0)).rename(folder / f"renamed-{_name(0)}")
    shutil.copy(folder / _name(1), folder / f"copy-of-{_name(1)}")
    return Night(folder, each, each, len(new))


def run_embed(work: Path, out: str, model: Path, log: Path, *, kill_after_s: float | None = None) -> Path:
    """Embed the corpus as a command does; killed after a while, or to the end."""
    keys = {
        "corpus.uri": work / "corpus",
        "output.uri": work / out,
        "model.name": model,
        "model.max_length": 128,
        "output.grace_s": 0,
        "output.reuse": "off" if out == "clean" else "object",
        "resources.num_encoders": 1,
    }
    job = JobProcess(log, {key: str(value) for key, value in keys.items()})
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        job.kill()
        return work / out
    assert job.wait(400) == 0, job.log()
    return work / out


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_bytes())
    return found


def differences(ours: Path, clean: Path) -> float:
    """Compare two data sets row for row, ids aside; returns the largest difference of a vector's number."""
    tables = [_sorted(read_shards(str(out))) for out in (ours, clean)]
    plain = [table.drop_columns(["embedding"]) for table in tables]
    assert plain[0].equals(plain[1])
    one, other = (np.stack(table["embedding"].to_numpy(zero_copy_only=False)) for table in tables)
    return float(np.abs(one - other).max())


def kill_and_finish(work: Path, out: str, model: Path, moments: Iterator[float]) -> Path:
    """Kill a run after each of some times, then let it end."""
    for moment in moments:
        run_embed(work, out, model, work / "killed.log", kill_after_s=moment)
    return run_embed(work, out, model, work / "killed.log")


def measure(work: Path, n_rows: int, kills: int) -> dict[str, float]:
    """Embed, change, embed again, beside a clean run, and the same killed at random moments."""
    model = make_encoder(work / "model")
    files = make_corpus(work / "corpus", n_rows)
    first = report_of(run_embed(work, "out", model, work / "log"))
    shutil.copytree(work / "out", work / "killed")
    night = change_corpus(work / "corpus", files)
    began = time.monotonic()
    again = report_of(run_embed(work, "out", model, work / "log"))
    took = time.monotonic() - began
    clean = run_embed(work, "clean", model, work / "log")
    figures: dict[str, float] = {
        "rows": n_rows,
        "rows changed, deleted, added": night.changed + night.deleted + night.added,
        "tokens of the first run": first["tokens_encoded"],
        "tokens of the rerun": again["tokens_encoded"],
        "share": again["tokens_encoded"] / first["tokens_encoded"],
        "rows to do": again["rows_in"],
        "rows reused": again["rows_reused"],
        "largest difference to a clean run": differences(work / "out", clean),
    }
    check_nothing_left_over(str(work / "out"))
    if kills:
        rng = random.Random(1)
        moments = [rng.uniform(2.0, took) for _ in range(kills)]
        killed = kill_and_finish(work, "killed", model, iter(moments))
        figures["killed runs"] = kills
        figures["killed: largest difference to a clean run"] = differences(killed, clean)
        figures["killed: largest difference to the undisturbed run"] = differences(killed, work / "out")
        figures["killed: same manifest"] = read_manifest(str(killed)) == read_manifest(str(work / "out"))
        check_nothing_left_over(str(killed))
    return figures


def _sorted(table: pa.Table) -> pa.Table:
    return table.drop_columns(["vector_id"]).sort_by(
        [("passage_id", "ascending"), ("text_hash", "ascending")]
    )


def _name(k: int) -> str:
    return f"{k:02d}.parquet" if k % 2 else f"{k:02d}.jsonl"


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(parquet_bytes(rows) if path.suffix == ".parquet" else jsonl_bytes(rows))


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--work", type=Path, default=None)
    asked = parser.parse_args()
    work = asked.work or Path(tempfile.mkdtemp(prefix="reuse-scale-"))
    for name, value in measure(work, asked.rows, asked.kills).items():
        print(f"{name:<50} {value:,.6g}", flush=True)


if __name__ == "__main__":
    main()
