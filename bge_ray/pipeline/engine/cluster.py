"""Joins or starts Ray, and leaves it again."""

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

import psutil

from bge_ray.errors import BgeRayError
from bge_ray.pipeline.engine.receipts import wait_for_paths
from bge_ray.settings.sections import ResourcesSettings

logger = logging.getLogger(__name__)

LOCAL = "local"
# What the processes of a local cluster are given to end.
EXIT_S = 10.0


# For a cluster that lives as long as one job, on one machine. A worker that waits for the next unit has
# loaded its libraries and its tokenizer: where there are more workers than cores, Ray would end it after a
# second. And nobody asks such a cluster for its events and metrics, which cost a per cent of two cores.
LOCAL_RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
}


def prepare_environment() -> None:
    """Choose safe defaults for a local cluster; to be called before Ray is imported.

    A cluster that this process will start listens on the loopback interface only, asks for a
    token that exists in this process tree alone, tells nobody that it is used, and keeps its workers. A job
    that joins a cluster (RAY_ADDRESS is set) changes none of that. No job connects again once it has left.
    """
    if "ray" in sys.modules:
        return
    # A thread of Ray Data that outlives its stopped run would otherwise join the cluster, or start one, anew.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if "RAY_ADDRESS" in os.environ:
        return
    for name, value in LOCAL_RAY.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def connect(settings: ResourcesSettings) -> None:
    """Join the cluster of ``resources.address`` or RAY_ADDRESS, or start a local one."""
    prepare_environment()
    import ray

    _quieten()
    if ray.is_initialized():
        return
    address = settings.address or os.environ.get("RAY_ADDRESS") or LOCAL
    with _signal_handlers_kept():
        if address == LOCAL:
            # An address left over from a cluster that died would otherwise be tried first, for minutes.
            ray.init(
                address=LOCAL,
                include_dashboard=False,
                logging_level="WARNING",
                _node_ip_address="127.0.0.1",
            )
        else:
            ray.init(address=address, logging_level="WARNING")


def is_shared(settings: ResourcesSettings) -> bool:
    """Tell whether the job joins a cluster, which may grow, instead of starting one on this machine."""
    return (settings.address or os.environ.get("RAY_ADDRESS") or LOCAL) != LOCAL


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Put back the handlers that Ray replaces by its own, which exit without giving the lease back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def disconnect() -> None:
    """Leave the cluster; a local one ends with it, to its last process. Nothing to do where Ray never was."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return
    # Data paths that were cut off end through Ray, while they can.
    wait_for_paths(EXIT_S)
    started = psutil.Process().children(recursive=True)
    with _signal_handlers_kept():
        sys.modules["ray"].shutdown()
    # Now and then a worker that is told to exit hangs in its libraries' own clean-up, with all its memory.
    _, left = psutil.wait_procs(started, timeout=EXIT_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _quieten() -> None:
    # Our own lines say how far the run is; Ray's warnings still come through.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    # Encoders reserve a GPU and a CPU on purpose: the process that feeds the GPU needs a core.
    operators = logging.getLogger("ray.data._internal.execution.operators.map_operator")
    operators.addFilter(_is_news)
    # They compare a pool with the number of spans; one span may hold many units.
    for text in ("The maximum number of concurrent tasks", "The minimum number of concurrent actors"):
        warnings.filterwarnings("ignore", message=text, module="ray.data")


def _is_news(record: logging.LogRecord) -> bool:
    return "both num_cpus and num_gpus" not in record.getMessage()


def root_cause(error: Exception) -> str:
    """Return in one line what made a Ray task or actor fail; Ray's own text is its whole traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BgeRayError):
        return " ".join(str(cause).split())
    return str(error).strip().splitlines()[-1]
