"""Which tasks of mteb a run does: by name, of a benchmark, and folders; all that can be refused is, first."""

import difflib
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_ray.errors import SettingsError
from bge_ray.pipeline.mteb.averages import BAAI_MORE, CMTEB_31, CMTEB_35, Average, average_of
from bge_ray.pipeline.mteb.beir import beir_task
from bge_ray.pipeline.mteb.package import mteb
from bge_ray.settings.sections import MtebSettings
from bge_ray.storage.objects import Storage

# Kinds of tasks whose candidates are given, which a reranker can do alone.
RERANKING = ("Reranking", "InstructionReranking")
PROBE_S = 10.0
_NAMED = 3


@dataclass(frozen=True)
class Chosen:
    """The tasks of a run, each name once, and the mean that the benchmark has."""

    tasks: tuple[Any, ...]
    average: Average | None

    def leaves(self) -> tuple[Any, ...]:
        """Return the tasks that are evaluated, the parts of those that are made of parts before them."""
        found: dict[str, Any] = {}
        for task in self.tasks:
            for part in (*(task.metadata.tasks if task.is_aggregate else ()), task):
                found.setdefault(part.metadata.name, part)
        return tuple(found.values())


def searches(task: Any) -> bool:
    """Tell whether a task looks for passages of a corpus, or orders candidates of one."""
    return isinstance(task, mteb.abstasks.AbsTaskRetrieval)


def choose_tasks(asked: MtebSettings, storage: Storage) -> Chosen:
    """Return the tasks that the settings name.

    Raises:
        SettingsError: none is named, a name is unknown (the nearest are told), two have one name, a task is
            not of text alone, or its data is neither here nor to be had.
        CorpusError: a folder lacks what a task needs.
    """
    if not (asked.tasks or asked.benchmark or asked.beir):
        raise SettingsError("set mteb.tasks, mteb.benchmark or mteb.beir, which say what to measure on")
    benchmark, average = ((), None) if asked.benchmark is None else find_benchmark(asked.benchmark)
    folders = [beir_task(storage, uri) for uri in asked.beir or ()]
    tasks = (*benchmark, *map(_task, asked.tasks or ()), *folders)
    names = [task.metadata.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingsError(f"mteb: several tasks are named {twice[0]}, whose results would be one file")
    for task in tasks:
        if list(task.metadata.modalities) != ["text"]:
            kinds = ", ".join(task.metadata.modalities)
            raise SettingsError(
                f"mteb: the task {task.metadata.name} is of {kinds}, and models here read text"
            )
    chosen = Chosen(tasks, average)
    _refuse_unreachable(chosen.leaves())
    return chosen


def _task(name: str) -> Any:
    from mteb.get_tasks import TASK_LIST  # the function of this name hides the module

    known = {task.metadata.name for task in TASK_LIST}
    if name in known:
        return mteb.get_task(name)
    mocks = {task.metadata.name: task for task in _mocks()}
    if name in mocks:
        return type(mocks[name])()
    raise SettingsError(f"mteb.tasks: mteb {mteb.__version__} has no task {name}{_near(name, known)}")


def _mocks() -> Sequence[Any]:
    """Return mteb's own small tasks, whose data is in the package."""
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID

    found: Sequence[Any] = ALL_MOCK_TASK_TEST_GRID
    return found


def find_benchmark(name: str) -> tuple[tuple[Any, ...], Average]:
    """Return the tasks of a benchmark, and the mean over them.

    Raises:
        SettingsError: there is none of the name; the nearest are told.
    """
    known = {benchmark.name: benchmark for benchmark in mteb.get_benchmarks()}
    aliases = {alias: one for one in known.values() for alias in one.aliases or ()}
    if name == CMTEB_35:
        more = (mteb.get_task(task, hf_subsets=[subset]) for task, subset in BAAI_MORE.items())
        tasks = (*known[CMTEB_31].tasks, *more)
    elif name in known or name in aliases:
        tasks = tuple((known | aliases)[name].tasks)
    else:
        near = _near(name, [*known, *aliases, CMTEB_35])
        raise SettingsError(f"mteb.benchmark: mteb {mteb.__version__} has no benchmark {name}{near}")
    full = name if name == CMTEB_35 else (known | aliases)[name].name
    return tasks, average_of(full, [(task.metadata.type, task.metadata.name) for task in tasks])


def _near(name: str, known: Iterable[str]) -> str:
    folded = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=_NAMED, cutoff=0.5)
    return f"; did you mean {' or '.join(folded[one] for one in near)}?" if near else ""


def _refuse_unreachable(tasks: Sequence[Any]) -> None:
    """Refuse tasks whose data is not in the cache of the hub, where the hub does not answer."""
    from huggingface_hub import constants

    missing = [task for task in tasks if not task.is_aggregate and _is_on_hub(task) and not _is_cached(task)]
    if not missing or (not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)):
        return
    names = ", ".join(task.metadata.name for task in missing[:5])
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
    raise SettingsError(
        f"mteb: the data of {names}{more} must be fetched, and {why}; fetch it into HF_HOME where there is a "
        "network, or name folders in the BEIR layout by mteb.beir"
    )


def _is_on_hub(task: Any) -> bool:
    return type(task).__module__.startswith("mteb.tasks")


def _is_cached(task: Any) -> bool:
    from huggingface_hub import constants

    dataset = task.metadata.dataset
    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{dataset['path'].replace('/', '--')}" / "snapshots"
    return (folder / str(dataset["revision"])).is_dir()


def _answers(endpoint: str) -> bool:
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310 - the hub's own address
    try:
        with urllib.request.urlopen(request, timeout=PROBE_S):  # noqa: S310
            return True
    except OSError:
        return False
