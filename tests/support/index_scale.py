"""What building a large index costs: the job against FAISS in one process, on the S3 server.

    python -m tests.support.index_scale --rows 1000000 --dim 384 --shards 20

Writes a synthetic, clustered data set to a fresh S3 server (and, with --real demo-out/dataset, the vectors of
`make demo` beside it), runs jobs/index.py on it while its processes are watched
(CPU seconds, and the memory of each kind of task), then builds the same index with FAISS alone in one
process, and compares core-seconds, bytes and peak memory. Needs about 5 GB of disk.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import resource
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil

from tests.support.runs import JobProcess
from tests.support.s3 import S3Server

POLL_S = 0.05
TASKS = re.compile(r"ray::(\w+)")


class Watch:
    """CPU seconds and peak private memory of a process tree, by the title of each process."""

    def __init__(self, run: JobProcess) -> None:
        self._run = run
        self._cpu: dict[int, tuple[str, float]] = {}
        self._idle: dict[int, int] = {}
        self.peak: dict[str, int] = defaultdict(int)
        self.grown: dict[str, int] = defaultdict(int)
        self.task_s: dict[str, float] = defaultdict(float)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                top = psutil.Process(self._run.process.pid)
                everyone = [top, *top.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for process in everyone:
                self._look(process, top.pid)

    def _look(self, process: psutil.Process, top: int) -> None:
        try:
            title = " ".join(process.cmdline())
            times, memory = process.cpu_times(), process.memory_info()
        except psutil.Error:
            return
        private = memory.rss - memory.shared
        found = TASKS.search(title)
        name = "driver" if process.pid == top else found[1] if found else "ray"
        spent = times.user + times.system
        before = self._cpu.get(process.pid, ("", 0.0))[1]
        self._cpu[process.pid] = (name, spent)
        self.task_s[name] += spent - before
        self.peak[name] = max(self.peak[name], private)
        if name == "IDLE":
            self._idle[process.pid] = private
        elif process.pid in self._idle:
            self.grown[name] = max(self.grown[name], private - self._idle[process.pid])


def write_data(root: str, shard: int, rows: int, dim: int, dtype: str):
    """Write one shard; a process of its own, so that NumPy's memory goes back."""
    from bge_ray.dataset.folder import Dataset
    from bge_ray.storage.objects import Storage
    from tests.support.vectors import clustered, write_shard

    dataset = Dataset(Storage(60), root)
    vectors = clustered(rows, dim, shard, clusters=3000)
    return write_shard(dataset, dataset.read_spec(), shard, vectors)


def one_process(root: str, factory: str, queue: multiprocessing.Queue) -> None:
    """Build the same index with FAISS alone: read the same Parquet, the same sample, add, write a file."""
    import faiss
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from bge_ray.dataset.folder import Dataset
    from bge_ray.index.factory import Metric, check_factory
    from bge_ray.storage.objects import Storage, join

    storage = Storage(60)
    manifest = Dataset(storage, root).read_manifest()
    files = [join(root, marker.embeddings.path) for marker in manifest.shards]

    def read(uri: str):
        table = pq.read_table(pa.BufferReader(storage.read(uri)), columns=["vector_id", "embedding"])
        column = table["embedding"].combine_chunks()
        vectors = column.flatten().to_numpy().reshape(len(column), -1)
        return vectors.astype(np.float32), table["vector_id"].to_numpy()

    marks = [time.process_time()]
    dim = read(files[0])[0].shape[1]
    spec = check_factory(factory, dim, Metric.L2)
    rng = np.random.default_rng(0)
    take = -(-spec.training_rows // len(files))
    sample = np.concatenate(
        [v[rng.choice(len(v), min(take, len(v)), replace=False)] for v, _ in map(read, files)]
    )
    marks.append(time.process_time())
    index = faiss.index_factory(dim, spec.factory, faiss.METRIC_L2)
    faiss.extract_index_ivf(index).cp.niter = 10  # as the job does
    index.train(sample)
    del sample
    marks.append(time.process_time())
    for uri in files:
        vectors, ids = read(uri)
        for start in range(0, len(ids), 16_384):
            index.add_with_ids(vectors[start : start + 16_384], ids[start : start + 16_384])
    marks.append(time.process_time())
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/index.faiss"
        faiss.write_index(index, path)
        size = os.path.getsize(path)
    marks.append(time.process_time())
    stages = dict(
        zip(
            ("read sample", "train", "add", "write"),
            (b - a for a, b in itertools.pairwise(marks)),
            strict=True,
        )
    )
    queue.put(
        {
            "stages": stages,
            "cpu_s": sum(stages.values()),
            "bytes": size,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        }
    )


def read_real(folder: Path):
    """Return the (n, dim) vectors of a local data set."""
    import pyarrow.parquet as pq

    column = pq.read_table(folder / "embeddings", columns=["embedding"])["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def measure(
    rows: int, dim: int, shards: int, dtype: str, factory: str, *settings: str, real: Path | None = None
) -> dict:
    """Run both, and return the figures."""
    from tests.support.vectors import VectorDataset

    with tempfile.TemporaryDirectory(prefix="bge-ray-scale-") as folder:
        server = S3Server(Path(folder) / "data")
        server.start()
        os.environ.update(server.environment)
        try:
            root = "s3://out/scale"
            made = VectorDataset(root, dim, dtype)
            context = multiprocessing.get_context("spawn")
            with context.Pool(2, maxtasksperchild=4) as pool:
                jobs = [(root, s, rows // shards, dim, dtype) for s in range(shards)]
                for marker in pool.starmap(write_data, jobs, chunksize=1):
                    made.adopt(marker)
            if real is not None:
                made.put(shards, read_real(real))
            made.publish()
            keys = {"output.uri": root, "index.factory": factory}
            keys |= dict(setting.split("=", 1) for setting in settings)
            log = Path(folder) / "log"
            began = time.monotonic()
            run = JobProcess(log, keys, job="index")
            with Watch(run) as watch:
                code = run.wait(7200)
            took = time.monotonic() - began
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            from bge_ray.storage.objects import Storage

            index = json.loads(Storage(30).read(f"{root}/index/index.json"))
            queue = context.Queue()
            alone = context.Process(target=one_process, args=(root, index["factory"], queue))
            began = time.monotonic()
            alone.start()
            baseline = queue.get()
            alone.join()
            return {
                "exit": code,
                "log": log.read_text().splitlines()[-15:],
                "job": {
                    "wall_s": took,
                    "cpu_s": dict(watch.task_s),
                    "peak_private_mb": {k: v / 1e6 for k, v in watch.peak.items()},
                    "grown_private_mb": {k: v / 1e6 for k, v in watch.grown.items()},
                },
                "all_children_cpu_s": used.ru_utime + used.ru_stime,
                "index": {k: v for k, v in index.items() if k not in ("parts", "curve")},
                "one_process": baseline | {"wall_s": time.monotonic() - began},
                "ratio": sum(watch.task_s.values()) / baseline["cpu_s"],
            }
        finally:
            server.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    parser.add_argument("--factory", default="auto")
    parser.add_argument("--real", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    given = parser.parse_args()
    found = measure(
        given.rows, given.dim, given.shards, given.dtype, given.factory, *given.settings, real=given.real
    )
    print(json.dumps(found, indent=1))
