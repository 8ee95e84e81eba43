"""The result files of mteb: its own code reads and writes them on this machine; they live in storage."""

from pathlib import Path
from typing import Any

from bge_ray.pipeline.mteb.contestants import Entrant
from bge_ray.pipeline.mteb.package import mteb
from bge_ray.records.model import EMBEDDING
from bge_ray.records.reports import TaskScore
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder

FOLDER = "results"
# Beside the result of each task, of all of them.
SHARED = ("model_meta.json", "run_settings.jsonl")


def meta_of(entrant: Entrant) -> Any:
    """Return a contestant as mteb describes models."""
    encoder = entrant.encoder
    spec = encoder.raw if encoder is not None else entrant.reranker
    return mteb.models.ModelMeta(
        loader=None,
        name=entrant.name,
        revision=entrant.revision,
        release_date=None,
        languages=None,
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=None if spec is None else spec.max_length,
        embed_dim=None if encoder is None else encoder.spec.output(EMBEDDING).dim,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=[],
        similarity_fn_name="cosine",
        use_instructions=None if encoder is None else bool(encoder.rules.query or encoder.rules.prompts),
        training_datasets=None,
        model_type=["dense" if entrant.reranker is None else "cross-encoder"],
    )


def file_of(entrant: Entrant, name: str) -> str:
    """Return the path of a file of a contestant, below the output."""
    return f"{FOLDER}/{meta_of(entrant).model_name_as_path()}/{entrant.revision}/{name}"


class Results:
    """The results of one contestant, in a cache of mteb's on this machine and in the output."""

    def __init__(self, storage: Storage, folder: OwnedFolder, entrant: Entrant, cache: Path) -> None:
        """Fetch nothing yet.

        Args:
            storage: for all requests.
            folder: the output.
            entrant: whose results.
            cache: a folder of this machine.
        """
        self._storage, self._folder, self._entrant = storage, folder, entrant
        self._root = cache
        self.cache = mteb.ResultCache(cache)

    def read(self, task: Any) -> Any | None:
        """Return the result of a task as mteb holds it, if it is there, whole, and of the same data."""
        path = self._fetch(f"{task.metadata.name}.json")
        if path is None:
            return None
        try:
            found = mteb.TaskResult.from_disk(path)
            whole = not found.get_missing_evaluations(task)
        except (ValueError, KeyError):
            whole = False
        if not whole or found.dataset_revision != task.metadata.revision:
            path.unlink()
            return None
        return found

    def _fetch(self, name: str) -> Path | None:
        path = self._root / file_of(self._entrant, name)
        data = self._storage.read_optional(join(self._folder.uri, file_of(self._entrant, name)))
        if data is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def put(self, task: Any) -> None:
        """Put the result that mteb has just written into the output; the result itself last."""
        for name in (*SHARED, f"{task.metadata.name}.json"):
            path = file_of(self._entrant, name)
            self._folder.put(path, (self._root / path).read_bytes())

    def fetch_shared(self) -> None:
        """Fetch what mteb adds to with each task."""
        for name in SHARED:
            self._fetch(name)


def score_of(entrant: Entrant, task: Any, result: Any) -> TaskScore:
    """Return the main score of a result, the mean over the splits and subsets of the task."""
    scores = [
        entry["main_score"]
        for split in task.eval_splits
        for entry in result.scores[split]
        if task.is_aggregate or entry["hf_subset"] in task.hf_subsets
    ]
    return TaskScore(
        model=f"{entrant.name} {entrant.revision}",
        task=task.metadata.name,
        type=task.metadata.type,
        score=float(sum(scores) / len(scores)),
        seconds=result.evaluation_time,
        mteb_version=result.mteb_version,
    )
