"""What the driver of an embed job holds and spends on a large corpus, without readers and encoders.

    python -m tests.support.driver_scale --work DIR [--objects 100000] [--units 10] [--unpublished 20000]

The corpus is as many objects of so many units as were scanned, of which nothing is read. What the run does
with them is its own code: the plan made, written and read back, what is to do, the manifest made and
published over shards that are there (files without a byte), a next run that finds nothing to do, and one
after a crash, whose markers lie there one by one. Each step is a process of its own; prints seconds, CPU
seconds, and by how much the process grew beyond what it has imported. Takes as many files below DIR as there
are units.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa

from bge_ray.dataset.commit import marker_path
from bge_ray.dataset.folder import Dataset
from bge_ray.formats.corpus import ScannedObject
from bge_ray.pipeline.embed.planning import extend_plan
from bge_ray.pipeline.embed.prepare import _subtract
from bge_ray.records.canonical import to_json
from bge_ray.records.columns import ColumnType
from bge_ray.records.dataset import FileFact, Marker, make_manifest
from bge_ray.records.plan import Coding, Span, Unit, UnitLimits, unit_fingerprint
from bge_ray.storage.objects import ObjectInfo, Storage
from tests.support.records import make_spec

UNIT_ROWS = 5_000
SHA = "0" * 64
SPEC = make_spec()
LIMITS = UnitLimits(UNIT_ROWS, 10**9, 1_000)


def scanned_objects(objects: int, units: int) -> list[ScannedObject]:
    """Return what a scan of the corpus found."""
    rows = (UNIT_ROWS,) * units
    columns = {name: ColumnType.of(pa.string()) for name in ("id", "title", "text")}
    return [
        ScannedObject(
            ObjectInfo(
                f"s3://bucket/corpus/part-{number:08d}.parquet", 10**9, f"{number:032x}", f"{number:032x}"
            ),
            Coding("parquet"),
            (Span(0, 10**9, 0, rows),),
            columns,
        )
        for number in range(objects)
    ]


def marker_of_unit(fingerprint: str, unit: Unit) -> Marker:
    """Return the marker of a unit all of whose rows came out, its shard a file without a byte."""
    path = f"embeddings/{unit.name}.parquet"
    n_rows = unit.n_rows
    return Marker(
        unit, fingerprint, n_rows, 0, n_rows, 50 * n_rows, 0, {}, FileFact(path, 0, SHA, n_rows), None
    )


def markers_of(dataset: Dataset) -> list[Marker]:
    """Return those of all units of the newest plan."""
    _, plan = dataset.latest_plan()
    assert plan is not None
    return [
        marker_of_unit(unit_fingerprint(SPEC.rows_fingerprint, there, unit), unit)
        for there in plan.objects
        for unit in there.units()
    ]


def plan_all(dataset: Dataset, asked: argparse.Namespace) -> Callable[[], object]:
    """Number all objects, say what is to do, and write the plan."""
    scanned = scanned_objects(asked.objects, asked.units)

    def work() -> None:
        plan = extend_plan({}, None, scanned, SPEC.columns, LIMITS)
        todo, _ = _subtract(SPEC, plan, {}, {})
        assert sum(len(task.todo) for task in todo) == asked.objects * asked.units
        assert dataset.create_plan(1, plan)

    return work


def lay_files(dataset: Dataset, asked: argparse.Namespace) -> Callable[[], object]:
    """Lay the shards; not a part of what is measured."""
    markers = markers_of(dataset)
    folder = Path(dataset.root, "embeddings")
    folder.mkdir()

    def work() -> None:
        for marker in markers:
            assert marker.embeddings is not None
            Path(dataset.root, marker.embeddings.path).touch()

    return work


def resume_interrupted(dataset: Dataset, asked: argparse.Namespace) -> Callable[[], object]:
    """Find what a run did that died before it published: its markers are one file each."""
    markers = markers_of(dataset)[: asked.unpublished]
    Path(dataset.root, "done").mkdir()
    for marker in markers:
        Path(dataset.root, marker_path(marker.unit)).write_bytes(to_json(marker))
    del markers

    def work() -> None:
        _, plan = dataset.latest_plan()
        assert plan is not None
        todo, there = _subtract(SPEC, plan, dataset.finished(), {})
        assert len(there) == asked.unpublished
        assert sum(len(task.todo) for task in todo) == asked.objects * asked.units - asked.unpublished

    return work


def publish_all(dataset: Dataset, asked: argparse.Namespace) -> Callable[[], object]:
    """Fold the markers of all units, look whether their files are there, and publish."""
    markers = markers_of(dataset)

    def work() -> None:
        manifest = make_manifest(SPEC.vector_fingerprint, markers)
        assert not dataset.missing_files(manifest)
        dataset.publish(manifest)

    return work


def find_nothing_to_do(dataset: Dataset, asked: argparse.Namespace) -> Callable[[], object]:
    """Read plan and manifest, and compare them to the last unit."""

    def work() -> None:
        _, plan = dataset.latest_plan()
        assert plan is not None
        todo, there = _subtract(SPEC, plan, dataset.finished(), {})
        assert (len(todo), len(there)) == (0, asked.objects * asked.units)

    return work


STEPS = {
    "plan": plan_all,
    "files": lay_files,
    "resume": resume_interrupted,
    "publish": publish_all,
    "again": find_nothing_to_do,
}


def main() -> int:
    """Run one step, or each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--units", type=int, default=10, help="of each object")
    parser.add_argument("--unpublished", type=int, default=20_000, help="units whose markers lie one by one")
    parser.add_argument("--step", choices=STEPS)
    asked = parser.parse_args()
    if asked.step is None:
        for step in STEPS:
            command = [sys.executable, "-m", "tests.support.driver_scale", *sys.argv[1:], "--step", step]
            subprocess.run(command, check=True)
        for path in sorted(asked.work.glob("*/*.json")) + sorted(asked.work.glob("*.json")):
            if path.parent.name != "done":
                print(f"{path.relative_to(asked.work)}: {path.stat().st_size / 1e6:,.0f} MB")
        return 0
    asked.work.mkdir(parents=True, exist_ok=True)
    process = psutil.Process()
    imported = process.memory_info().rss
    work = STEPS[asked.step](Dataset(Storage(60), str(asked.work)), asked)
    before, started = process.cpu_times(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - started, process.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak_kb = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    grown = peak_kb * 1024 - imported
    print(f"{asked.step:8} {seconds:7.1f} s, {cpu:7.1f} s of CPU, grew by {grown / 1e6:,.0f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
