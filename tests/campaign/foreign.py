"""Files that other people put into the folders of the jobs: nobody may change them, whatever happens.

Three kinds. Most lie where no name of ours can be. Some have the very name of a file that a job can do
without, or can name otherwise; then it must succeed beside them: an embedding shard takes a name with its
hash in it, and a data set stays without its card. Some have the name of a file that the job cannot
rename: then it must refuse with exit code 2 and name the file, until its owner has moved it.
"""

import hashlib
import io
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.campaign.moments import EMBED, INDEX, RERANK, SEARCH

# By job: paths below the root of the trial.
APART = {
    EMBED: (
        "dataset/embeddings/theirs.parquet",
        "dataset/rejected/notes.txt",
        "dataset/done/theirs.json",
        "dataset/plan/readme.txt",
        "dataset/changes/theirs.json",
        "dataset/notes.md",
    ),
    INDEX: ("dataset/index/theirs.faiss", "dataset/index/parts/x.part", "dataset/index/notes.md"),
    SEARCH: (
        "run/work/theirs.txt",
        "run/work/parts/theirs.parquet",
        "run/reranked/theirs.txt",
        "run/README.md",
        "run/notes.md",
    ),
    RERANK: (
        "run/reranked/work/theirs.txt",
        "run/reranked/work/parts/theirs.parquet",
        "run/reranked/notes.md",
    ),
}
# Beside the others where a reranked run has a folder of its own.
OUTSIDE = ("reranked/theirs.txt", "reranked/work/parts/theirs.parquet", "reranked/README.md")
OUR_SHARD = "dataset/embeddings/00000000-0000000000.parquet"
OUR_CARD = "dataset/README.md"
IN_THE_WAY = {
    EMBED: ("dataset/report.html", "dataset/report.json"),
    INDEX: ("dataset/index/report.json",),
    SEARCH: ("run/report.json", "run/run.parquet", "run/run.trec", "run/rejected.parquet"),
    RERANK: ("run/reranked/report.json", "run/reranked/run.parquet"),
}


@dataclass(frozen=True)
class Foreign:
    """A file of theirs, laid before the run of that number if nothing has its name.

    One that is in the way makes a job refuse to run.
    """

    path: str
    run: int = 0
    in_the_way: bool = False


def draw_foreign(rng: random.Random, jobs: Iterable[str], *, outside: bool) -> tuple[Foreign, ...]:
    """Draw the foreign files of a trial that has lives of these jobs."""
    if rng.random() < 0.15:
        return ()
    jobs = sorted(jobs)
    names = [path for job in jobs for path in APART[job]] + (list(OUTSIDE) if outside else [])
    found = [Foreign(path, rng.choice((0, 0, 1, 2))) for path in names if rng.random() < 0.6]
    found += [Foreign(path) for path in (OUR_SHARD, OUR_CARD) if rng.random() < 0.3]
    if rng.random() < 0.2:
        job = rng.choice(jobs)
        found.append(Foreign(rng.choice(IN_THE_WAY[job]), in_the_way=True))
    return tuple(found)


def foreign_bytes(path: str) -> bytes:
    """Return what a foreign file holds: a whole table of theirs, or what no reader of ours can read."""
    if not path.endswith(".parquet"):
        return f"theirs, not to be touched: {path}\n{{".encode()
    sink = io.BytesIO()
    pq.write_table(pa.table({"theirs": [path, "not to be touched"], "passage_id": ["0:a", "1:b"]}), sink)
    return sink.getvalue()


class Laid:
    """The foreign files that lie below the root of a trial."""

    def __init__(self, fs: Any, root: str, wanted: Iterable[Foreign]) -> None:
        self._fs, self._root = fs, root
        self._wanted = tuple(wanted)
        self._there: dict[str, str] = {}
        self.count = 0
        self.touched: set[str] = set()

    def lay(self, run: int) -> None:
        """Put down what is due before a run, but on no name that is taken: that file would be ours."""
        for foreign in self._wanted:
            path = f"{self._root}/{foreign.path}"
            if foreign.run != run or self._fs.exists(path):
                continue
            data = foreign_bytes(foreign.path)
            try:
                self._fs.pipe_file(path, data, mode="create")
            except OSError:  # what a client makes of a condition that did not hold
                if not self._fs.exists(path):
                    raise
                continue
            self._there[foreign.path] = hashlib.sha256(data).hexdigest()
            self.count += 1

    def paths(self) -> frozenset[str]:
        """Return what lies there, below the bucket as the file system names it."""
        return frozenset(f"{self._root}/{path}" for path in self._there)

    def has(self, path: str) -> bool:
        """Whether a file lies at a path below the root."""
        return path in self._there

    def move_away(self, log: str) -> list[str]:
        """Remove, as their owner, the files in the way that a log names; returns their paths."""
        named = [f.path for f in self._wanted if f.in_the_way and f.path in self._there]
        named = [path for path in named if f"{self._root}/{path}" in log]
        for path in named:
            self._fs.rm_file(f"{self._root}/{path}")
            del self._there[path]
        return named

    def check(self) -> list[str]:
        """Return what was done to the files; each must have the bytes that were put there."""
        broken = []
        for path, sha256 in self._there.items():
            try:
                found = hashlib.sha256(self._fs.cat_file(f"{self._root}/{path}")).hexdigest()
            except FileNotFoundError:
                found = None
            if found != sha256:
                self.touched.add(path)
                what = "is gone" if found is None else "has other bytes"
                broken.append(f"foreign file {path}: {what}")
        return broken
