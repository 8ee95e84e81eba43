"""Draws the receipts of a data path, and ends the path where the run ends before it."""

import contextlib
import gc
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from bge_ray.pipeline.engine.stopping import POLL_S

T = TypeVar("T")

# Of the threads that draw; `wait_for_paths` knows them by it.
THREAD_NAME = "receipts"
_LAST = object()
# An execution gives back its tasks and actors within seconds of its end.
ENDING_S = 30.0
# Who ends a path waits so long for it: that of a cluster that is gone never ends.
ENDED_S = 5.0


class PathEnd:
    """Ends an execution of Ray Data from inside its own loop, once ``set``.

    Ray Data has no call for that, and an execution that is left alone goes on. It is an execution
    callback, and the factory of itself, in the context that a data path is made under.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._execution: weakref.ref[threading.Thread] | None = None

    def set(self) -> None:
        """Let the execution end at its next step, which is a fraction of a second away."""
        self._event.set()

    def __call__(self) -> "PathEnd":
        """Return the callback of an execution: itself."""
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> "PathEnd":
        return self  # a data path works with a copy of the context

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PathEnd, ()  # the context travels to workers, which execute nothing

    def wait(self, timeout_s: float) -> None:
        """Wait until the execution, a thread, is over."""
        thread = self._execution() if self._execution is not None else None
        if thread is not None and thread.is_alive():
            thread.join(timeout_s)

    def before_execution_starts(self, execution: object) -> None:
        """Note the execution."""
        if isinstance(execution, threading.Thread):
            self._execution = weakref.ref(execution)

    def on_execution_step(self, _: object) -> None:
        """Tell the reader of the output that there is no more, if the end was set."""
        if self._event.is_set():
            raise StopIteration

    def after_execution_succeeds(self, _: object) -> None:
        """Do nothing."""

    def after_execution_fails(self, _: object, error: Exception) -> None:
        """Do nothing."""


@contextlib.contextmanager
def data_context(*callbacks: Any) -> Iterator[None]:
    """Make data paths under settings of our own; those of the process, of a notebook say, stay.

    A data path takes a copy of the context that it is made under.

    Args:
        callbacks: what is told of the steps of the paths' executions.
    """
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, *callbacks]
    # Our own lines say how far the run is.
    context.issue_detectors_config.detectors = []
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # One row is one unit: without this a stream of small units is held back until 128 MiB are there.
    context.target_max_block_size = 1
    # A job may wait for its GPUs longer than the half hour after which Ray gives up.
    context.execution_no_progress_timeout_s = -1
    # Ray's own wrapping of what a stage raises loses which error it was.
    context.raise_original_map_exception = True
    with DataContext.current(context):
        yield


def draw_receipts(start: Callable[[], Iterable[T]], watch: Callable[[], None]) -> Iterator[T]:
    """Yield what a data path gives as it comes, calling ``watch`` at least every POLL_S; it raises to stop.

    The items are drawn in a thread, because waiting for the next one may take minutes. If the caller
    goes no further, the path is ended, and its actors and tasks with it, before the caller goes on: what
    they ask, the ledger say, is there until then.

    Args:
        start: makes the data path and returns its output.
        watch: called while waiting.
    """
    end = PathEnd()
    # Held by the thread alone: who keeps a traceback must not keep the path, and its actors with it.
    with data_context(end):
        held = [start()]
    ready: queue.SimpleQueue[object] = queue.SimpleQueue()

    def draw() -> None:
        try:
            for item in held.pop():
                ready.put(item)
            ready.put(_LAST)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            _forget_frames(error)
            ready.put(error)
        # Ray Data lets its actors go by forgetting them, and what it forgets refers to itself in circles.
        end.wait(ENDING_S)
        gc.collect()

    drawer = threading.Thread(target=draw, name=THREAD_NAME, daemon=True)
    drawer.start()
    try:
        while True:
            watch()
            try:
                item = ready.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if item is _LAST:
                return
            if isinstance(item, BaseException):
                raise item
            yield item  # type: ignore[misc]  # what `items` yields
    finally:
        end.set()
        drawer.join(ENDED_S)


def _forget_frames(error: BaseException) -> None:
    """Take the tracebacks off an error and those behind it: their frames hold the path, and its actors."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        link = left.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        link.__traceback__ = None
        left += [link.__cause__, link.__context__]


def wait_for_paths(timeout_s: float) -> None:
    """Wait until the data paths that were ended have given back what they hold."""
    for thread in threading.enumerate():
        if thread.name == THREAD_NAME:
            thread.join(timeout_s)
