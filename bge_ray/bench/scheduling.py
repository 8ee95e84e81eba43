"""What one driver can feed: the embed job's own data path over a pool of encoders that sleep.

Run as `python -m bge_ray.bench.scheduling ENCODERS UNIT_S UNITS_EACH [REPEATS]`; the last line printed is
the result as JSON: in alternation, runs in which two units overlap in an encoder, as they do on a GPU, and
runs in which it takes one at a time. It starts a Ray of its own, whose GPUs and CPUs are only numbers.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil

from bge_ray.bench import simulated
from bge_ray.bench.simulated import SimulatedJob
from bge_ray.pipeline.embed.job import Stages, embedding_receipts
from bge_ray.pipeline.embed.tasks import CorpusUnit, ReadTask, SpanTask
from bge_ray.pipeline.engine.cluster import connect, disconnect, prepare_environment
from bge_ray.pipeline.engine.pools import UNITS_AT_A_GPU, Pool, Sizes, Tasks
from bge_ray.pipeline.engine.receipts import data_context
from bge_ray.records.plan import Coding, CorpusObject, Span, unit_fingerprint
from bge_ray.settings.sections import ResourcesSettings

UNIT_ROWS = 50_000
UNITS_A_SPAN = 8
# Enough to keep the pool fed when reading costs READ_S; a real pool has more, in processes of their own.
READERS, WRITERS = 4, 2
READ_S, WRITE_S = 0.05, 0.02
# What is done to a unit beside the device's work, as a share of that: 0.2 s of 1.7 s, see docs/measured.md.
HOST_SHARE = 0.12
# A real table has some 10 MB; data does not pass the driver, so its size only fills this machine's memory.
TABLE_BYTES = 10_000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Scheduling:
    """What became of a simulated run.

    ``busy`` is the share of the devices' time spent on units, None where units take no time; ``units_per_s``
    is the rate at which the middle half of them came out, actors starting and running out left aside.
    """

    encoders: int
    units_at_once: int
    units: int
    unit_s: float
    units_per_s: float
    busy: float | None
    driver_bytes: int
    driver_cpu: float


def simulate(encoders: int, unit_s: float, units_each: int, units_at_once: int) -> Scheduling:
    """Run the data path over encoders that hold each unit for ``unit_s`` seconds at their device.

    Joins or starts no cluster: Ray must be up, with as many GPUs as encoders.

    Args:
        encoders: how many.
        unit_s: seconds a unit at the device, HOST_SHARE of which it is on its way there and back besides; 0
            shows how many units a second can be moved at all.
        units_each: units per encoder.
        units_at_once: inside one encoder.
    """
    sizes = Sizes(
        pools={"encoders": Pool(encoders, 0.25, 1.0, 1, units_at_once)},
        tasks={"readers": Tasks(READERS, 1.0), "writers": Tasks(WRITERS, 0.1)},
    )
    host_s = HOST_SHARE * unit_s
    job = SimulatedJob(READ_S if unit_s else 0.0, unit_s, host_s, WRITE_S if unit_s else 0.0, TABLE_BYTES)
    stages = Stages(simulated.read_nothing, simulated.SleepStage, simulated.write_nothing)
    units = encoders * units_each
    driver = psutil.Process()
    before, started = driver.cpu_times(), time.time()
    spent: dict[str, list[Interval]] = defaultdict(list)
    names = set()
    with data_context():  # as in a run: or Ray Data would hand the units of a span to an encoder as one
        receipts = embedding_receipts(job, job, sizes, _spans(units), stages)
    for receipt in receipts:
        spent[receipt.facts["process"]].append(
            (receipt.facts["encode_started"], receipt.facts["encode_ended"])
        )
        names.add(receipt.name)
    if len(names) != units:
        raise RuntimeError(f"{units} units were planned, {len(names)} came out")
    after, ended = driver.cpu_times(), time.time()
    _, busy = steady_share(list(spent.values()))
    return Scheduling(
        encoders=encoders,
        units_at_once=units_at_once,
        units=units,
        unit_s=unit_s,
        units_per_s=middle_rate([end for own in spent.values() for _, end in own]),
        busy=busy * len(spent) / encoders if unit_s else None,
        driver_bytes=driver.memory_info().rss,
        driver_cpu=(after.user + after.system - before.user - before.system) / (ended - started),
    )


def steady_share(encoders: Sequence[Sequence[Interval]]) -> tuple[Interval, float]:
    """Return the time in which every encoder had begun and none had run out, and the share worked in it.

    Args:
        encoders: the (start, end) of each unit, for each encoder.
    """
    start = max(min(begun for begun, _ in own) for own in encoders)
    end = min(max(done for _, done in own) for own in encoders)
    if end <= start:
        return (start, start), 0.0
    worked = sum(max(0.0, min(done, end) - max(begun, start)) for own in encoders for begun, done in own)
    return (start, end), worked / ((end - start) * len(encoders))


def middle_rate(ends: Sequence[float]) -> float:
    """Return how many a second ended while the middle half of them did; of at least 4 points in time."""
    ordered = sorted(ends)
    first, last = len(ordered) // 4, 3 * len(ordered) // 4
    return (last - first) / max(ordered[last] - ordered[first], 1e-9)


def _spans(units: int) -> tuple[ReadTask, ...]:
    tasks = []
    for object_no in range(-(-units // UNITS_A_SPAN)):
        count = min(UNITS_A_SPAN, units - object_no * UNITS_A_SPAN)
        span = Span(0, count, 0, (UNIT_ROWS,) * count)
        uri = f"s3://simulated/corpus/part-{object_no:05d}.parquet"
        whole = CorpusObject(object_no, uri, count, "0" * 32, Coding("parquet"), (span,))
        todo = tuple(CorpusUnit(unit, unit_fingerprint("0" * 64, whole, unit), uri) for unit in whole.units())
        tasks.append(ReadTask((SpanTask(whole, span, todo),)))
    return tuple(tasks)


def main(encoders: int, unit_s: float, units_each: int, repeats: int = 1) -> None:
    """Start Ray, simulate, print."""
    prepare_environment(ResourcesSettings())
    import ray

    ray.init(
        address="local",
        num_cpus=encoders,
        num_gpus=encoders,
        include_dashboard=False,
        logging_level="WARNING",
        _node_ip_address="127.0.0.1",
    )
    connect(ResourcesSettings())
    runs = []
    for at_once in (UNITS_AT_A_GPU, 1) * repeats:
        runs.append(asdict(simulate(encoders, unit_s, units_each, at_once)))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)  # noqa: T201 - starting so many takes minutes
    disconnect()
    print("\n" + json.dumps({"runs": runs}))  # noqa: T201 - the answer of this process


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), *map(int, sys.argv[4:]))
