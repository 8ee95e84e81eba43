"""Clean runs to compare with: one for each history of the corpus and question, made when first asked for."""

import dataclasses
import hashlib
import json
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaign.checks.dataset import snapshot
from tests.campaign.checks.runs import run_snapshot
from tests.campaign.corpus import REUSING, corpus_hash
from tests.campaign.jobs import Asked, Models, Reuse, dataset_settings, run_settings
from tests.campaign.moments import EMBED, INDEX
from tests.campaign.site import Site
from tests.support.runs import JobProcess

ROOT = "out/reference"


@dataclass(frozen=True)
class Made:
    """What a data set was made of: the states of the corpus that it was embedded in, and how."""

    history: tuple[str, ...]
    chunked: bool
    reuse: Reuse

    @property
    def name(self) -> str:
        states = "-".join(f"{state}-{corpus_hash(state)}" for state in self.history)
        how = [*(["chunks"] if self.chunked else []), *(["corpus"] if self.reuse == "corpus" else [])]
        return "-".join([*how, states])

    @property
    def reuses(self) -> bool:
        """Whether vectors are taken over; which are, goes by how far earlier runs came."""
        return self.reuse == "corpus" or not REUSING.isdisjoint(self.history)


class References:
    """The clean runs of a campaign, kept below one folder."""

    def __init__(self, folder: Path, models: Models) -> None:
        self._folder, self._models = folder, models
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        (folder / "datasets").mkdir(parents=True, exist_ok=True)

    def dataset(self, site: Site, made: Made) -> dict[str, Any]:
        """Return the `snapshot` of a data set that was embedded in each of these states, then indexed."""

        def make() -> dict[str, Any]:
            return snapshot(site.fs, self._dataset(site, made), reuses=made.reuses)

        return self._kept(f"{made.name}.json", make)

    def run(self, site: Site, made: Made, asked: Asked) -> dict[str, Any]:
        """Return the `run_snapshot` of a search, or a rerank, over that data set."""
        asked = asked.content
        named = json.dumps(dataclasses.asdict(asked), sort_keys=True).encode()
        name = f"{made.name}-{asked.job}-{hashlib.sha256(named).hexdigest()[:16]}.json"
        return self._kept(name, lambda: self._run(site, made, asked))

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what a file says, made first if it is not there; what is made is read back, too."""
        path = self._folder / name
        with self._locks[name]:
            if not path.exists():
                made = json.dumps(make())
                path.write_text(made)
            return json.loads(path.read_text())

    def _dataset(self, site: Site, made: Made) -> str:
        """Return the root of a clean data set in the store of a site, copied from where it was first made."""
        root, kept = f"{ROOT}/{made.name}", self._folder / "datasets" / made.name

        def run(job: str) -> None:
            settings = dataset_settings(
                job,
                root,
                self._models,
                encoders=1,
                grace_s=0,
                chunked=made.chunked,
                reuse=made.reuse,
            )
            self._start(site, job, settings)

        with self._locks[made.name]:
            if not kept.exists():
                site.remove(root)
                for state in made.history:
                    site.set_corpus(state)
                    run(EMBED)
                run(INDEX)
                fetched = Path(tempfile.mkdtemp(dir=self._folder))
                site.fs.get(f"{root}/dataset", str(fetched / "dataset"), recursive=True)
                fetched.rename(kept)
            elif not site.fs.exists(f"{root}/dataset/index/report.json"):
                site.fs.put(str(kept / "dataset"), f"{root}/dataset", recursive=True)
        return f"{root}/dataset"

    def _run(self, site: Site, made: Made, asked: Asked) -> dict[str, Any]:
        root = self._dataset(site, made).removesuffix("/dataset")
        site.remove(f"{root}/run")
        for step in ([asked.over] if asked.over is not None else []) + [asked]:
            self._start(site, step.job, run_settings(step, root, self._models))
        return run_snapshot(site.fs, asked, root)

    def _start(self, site: Site, job: str, settings: dict[str, object]) -> None:
        run = JobProcess(
            self._folder / "log",
            settings,
            environment={**site.environment, "RAY_ADDRESS": site.cluster().address},
            job=job,
        )
        if run.wait() != 0:
            raise RuntimeError(f"the clean {job} run failed:\n{run.log()}")
