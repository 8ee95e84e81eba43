"""Blows at the processes of one run and at its store, when their moments have come."""

import random
import signal
import threading
import time
from collections import Counter

import psutil

from tests.campaign.schedule import NOISE, Blow, Life
from tests.campaign.site import Site
from tests.support.runs import JobProcess


class Strikes:
    """Watches one life by its requests and its clock, and strikes when a moment has come."""

    def __init__(self, site: Site, life: Life, rng: random.Random, *, cluster: bool) -> None:
        self._site, self._life, self._rng, self._cluster = site, life, rng, cluster
        self._waiting = list(life.blows)
        self._lock = threading.Lock()
        self._seen: Counter[tuple[str, str]] = Counter()
        self.requests = 0
        self._held = threading.local()
        self._restarts: list[threading.Thread] = []
        self.run: JobProcess | None = None
        self.struck: list[tuple[str, str]] = []
        self.noise: Counter[str] = Counter()
        self.widowed_at: float | None = None

    def fault(self, _: int, method: str, path: str) -> str:
        """Decide about one request; called by the proxy in the thread that serves it."""
        with self._lock:
            self.requests += 1
            for step in {b.when.step for b in self._life.blows if b.when.step}:
                self._seen[step] += method == step[0] and step[1] in path
            due = [b for b in self._waiting if self._is_due(b, method, path)]
            self._waiting = [b for b in self._waiting if b not in due]
            noise = self._draw_noise()
        for blow in due:
            if blow.when.answered:
                self._held.blow = blow
                return "mute"
            self.strike(blow)
            return "lost"
        return noise

    def after_mute(self) -> None:
        """Strike when the server has done what it was asked and the client does not know yet."""
        blow = getattr(self._held, "blow", None)
        self._held.blow = None
        if blow is not None:
            self.strike(blow)

    def tick(self, seconds: float) -> None:
        """Strike what is due by the clock."""
        with self._lock:
            due = [b for b in self._waiting if b.when.seconds is not None and b.when.seconds <= seconds]
            self._waiting = [b for b in self._waiting if b not in due]
        for blow in due:
            self.strike(blow)

    def strike(self, blow: Blow) -> None:
        """Do it, if there is something to do it to; note what was done."""
        done = getattr(self, f"_strike_{blow.what}")()
        if done:
            self.struck.append((done, str(blow.when)))

    def finish(self) -> None:
        """Wait until a store that was killed is back."""
        for thread in self._restarts:
            thread.join()

    def _is_due(self, blow: Blow, method: str, path: str) -> bool:
        when = blow.when
        if when.step is not None:
            return (
                method == when.step[0] and when.step[1] in path and self._seen[when.step] == when.occurrence
            )
        return when.request is not None and self.requests == when.request

    def _draw_noise(self) -> str:
        if self._rng.random() >= self._life.noise:
            return ""
        kind = self._rng.choices(list(NOISE), list(NOISE.values()))[0]
        self.noise[kind] += 1
        return kind

    def _strike_driver(self) -> str:
        return "driver" if _kill(self.run.process.pid) else ""

    def _strike_sigterm(self) -> str:
        return "sigterm" if _kill(self.run.process.pid, signal.SIGTERM) else ""

    def _strike_model(self) -> str:
        return self._kill_one("model")

    def _strike_searcher(self) -> str:
        return self._kill_one("searcher")

    def _strike_worker(self) -> str:
        return self._kill_one("worker")

    def _strike_raylet(self) -> str:
        victims = [p for p in self.run.children() if _name(p) in ("raylet", "gcs_server")]
        if not victims or not _kill(self._rng.choice(victims).pid):
            return ""
        self.widowed_at = time.monotonic()
        return "raylet"

    def _strike_node(self) -> str:
        return "node" if self._site.cluster().lose_node() else ""

    def _strike_store(self) -> str:
        with self._lock:
            if any(thread.is_alive() for thread in self._restarts):
                return ""
            self._restarts.append(self._site.restart_store(self._rng.uniform(0, 4)))
        return "store"

    def _strike_requester(self) -> str:
        port = self._site.proxy.serving.port
        for process in [psutil.Process(self.run.process.pid), *self._everyone()]:
            try:
                if any(c.laddr.port == port for c in process.net_connections("tcp") if c.laddr):
                    title = _title(process)
                    kind = "driver" if process.pid == self.run.process.pid else _kind(title)
                    return kind if _kill(process.pid) else ""
            except psutil.Error:
                continue
        return ""

    def _everyone(self) -> list[psutil.Process]:
        return self._site.cluster().workers() if self._cluster else self.run.children()

    def _kill_one(self, kind: str) -> str:
        titles = {p.pid: _title(p) for p in self._everyone()}
        victims = [pid for pid, title in titles.items() if title.startswith("ray::") and _kind(title) == kind]
        return kind if victims and _kill(self._rng.choice(victims)) else ""


def _kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; False if the process had ended before."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _kind(title: str) -> str:
    """Tell what a Ray worker is by its title: an actor with a model, one with an index or shards, or any."""
    return "model" if "ModelStage" in title else "searcher" if "Searcher" in title else "worker"
