"""Clean runs to compare with: one for each history of the corpus, made when first asked for, and kept."""

import json
import threading
from pathlib import Path
from typing import Any

from tests.campaign.check import snapshot
from tests.campaign.corpus import corpus_hash
from tests.campaign.site import Site
from tests.campaign.trial import settings
from tests.support.runs import JobProcess

ROOT = "out/reference"


class References:
    """The clean runs of a campaign, below one folder."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder, self._model = folder, model
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, site: Site, history: tuple[str, ...]) -> dict[str, Any]:
        """Return the `snapshot` of a data set that was embedded in each of these states, then indexed."""
        path = self._folder / ("-".join(f"{state}-{corpus_hash(state)}" for state in history) + ".json")
        with self._lock:
            if not path.exists():
                path.write_text(json.dumps(self._make(site, history)))
            return json.loads(path.read_text())

    def _make(self, site: Site, history: tuple[str, ...]) -> dict[str, Any]:
        site.remove(ROOT)
        for state in history:
            site.set_corpus(state)
            self._run(site, "embed")
        self._run(site, "index")
        reference = snapshot(site.fs, ROOT)
        site.remove(ROOT)
        return reference

    def _run(self, site: Site, job: str) -> None:
        run = JobProcess(
            self._folder / "log",
            settings(ROOT, self._model, job),
            environment={**site.environment, "RAY_ADDRESS": site.cluster().address},
            job=job,
        )
        if run.wait() != 0:
            raise RuntimeError(f"the clean {job} run failed:\n{run.log()}")
