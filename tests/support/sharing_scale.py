"""What `output.reuse: corpus` saves of a corpus that repeats, and what each step takes.

    python -m tests.support.sharing_scale --rows 20000 --work /tmp/sharing

The corpus is docstrings of this Python, 60 % of the rows repeats of others in any file. All of it runs in one
process, without Ray, one task after the other; a task whose memory is told runs in a fork of its own. The
figures of docs/measured.md are this program's.
"""

import argparse
import os
import random
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bge_ray.pipeline.embed import job, sharing
from bge_ray.records.reports import EmbedReport
from bge_ray.settings.sections import parse_settings
from tests.support import alone
from tests.support.corpora import docstrings, jsonl_bytes, parquet_bytes
from tests.support.models import make_encoder

FILES = 10
DISTINCT = 0.4


def make_corpus(folder: Path, n_rows: int, seed: int = 0) -> None:
    """Write rows as files, Parquet and JSONL in turn; of each text that repeats, wherever it falls."""
    rng = random.Random(seed)
    texts: dict[str, dict[str, str]] = {}
    for row in docstrings(2 * n_rows):
        texts.setdefault(f"{row['title']} {row['text']}", row)
    distinct = list(texts.values())[: int(DISTINCT * n_rows)]
    rows = [*distinct, *rng.choices(distinct, k=n_rows - len(distinct))]
    rng.shuffle(rows)
    folder.mkdir(parents=True)
    for k in range(FILES):
        some = [{**row, "id": f"{k} {n}"} for n, row in enumerate(rows[k::FILES])]
        data = parquet_bytes(some) if k % 2 else jsonl_bytes(some)
        (folder / f"{k:02d}.{'parquet' if k % 2 else 'jsonl'}").write_bytes(data)


def in_a_fork(run: Callable[[], Any]) -> tuple[int, float]:
    """Return the bytes by which a fork of this process grows at most while it runs something, and its CPU.

    Files that it writes are there afterwards.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far
        before, began = _status("VmRSS"), time.process_time()
        run()
        spent = time.process_time() - began
        os.write(writing, f"{_status('VmHWM') - before} {spent}".encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as told:
        n_bytes, seconds = told.read().split()
    return int(n_bytes), float(seconds)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Meter:
    """The CPU seconds of each step, and the largest memory of each kind of task."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.bytes: defaultdict[str, int] = defaultdict(int)

    def timed(self, name: str, run: Callable[[], Any]) -> Any:
        before = time.process_time()
        result = run()
        self.seconds[name] += time.process_time() - before
        return result

    def measured(self, name: str, run: Callable[[], Any]) -> Any:
        n_bytes, seconds = in_a_fork(run)
        self.bytes[name] = max(self.bytes[name], n_bytes)
        self.seconds[name] += seconds
        return run()

    def way(self, model: Any, stage: type, sizes: Any, watch: Any, book: Any, interval: float) -> Any:
        """Return `alone.by_calls` under this meter."""
        way = alone.by_calls(model, stage, sizes, watch, book, interval)

        def run(does: str, task: Callable[..., Any], arguments: Any) -> list[Any]:
            name = task.__name__.removesuffix("_task")
            return [self.measured(name, lambda some=some: task(*some)) for some in arguments]

        return sharing.Way(run, way.encode)

    def through(self, read: Any, write: Any, given: Any, model: Any, tasks: Any) -> Iterator[Any]:
        """Do what `alone.through` does."""
        actor = alone.actor_for(model)
        kind = " given" if read is sharing.read_given_stage else ""
        for task in tasks:
            batch = task.parcel().to_batch()
            for one in self.measured(f"read{kind}", lambda batch=batch: list(read(batch, given))):
                done = self.timed(f"encode{kind}", lambda one=one: actor(one))
                for out in self.measured(f"write{kind}", lambda done=done: list(write(done, given))):
                    yield alone.Parcel.from_batch(out)


def run(work: Path, model: Path, reuse: str) -> tuple[EmbedReport, Meter]:
    """Embed the corpus in this process."""
    keys = {
        "corpus.uri": work / "corpus",
        "output.uri": work / f"out-{reuse}",
        "model.name": model,
        "model.max_length": 128,
        "output.reuse": reuse,
        "batching.unit_rows": 2_000,
    }
    meter = Meter()
    with (
        alone.without_ray(),
        patch.object(job, "by_ray", meter.way),
        patch.object(alone, "through", meter.through),
    ):
        settings = parse_settings(None, [f"{key}={value}" for key, value in keys.items()])
        return job.embed(settings).report, meter


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--work", type=Path, default=None)
    asked = parser.parse_args()
    work = asked.work or Path(tempfile.mkdtemp(prefix="sharing-scale-"))
    model = make_encoder(work / "model")
    make_corpus(work / "corpus", asked.rows)
    for reuse in ("off", "object", "corpus"):
        report, meter = run(work, model, reuse)
        print(f"{reuse}: {report.tokens:,} tokens, {report.tokens_encoded:,} encoded", end="")
        print(f" ({report.tokens_encoded / report.tokens:.1%}), {report.vectors_reused}", flush=True)
        for name, seconds in meter.seconds.items():
            told = f", at most {meter.bytes[name] / 1e6:,.0f} MB a task" if name in meter.bytes else ""
            print(f"  {name:<16} {seconds:8.1f} s of CPU{told}", flush=True)


if __name__ == "__main__":
    main()
