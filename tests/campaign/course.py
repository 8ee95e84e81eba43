"""The runs of one trial, what was done to them, and what is checked after each."""

import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.campaign.checks.dataset import check_dataset, check_index
from tests.campaign.checks.findings import Findings
from tests.campaign.checks.reports import check_moment
from tests.campaign.checks.runs import check_run
from tests.campaign.codes import check_code
from tests.campaign.foreign import Laid
from tests.campaign.jobs import Asked, Models, dataset_settings, run_settings, written_folders
from tests.campaign.moments import EMBED, INDEX
from tests.campaign.references import Made, References
from tests.campaign.schedule import Life, Trial
from tests.campaign.site import MARK, Site
from tests.campaign.strikes import Strikes
from tests.support.runs import JobProcess

# A run that takes longer than this hangs.
LIFE_S = 600
# A driver whose own Ray was killed is given this long to notice; then it is killed, as by its supervisor.
WIDOWED_S = 90
# Two of them may be refused for a foreign file each.
CALM_RUNS = 6


class HungError(Exception):
    """A run did not end."""


class StoppedError(Exception):
    """The campaign is to end before its trials have."""


@dataclass
class Told:
    """What was done in a trial, for its line."""

    blows: list[list[str]] = field(default_factory=list)
    noise: Counter[str] = field(default_factory=Counter)
    codes: list[int] = field(default_factory=list)
    refused: int = 0
    reports: int = 0
    runs_compared: int = 0
    same_bytes: int = 0


class Course:
    """Goes through the lives of a trial; ``told`` and ``laid`` say what was done."""

    def __init__(self, site: Site, trial: Trial, models: Models, log: Path) -> None:
        self._site, self._trial, self._models, self._log = site, trial, models, log
        self._rng = random.Random(trial.seed + "/course")
        self.root = f"out/trial-{trial.number}"
        self.mark = f"{site.environment[MARK]}-{trial.number}"
        self.told = Told()
        self.laid = Laid(site.fs, self.root, trial.foreign)
        self._states = ["base"]
        self._broken: list[str] = []
        self._last_start = 0.0

    def follow(self, references: References) -> Findings:
        """Live every life, end calmly, check."""
        trial = self._trial
        code = -1
        for number, life in enumerate(trial.embeds):
            if trial.change and number == len(trial.embeds) - 1:
                self._change_corpus()
            code = self._live(life, None)
        self._calm(EMBED, None, code)
        made = Made(tuple(self._states), trial.chunked, trial.reuse)
        reference = references.dataset(self._site, made)
        findings = self._check_dataset(reference)
        if trial.indexes:
            for life in trial.indexes:
                code = self._live(life, None)
            self._calm(INDEX, None, code)
            findings.broken += check_index(
                self._site.fs, f"{self.root}/dataset", reference, self.laid.paths()
            )
        for leg in trial.legs:
            for life in leg.lives:
                code = self._live(life, leg.asked)
            self._calm(leg.asked.job, leg.asked, code)
            expected = references.run(self._site, made, leg.asked)
            findings.broken += self._check_run(leg.asked, expected)
        if trial.grace_s:
            findings.broken += self._after_the_grace(reference)
        if trial.further_run and not findings.broken:
            last = trial.legs[-1].asked if trial.legs else None
            findings.broken += self._further_run(INDEX if trial.indexes else EMBED, last)
        findings.broken += self.laid.check() + self._broken
        findings.broken = list(dict.fromkeys(findings.broken))
        return findings

    def _check_dataset(self, reference: dict[str, Any]) -> Findings:
        # What a run leaves for the grace died during it, or less than the grace before it.
        died_after = self._last_start - self._trial.grace_s if self._trial.grace_s else None
        return check_dataset(
            self._site.fs, f"{self.root}/dataset", reference, self.laid.paths(), died_after=died_after
        )

    def _check_run(self, asked: Asked, reference: dict[str, Any]) -> list[str]:
        broken, same = check_run(self._site.fs, asked, self.root, reference, self.laid.paths())
        self.told.runs_compared += len(same)
        self.told.same_bytes += sum(same)
        return broken

    def _change_corpus(self) -> None:
        """Change the corpus; if no run has planned the old one, there is no trace of it."""
        if not [path for path in self._site.fs.find(f"{self.root}/dataset/plan") if path.endswith(".json")]:
            self._states.clear()
        self._states.append(self._trial.change)
        self._site.set_corpus(self._trial.change)

    def _calm(self, job: str, asked: Asked | None, code: int) -> None:
        """Run the job undisturbed until it ends well."""
        runs = 0
        while code != 0:
            if runs == CALM_RUNS:
                raise HungError(f"{job}: {runs} calm runs did not end well, the last with exit code {code}")
            code = self._live(Life(job, 0.0, ()), asked)
            runs += 1

    def _after_the_grace(self, reference: dict[str, Any]) -> list[str]:
        """Run embed once more when all that is dead has been so for the grace: then it goes."""
        time.sleep(self._trial.grace_s + 1)
        self._calm(EMBED, None, -1)
        found = check_dataset(self._site.fs, f"{self.root}/dataset", reference, self.laid.paths())
        return [f"after the grace: {line}" for line in found.broken]

    def _further_run(self, job: str, asked: Asked | None) -> list[str]:
        before = self._site.fs.find(self.root, detail=True)
        code = self._live(Life(asked.job if asked is not None else job, 0.0, ()), asked)
        after = self._site.fs.find(self.root, detail=True)
        # Theirs may have been laid before this very run, and are looked at by themselves.
        theirs = self.laid.paths()
        etags = [{n: i["ETag"] for n, i in found.items() if n not in theirs} for found in (before, after)]
        changed = sorted(n for n in etags[0] | etags[1] if etags[0].get(n) != etags[1].get(n))
        return [f"a further run did something (exit {code}): {changed}"] if code or changed else []

    def _settings(self, job: str, asked: Asked | None) -> dict[str, object]:
        if asked is not None:
            return run_settings(asked, self.root, self._models)
        trial = self._trial
        return dataset_settings(
            job,
            self.root,
            self._models,
            encoders=trial.encoders,
            grace_s=trial.grace_s,
            chunked=trial.chunked,
            reuse=trial.reuse,
        )

    def _live(self, life: Life, asked: Asked | None) -> int:
        """Run a job once, striking as drawn; check what must hold after it; returns its exit code."""
        if self._site.closed:
            raise StoppedError("the campaign was stopped")
        self.laid.lay(len(self.told.codes))
        offset = self._note(f"=== run {len(self.told.codes)}: {life} {asked or ''}")
        strikes = self._run(life, self._settings(life.job, asked))
        code = strikes.run.process.returncode
        self.told.codes.append(code)
        self.told.blows.append([f"{what} @ {when}" for what, when in strikes.struck])
        self.told.noise += strikes.noise
        seconds = time.time() - self._last_start
        self._note(
            f"=== ended with {code} after {strikes.requests} requests, {seconds:.0f} s: {self.told.blows[-1]}"
        )
        moved = []
        if code == 2:
            with self._log.open() as log:
                log.seek(offset)
                moved = self.laid.move_away(log.read())
            self.told.refused += bool(moved)
        self._broken += check_code(code, {what for what, _ in strikes.struck}, moved)
        # What a killed driver left behind may still be at work when the next one starts, or not.
        if code < 0 and self._rng.random() < 0.5:
            self._site.kill(self.mark)
        self._check_moment()
        return code

    def _run(self, life: Life, settings: dict[str, object]) -> Strikes:
        """Run a job to its end, and strike meanwhile."""
        site, cluster = self._site, self._trial.cluster
        environment = {**site.environment, MARK: self.mark}
        if cluster:
            environment["RAY_ADDRESS"] = site.cluster().address
        strikes = Strikes(site, life, self._rng, cluster=cluster)
        self._last_start = time.time()
        strikes.run = run = JobProcess(self._log, settings, environment=environment, job=life.job)
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
                    raise HungError(f"run {len(self.told.codes)} ({life.job}) did not end in {LIFE_S} s")
        finally:
            site.proxy.fault, site.proxy.after_mute = (lambda *_: ""), (lambda: None)
            strikes.finish()
        return strikes

    def _check_moment(self) -> None:
        broken, complete = check_moment(self._site.fs, written_folders(self.root), self.laid.paths())
        after = f"after run {len(self.told.codes) - 1}"
        self._broken += [f"{after}: {line}" for line in [*broken, *self.laid.check()]]
        self.told.reports += complete

    def _note(self, line: str) -> int:
        """Write a line into the log of the trial; returns where the log ends."""
        with self._log.open("a") as log:
            print(line, file=log)
            return log.tell()
