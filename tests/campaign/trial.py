"""One trial: lives of the jobs with blows struck at drawn moments, then a calm end, then the checks."""

import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.campaign.check import Findings, check_finished, check_half_way, check_index
from tests.campaign.corpus import UNIT_ROWS
from tests.campaign.schedule import NOISE, Blow, Life, Trial
from tests.campaign.site import CORPUS, MARK, Site
from tests.support.runs import JobProcess

# A run that takes longer than this hangs.
LIFE_S = 600
# A driver whose own Ray was killed is given this long to notice; then it is killed, as by its supervisor.
WIDOWED_S = 90
CALM_RUNS = 4

Reference = Callable[[tuple[str, ...]], dict[str, Any]]


def settings(root: str, model: Path, job: str, encoders: int = 1) -> dict[str, object]:
    """Return the settings of every run of a job over the campaign's corpus."""
    common: dict[str, object] = {"output.uri": f"s3://{root}", "output.storage_timeout_s": 60}
    if job == "index":
        return common | {"index.factory": "IVF8,SQ8", "index.num_queries": 50, "index.part_bytes": 100_000}
    return common | {
        "corpus.uri": f"s3://{CORPUS}",
        "corpus.max_rejected_fraction": 0.05,
        "model.name": model,
        "model.max_length": 64,
        "batching.unit_rows": UNIT_ROWS,
        "resources.num_encoders": encoders,
        "resources.threads_per_encoder": 1,
    }


class Strikes:
    """Watches one life by its requests and its clock, and strikes when a moment has come."""

    def __init__(self, site: Site, life: Life, rng: random.Random, mark: str, *, cluster: bool) -> None:
        self._site, self._life, self._rng = site, life, rng
        self._mark, self._cluster = mark, cluster
        self._waiting = list(life.blows)
        self._lock = threading.Lock()
        self._seen: Counter[tuple[str, str]] = Counter()
        self._requests = 0
        self._held = threading.local()
        self._restarts: list[threading.Thread] = []
        self.run: JobProcess | None = None
        self.struck: list[tuple[str, str]] = []
        self.noise: Counter[str] = Counter()
        self.widowed_at: float | None = None

    def fault(self, _: int, method: str, path: str) -> str:
        """Decide about one request; called by the proxy in the thread that serves it."""
        with self._lock:
            self._requests += 1
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
        return when.request is not None and self._requests == when.request

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

    def _strike_encoder(self) -> str:
        return self._kill_one("encoder", lambda title: "EncodeStage" in title or "Searcher" in title)

    def _strike_worker(self) -> str:
        return self._kill_one("worker", lambda title: "EncodeStage" not in title)

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

    def _kill_one(self, kind: str, wanted: Callable[[str], bool]) -> str:
        titles = {p.pid: _title(p) for p in self._everyone()}
        victims = [pid for pid, title in titles.items() if title.startswith("ray::") and wanted(title)]
        return kind if victims and _kill(self._rng.choice(victims)) else ""


def run_trial(site: Site, trial: Trial, model: Path, reference: Reference, log: Path) -> dict[str, Any]:
    """Run a trial; returns its line for trials.jsonl."""
    started = time.monotonic()
    rng = random.Random(trial.seed + "/course")
    mark = f"{site.environment[MARK]}-{trial.number}"
    root = f"out/trial-{trial.number}"
    line: dict[str, Any] = {"trial": trial.number, "seed": trial.seed, "cluster": trial.cluster}
    log.unlink(missing_ok=True)
    course = Course(site, trial, model, root, mark, log, rng)
    try:
        site.remove(root)
        site.set_corpus("base")
        findings = course.follow(reference)
    except HungError as error:
        findings = Findings([str(error)])
    except StoppedError:
        raise
    except Exception as error:  # noqa: BLE001 - a trial that cannot be judged is told, the others go on
        findings = Findings([f"the trial itself failed: {error!r}"])
        with log.open("a") as file:
            traceback.print_exc(file=file)
    finally:
        site.kill(mark)
        site.proxy.requests.clear()
    site.remove(root)
    line |= course.facts()
    line |= {
        "rows": findings.rows,
        "lost": findings.lost,
        "doubled": findings.doubled,
        "outcome": "; ".join(findings.broken) or "ok",
        "seconds": round(time.monotonic() - started, 1),
    }
    return line


class HungError(Exception):
    """A run did not end."""


class StoppedError(Exception):
    """The campaign is to end before its trials have."""


class Course:
    """The runs of one trial, and what was done to them."""

    def __init__(
        self, site: Site, trial: Trial, model: Path, root: str, mark: str, log: Path, rng: random.Random
    ) -> None:
        self._site, self._trial, self._model, self._root = site, trial, model, root
        self._mark, self._log, self._rng = mark, log, rng
        self._half_way: list[str] = []
        self._blows: list[list[str]] = []
        self._noise: Counter[str] = Counter()
        self._codes: list[int] = []
        self._states = ["base"]

    def facts(self) -> dict[str, Any]:
        """What was done, for the trial's line."""
        return {
            "jobs": [life.job for life in self._trial.lives],
            "change": self._trial.change,
            "blows": self._blows,
            "noise": dict(self._noise),
            "runs": len(self._codes),
            "exit_codes": self._codes,
        }

    def follow(self, reference: Reference) -> Findings:
        """Live every life, end calmly, check."""
        lives = list(self._trial.lives)
        embeds = [life for life in lives if life.job == "embed"]
        code = -1
        for number, life in enumerate(embeds):
            if self._trial.change and number == len(embeds) - 1:
                self._change_corpus()
            code = self._live(life)
        self._calm("embed", code)
        history = tuple(self._states)
        expected = reference(history)
        findings = check_finished(self._site.fs, self._root, expected)
        for life in lives[len(embeds) :]:
            self._calm("index", self._live(life))
            findings.broken += check_index(self._site.fs, self._root, expected)
        if self._trial.further_run and not findings.broken:
            findings.broken += self._further_run(lives[-1].job)
        findings.broken += self._half_way
        return findings

    def _change_corpus(self) -> None:
        """Change the corpus; if no run has planned the old one, there is no trace of it."""
        if not self._site.fs.find(f"{self._root}/plan"):
            self._states.clear()
        self._states.append(self._trial.change)
        self._site.set_corpus(self._trial.change)

    def _calm(self, job: str, code: int) -> None:
        """Run the job undisturbed until it ends well."""
        runs = 0
        while code != 0:
            if runs == CALM_RUNS:
                raise HungError(f"{job}: {runs} calm runs did not end well, the last with exit code {code}")
            code = self._live(Life(job, 0.0, ()))
            runs += 1

    def _further_run(self, job: str) -> list[str]:
        before = self._site.fs.find(self._root, detail=True)
        code = self._live(Life(job, 0.0, ()))
        after = self._site.fs.find(self._root, detail=True)
        etags = [{n: i["ETag"] for n, i in listing.items()} for listing in (before, after)]
        return [] if code == 0 and etags[0] == etags[1] else [f"a further run did something (exit {code})"]

    def _live(self, life: Life) -> int:
        """Run a job once, striking as drawn; returns its exit code."""
        site = self._site
        if site.closed:
            raise StoppedError("the campaign was stopped")
        environment = {**site.environment, MARK: self._mark}
        if self._trial.cluster:
            environment["RAY_ADDRESS"] = site.cluster().address
        with self._log.open("a") as log:
            print(f"=== run {len(self._codes)}: {life}", file=log)
        strikes = Strikes(site, life, self._rng, self._mark, cluster=self._trial.cluster)
        strikes.run = run = JobProcess(
            self._log,
            settings(self._root, self._model, life.job, self._trial.encoders),
            environment=environment,
            job=life.job,
        )
        site.proxy.fault, site.proxy.after_mute = strikes.fault, strikes.after_mute
        started = time.monotonic()
        try:
            while run.process.poll() is None:
                time.sleep(0.05)
                seconds = time.monotonic() - started
                strikes.tick(seconds)
                if strikes.widowed_at and time.monotonic() > strikes.widowed_at + WIDOWED_S:
                    strikes.struck.append(("driver", "left without Ray"))
                    run.process.kill()
                if seconds > LIFE_S:
                    raise HungError(f"run {len(self._codes)} ({life.job}) did not end in {LIFE_S} s")
        finally:
            site.proxy.fault, site.proxy.after_mute = (lambda *_: ""), (lambda: None)
            strikes.finish()
            self._blows.append([f"{what} @ {when}" for what, when in strikes.struck])
            self._noise += strikes.noise
        self._codes.append(run.process.returncode)
        with self._log.open("a") as log:
            print(f"=== ended with {run.process.returncode}: {self._blows[-1]}", file=log)
        # What a killed driver left behind may still be at work when the next one starts, or not.
        if run.process.returncode < 0 and self._rng.random() < 0.5:
            site.kill(self._mark)
        self._half_way += check_half_way(site.fs, self._root)
        return run.process.returncode


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
    return "encoder" if "EncodeStage" in title else "worker"
