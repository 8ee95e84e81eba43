"""Where trials run, one after the other: an S3 server behind the faulty proxy, a Ray cluster, a corpus."""

import os
import secrets
import shutil
import tempfile
import threading
import uuid
from pathlib import Path

import psutil

from bge_ray.pipeline.engine.cluster import LOCAL_RAY
from tests.campaign.cluster import RayCluster
from tests.campaign.corpus import corpus, queries
from tests.campaign.jobs import CORPUS, QUERIES
from tests.support.proxy import FaultyProxy
from tests.support.s3 import S3Server

MARK = "BGE_RAY_CAMPAIGN"


class Site:
    """A context manager; everything it starts, and everything that those start, ends with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)  # what a campaign left that was broken off
        folder.mkdir(parents=True)
        self.server = S3Server(folder / "data")
        self._mark = uuid.uuid4().hex
        self._corpus: dict[str, bytes] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="campaign-", ignore_cleanup_errors=True)
        self.closed = False
        self._cluster: RayCluster | None = None

    def __enter__(self) -> "Site":
        self.server.start()
        self.proxy = FaultyProxy(self.server.endpoint).__enter__()
        self.fs = self.server.filesystem()
        self.environment = {
            **LOCAL_RAY,
            **self.server.environment,
            "AWS_ENDPOINT_URL": self.proxy.url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(24),
            "RAY_TMPDIR": self._temporary.name,
            "HF_HUB_OFFLINE": "1",
            MARK: self._mark,
        }
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.proxy.__exit__()
        self.server.kill()
        self._temporary.cleanup()

    def stop(self) -> None:
        """Kill all that runs here but the server; nothing more is started."""
        self.closed = True
        self.kill(self._mark)

    def cluster(self) -> RayCluster:
        """Return the cluster with both its nodes alive, started if need be."""
        if self._cluster is None:
            # As many cores as a job has that starts its own Ray: FAISS trains with those of the largest node.
            cores = (os.cpu_count() or 1, 1)
            self._cluster = RayCluster(str(self.folder / "cluster.log"), self.environment, cores)
        elif not self._cluster.is_whole():
            self._cluster.add_node()
        return self._cluster

    def set_corpus(self, state: str) -> None:
        """Make the corpus be in a state, touching only what differs."""
        if not self._corpus:
            self.fs.pipe_file(QUERIES, queries())
        wanted = corpus(state)
        for name in self._corpus.keys() - wanted.keys():
            self.fs.rm_file(f"{CORPUS}/{name}")
        for name, data in wanted.items():
            if self._corpus.get(name) != data:
                self.fs.pipe_file(f"{CORPUS}/{name}", data)
        self._corpus = wanted

    def restart_store(self, down_s: float) -> threading.Thread:
        """Kill the server and start it again after a while, beside the caller."""
        self.server.kill()

        def restart() -> None:
            threading.Event().wait(down_s)
            self.server.start()

        thread = threading.Thread(target=restart)
        thread.start()
        return thread

    def kill(self, mark: str) -> None:
        """Kill what carries the mark of a trial, or our own, whoever its parent is by now."""
        while left := [p for p in psutil.process_iter() if _mark_of(p).startswith(mark)]:  # it may fork
            for process in left:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(left, timeout=5)

    def remove(self, root: str) -> None:
        """Remove a folder of the store."""
        if self.fs.exists(root):
            self.fs.rm(root, recursive=True)


def _mark_of(process: psutil.Process) -> str:
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return process.environ().get(MARK, "")
    except psutil.Error:
        return ""
