"""The embed job in one process, without Ray: the same plan, stages and storage, one after the other.

Ray is what is taken away: tasks are called, the ledger is an object, a pool is one actor called in turn.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

from bge_ray.pipeline import work
from bge_ray.pipeline.embed import job, planning, prepare
from bge_ray.pipeline.embed.read import read_stage
from bge_ray.pipeline.embed.sharing import Way, read_given_stage, write_given_stage
from bge_ray.pipeline.embed.tasks import EmbedJob, ReadTask
from bge_ray.pipeline.embed.write import commit_stage
from bge_ray.pipeline.engine import isolation
from bge_ray.pipeline.engine.model_stage import ModelJob, ModelStage
from bge_ray.pipeline.engine.parcel import Parcel
from bge_ray.pipeline.engine.pools import Pool, Sizes, Tasks
from bge_ray.storage.objects import Storage
from tests.support.ledgers import Handle

SIZES = Sizes({"encoders": Pool(1, 1.0, 0.0, 1)}, {"readers": Tasks(1, 0.0), "writers": Tasks(1, 0.0)})


class Alone:
    """In place of leases: nobody else is there, and a process that died left nothing to wait for."""

    def __init__(self, *_: Any) -> None:
        self.lost = threading.Event()

    def __enter__(self) -> "Alone":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check(self) -> None:
        pass


_actors: dict[Any, ModelStage] = {}


def actor_for(model: ModelJob) -> ModelStage:
    """Return the actor of a model, loaded once."""
    if model.spec not in _actors:
        _actors[model.spec] = ModelStage(model)
    actor = _actors[model.spec]
    actor._job = model  # of this run, with its ledger
    return actor


def run_here(function: Callable[..., Any], arguments: Any, **_: Any) -> Iterator[tuple[int, Any]]:
    return ((number, function(*some)) for number, some in enumerate(arguments))


def through(
    read: Callable[..., Any], write: Callable[..., Any], given: EmbedJob, model: ModelJob, tasks: Any
) -> Iterator[Parcel]:
    """The data path of an embed run."""
    actor = actor_for(model)
    for task in tasks:
        for batch in read(task.parcel().to_batch(), given):
            for receipt in write(actor(batch), given):
                yield Parcel.from_batch(receipt)


def embedding_receipts(
    given: EmbedJob, model: ModelJob, sizes: Sizes, tasks: Sequence[ReadTask]
) -> Iterator[Parcel]:
    return through(read_stage, commit_stage, given, model, tasks)


def by_calls(
    model: ModelJob, stage: type, sizes: Sizes, watch: Any, book: Callable[[Parcel], None], interval: float
) -> Way:
    def encode(given: EmbedJob, tasks: Sequence[ReadTask]) -> None:
        for receipt in through(read_given_stage, write_given_stage, given, model, tasks):
            book(receipt)

    return Way(lambda does, task, arguments: [task(*some) for some in arguments], encode)


def follow(start: Callable[[], Any], book: Callable[[Parcel], None], watch: Callable[[], None]) -> None:
    for receipt in start():
        book(receipt)


@contextlib.contextmanager
def without_ray(make_storage: Callable[[float], Storage] = Storage) -> Iterator[None]:
    """Let `embed` run in this process meanwhile, over a storage of the test's making."""
    with contextlib.ExitStack() as stack:
        for module, changes in {
            isolation: {"ray": SimpleNamespace(get=lambda answer: answer)},
            planning: {
                "run_tasks": run_here,
                "ray": SimpleNamespace(cluster_resources=lambda: {"CPU": 1.0}),
            },
            prepare: {
                "run_tasks": run_here,
                "Storage": make_storage,
                "await_pools": lambda *_: None,
                "cluster_sizes": lambda *_: SIZES,
                "device_of": lambda *_: "cpu",
            },
            job: {
                "embed_sizes": lambda *_: SIZES,
                "running_ledger": lambda: contextlib.nullcontext(Handle()),
                "embedding_receipts": embedding_receipts,
                "by_ray": by_calls,
                "follow": follow,
                "refuse_unseen": lambda *_: None,  # there is no other node
                "Telemetry": lambda _: MagicMock(),
                "embed_page": lambda _: b"a page",  # a second of drawing
            },
            work: {"Leases": Alone},
        }.items():
            stack.enter_context(patch.multiple(module, **changes))
        yield
