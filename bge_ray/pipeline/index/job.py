"""The index job: embedding shards to a FAISS index whose recall was measured.

Train once, add in parts, merge by ranges of lists, tune, publish. Parts and merged pieces are named by
what went into them, so a rerun, or a run over a data set that has changed a little, does what is
missing and no more. What was published last stays whole until `index.json` names its successor.
"""

import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ray

from bge_ray.dataset.folder import PARALLEL_REQUESTS, Dataset
from bge_ray.dataset.pointer import refuse_pointer
from bge_ray.errors import DatasetMismatchError, IndexBuildError, RecallError
from bge_ray.index.factory import index_bytes
from bge_ray.pipeline.engine.disks import refuse_unseen
from bge_ray.pipeline.engine.pools import PoolRequest, await_pools
from bge_ray.pipeline.engine.stopping import StopRequest
from bge_ray.pipeline.index.build import carry_build
from bge_ray.pipeline.index.inputs import Inputs, read_inputs
from bge_ray.pipeline.index.published import FOLDER, index_files, read_index
from bge_ray.pipeline.index.steps import Build, trained_path
from bge_ray.pipeline.work import Told, carry_out, refuse_taken
from bge_ray.records.canonical import to_json
from bge_ray.records.ids import IdArray
from bge_ray.records.index import IndexDescription
from bge_ray.records.reports import IndexReport, read_report
from bge_ray.report.advice import advise_index
from bge_ray.report.facts import RunFacts, Workers, summarise
from bge_ray.report.index_page import index_page
from bge_ray.run_id import run_id
from bge_ray.settings.sections import Settings
from bge_ray.storage.concatenate import remove_unfinished
from bge_ray.storage.objects import Storage, join
from bge_ray.storage.ownership import OwnedFolder, digest_object, open_folder
from bge_ray.storage.sweep import is_due, remove_empty_folders, retire

logger = logging.getLogger(__name__)

NAMES = ("index.json", "training.json")
# Files below the folder whose names only a build makes: those that searches read, and what they are made of.
_SEARCHED = re.compile(r"[0-9a-f]{16}/(index|range-\d{5}|shard-\d{5})\.faiss")
_BUILT = re.compile(
    r"trained/[0-9a-f]{16}\.(faiss|sizes)|parts/[0-9a-f]{16}\.(part|shard)|"
    r"[0-9a-f]{16}/(piece-\d{7}-\d{7}|sizes|untuned-\d{5}|(index|range-\d{5})\.faiss\.(head|piece-\d{5}))"
)


def build_index(settings: Settings, stop: StopRequest | None = None) -> IndexDescription:
    """Build the index of a data set, doing only what is not done yet.

    Args:
        settings: needs output.uri, a data set that the embed job completed.
        stop: asked between tasks whether to stop.

    Returns:
        What index.json says; ``reached`` says whether the recall target was.

    Raises:
        SettingsError, CorpusError, DatasetMismatchError: there is no complete data set, or the factory is not
            supported, or the queries are no texts; nothing was written.
        OutputCollisionError, OutputBusyError: the folder is another's, or another run is building this index.
        IncompleteRunError, IndexBuildError, StorageError: an input or a part is damaged or missing; what was
            published before is as it was.
    """
    facts = RunFacts("index", run_id())
    work = IndexWork(settings)
    carry_out(work, facts, stop)
    return work.index


def plan_index(settings: Settings) -> str:
    """Say what `build_index` would build, without building (``--dry-run``)."""
    work = IndexWork(settings)
    manifest, spec = work.inputs.manifest, work.inputs.spec
    return (
        f"{spec.factory}: {manifest.vectors:,} vectors in {len(manifest.shards):,} shards, "
        f"{min(spec.training_rows, manifest.vectors):,} training rows, about "
        f"{index_bytes(spec, manifest.vectors) / 1e6:,.0f} MB, "
        + (f"chosen: {work.inputs.choice}; " if work.inputs.choice is not None else "")
        + ("up to date: nothing to do" if work.published() is not None else "to be built")
    )


def index_outcome(settings: Settings, stop: StopRequest | None = None) -> str:
    """Build the index as `build_index` does, and say in one line what came of it.

    Raises:
        RecallError: the index was built now and is published, and misses its recall target. A run that has
            nothing to do tells of that and is a success: another one would not find more.
    """
    work = IndexWork(settings)
    carry_out(work, RunFacts("index", run_id()), stop)
    index, recall = work.index, work.index.tuned_recall
    effort = f" at {index.parameter} {index.effort}" if index.parameter else ""
    rescored = f" of {index.rescore} candidates rescored exactly" if index.rescore else ""
    reranked = index.recall_after_exact_reranking
    line = (
        f"{index.factory}: {index.ntotal:,} vectors, recall@{recall.k} {recall.value:.4f}{effort}{rescored}"
        + (
            ""
            if index.rescore
            else f", {reranked.value:.4f} with {index.reranked_candidates:,} rescored exactly"
        )
        + f"; see {join(str(settings.output.uri), 'index', 'report.html')}"
    )
    if index.reached:
        return line
    line += f"; index.recall_target {index.recall_target:g} was not reached: "
    if not work.built:
        return f"{line}as the run that built it said"
    raise RecallError(
        f"{line}the index is published; set index.rescore, so that searches score candidates again, or build "
        "one with a larger code"
    )


class IndexWork:
    """One index build, planned; see `pipeline.work.Work`."""

    def __init__(self, settings: Settings) -> None:
        """Read the data set, and check that the index can be made of it; nothing is written."""
        settings.require("output.uri")
        self._settings = settings
        self._storage = Storage(settings.output.storage_timeout_s)
        self._root = str(settings.output.uri)
        refuse_pointer(self._storage, self._root, "output.uri")
        self._folder = open_folder(self._storage, join(self._root, FOLDER), "index", "output.uri", NAMES)
        # Before anything of it is read: what is not ours says nothing.
        refuse_taken([self._folder])
        self.inputs: Inputs = self._read_inputs()
        self.built = False
        self._told = Told()
        self._index: IndexDescription | None = None
        self._sizes: IdArray | None = None

    @property
    def storage(self) -> Storage:
        """For all requests."""
        return self._storage

    @property
    def folders(self) -> tuple[OwnedFolder, ...]:
        """The folder of the index."""
        return (self._folder,)

    def _read_inputs(self) -> Inputs:
        return read_inputs(Dataset(self._storage, self._root), self._settings)

    @property
    def index(self) -> IndexDescription:
        """What is published.

        Raises:
            IndexBuildError: nothing is, as yet.
        """
        if self._index is None:
            raise IndexBuildError(f"{self._folder.uri}: no index is published")
        return self._index

    def published(self) -> IndexDescription | None:
        """Return the published index if it is of these inputs and its files are there."""
        try:
            there = read_index(self._storage, self._root)
        except DatasetMismatchError as error:
            self._told.warn(f"{error}; building it anew")
            return None
        if there is None or there.inputs != self.inputs.key:
            return None
        if self._settings.index.retrain and there.training.path != self._fresh_training():
            return None
        for file in index_files(self._root, there):
            info = self._storage.info(file.path)
            if info is None or info.size != file.bytes:
                self._told.warn(f"{file.path}: is missing or has another size; building it again")
                return None
            if self._settings.index.verify and digest_object(self._storage, info) != file.sha256:
                self._told.warn(f"{file.path}: is damaged; building it again")
                return None
        return there

    def _fresh_training(self) -> str:
        shards = [m.embeddings.sha256 for m in self.inputs.manifest.shards if m.embeddings is not None]
        return trained_path(self.inputs.spec, shards)

    def current(self) -> IndexReport | None:
        """Return the report of the published index, if it is of what the data set is now."""
        # The run that held the lease before may have built just this, or embedded more.
        self.inputs = self._read_inputs()
        self._index = self.published()
        report = read_report(IndexReport, self._storage.read_optional(join(self._folder.uri, "report.json")))
        if self._index is None or report is None or not report.complete or report.key != self.inputs.key:
            return None
        return replace(report, index=self._index)

    def sweep_is_due(self) -> bool:
        """Tell whether files of an earlier index have been dead for long enough."""
        return is_due(self._storage, self._folder.uri, self._settings.output.grace_s, time.time())

    def do(self, facts: RunFacts, watch: Callable[[], None]) -> None:
        """Train, add, merge and tune, unless a run that was cut off had published."""
        if self._index is not None:
            return
        if self.inputs.choice is not None:
            logger.info("auto chose %s", self.inputs.choice)
        settings, gpus = self._settings, self._settings.index.gpus_per_task
        tasks = PoolRequest("tasks", "index.gpus_per_task", 1, count=1 if gpus else None, gpus=gpus)
        await_pools(settings, [tasks], watch)
        refuse_unseen(self.folders, watch)
        at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
        facts.plan(units=0, rows=self.inputs.manifest.vectors)  # its tasks are counted step by step
        facts.start(_workers(settings, at_once), time.time())
        build = Build(
            folder=self._folder,
            root=self._root,
            manifest=self.inputs.manifest,
            spec=self.inputs.spec,
            k=self.inputs.k,
            rescore=self.inputs.rescore,
            per_row=self.inputs.per_row,
            settings=settings.index,
            at_once=at_once,
            watch=watch,
            did=facts,
            log_interval_s=settings.report.log_interval_s,
        )
        self._index, self._sizes = carry_build(build, self.inputs, settings)
        self.built = True

    def publish(self, facts: RunFacts) -> None:  # noqa: ARG002 - nothing of it goes into index.json
        """Replace index.json."""
        if self._index is not None:
            self._folder.put("index.json", to_json(self._index))

    def report(self, facts: RunFacts, outcome: str, *, complete: bool) -> IndexReport:
        """Return what the build came to."""
        index = self._index
        if complete and index is not None:
            recall, reached = index.tuned_recall, "reached" if index.reached else "not reached"
            outcome = (
                f"complete: {index.ntotal:,} vectors; recall@{recall.k} of {index.recall_target:g} {reached}"
            )
        report = IndexReport(
            **summarise(facts, ended=time.time(), price_per_hour=self._settings.report.price_per_hour),
            key=self.inputs.key,
            complete=complete,
            outcome=outcome,
            files=index.files if index is not None else (),
            settings=self._settings.model_dump(mode="json"),
            output=self._root,
            index=index,
        )
        return replace(report, advice=tuple(advise_index(report)))

    def page(self, report: IndexReport) -> bytes:
        """Return the page of a report."""
        return index_page(report, self._sizes)

    def sweep(self) -> None:
        """Remove what the published index does not need, and what killed runs left unfinished."""
        index, folder = self._index, self._folder.uri
        if index is None:
            return
        live = {index.training.path, *index.parts, *(file.path for file in index.files)}
        # A listing names a local file by its full URI, so only what is below the folder can be compared.
        listed = {i.uri.rpartition(f"/{FOLDER}/")[2]: i.uri for i in self._storage.list_files(folder)}
        dead = {path: uri for path, uri in listed.items() if path not in live}
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            built = [uri for path, uri in dead.items() if _BUILT.fullmatch(path)]
            list(pool.map(lambda uri: self._storage.delete([uri]), built))
        searched = [path for path in dead if _SEARCHED.fullmatch(path)]
        retire(self._storage, folder, searched, self._settings.output.grace_s, time.time())
        remove_unfinished(self._storage, folder)
        for name in {path.partition("/")[0] for path in dead if "/" in path}:
            remove_empty_folders(self._storage, join(folder, name))


def _workers(settings: Settings, at_once: int) -> Workers:
    if settings.index.gpus_per_task:
        gpus = ray.cluster_resources().get("GPU", 0.0)
        return Workers("cuda", gpus, {"tasks": at_once}, model="tasks")
    return Workers("cpu", at_once, {"tasks": at_once}, model="tasks")
