"""Joins or starts Ray, and sizes the stages from what the cluster has."""

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from bge_ray.errors import BgeRayError, SettingsError
from bge_ray.pipeline.engine.receipts import wait_for_paths
from bge_ray.settings.sections import ResourcesSettings

logger = logging.getLogger(__name__)

# Of one CPU machine's cores this much is left to reading and writing tasks.
CPUS_FOR_TASKS = 1.0
WRITER_CPUS = 0.1
MAX_WRITERS = 32
# Tokenising one core's worth of short passages feeds a fraction of a GPU; see README, Tuning.
READERS_PER_GPU = 6
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


@dataclass(frozen=True)
class Sizes:
    """How many actors and tasks each stage has, and what each of them reserves."""

    num_encoders: int
    encoder_cpus: float
    encoder_gpus: float
    encoder_threads: int
    num_readers: int
    reader_cpus: float
    num_writers: int
    writer_cpus: float = WRITER_CPUS

    def __str__(self) -> str:
        encoders = in_words(self.encoder_gpus, self.encoder_cpus, self.encoder_threads)
        others = f"readers {self.num_readers}, writers {self.num_writers}"
        return f"encoders {self.num_encoders} ({encoders}), {others}"

    @property
    def device(self) -> str:
        """Torch device of the encoders."""
        return "cuda" if self.encoder_gpus else "cpu"

    @property
    def devices(self) -> float:
        """GPUs that the encoders take, or CPU cores where they have none: what is paid for by the hour."""
        return self.num_encoders * (self.encoder_gpus or self.encoder_threads)


def in_words(gpus: float, cpus: float, threads: int) -> str:
    """Say for a log line what each actor of a pool reserves and uses."""
    return f"each: {f'GPUs {gpus:g}, ' if gpus else ''}CPUs {cpus:g}, threads {threads}"


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

    _configure_ray_data()
    if ray.is_initialized():
        return
    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    with _signal_handlers_kept():
        if address == "local":
            # An address left over from a cluster that died would otherwise be tried first, for minutes.
            ray.init(
                address="local",
                include_dashboard=False,
                logging_level="WARNING",
                _node_ip_address="127.0.0.1",
            )
        else:
            ray.init(address=address, logging_level="WARNING")


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


def cluster_sizes(settings: ResourcesSettings) -> Sizes:
    """Size the stages for the cluster that `connect` joins or starts."""
    connect(settings)
    import ray

    from bge_ray.pipeline.engine.tasks import largest_node

    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    return size_stages(settings, cpus, gpus, node_cpus=largest_node("CPU"))


def size_stages(
    settings: ResourcesSettings, cpus: float, gpus: float, *, node_cpus: float | None = None
) -> Sizes:
    """Size the stages for a cluster.

    On GPUs an encoder reserves its GPU and one CPU, and readers take what is left. On CPUs there is
    one single-threaded encoder a core, which beats one encoder with many threads; together
    they reserve all cores but one. Where encoders reserve parts of cores, reading and writing
    reserve nothing: what is left is spread over the nodes, and after the loss of a node encoders
    may take all of it, so that a task that needs a share of a core could wait for ever.

    Args:
        settings: what the user fixed.
        cpus: CPUs of the cluster.
        gpus: GPUs of the cluster.
        node_cpus: CPUs of its largest node, more than which no encoder can have; None: of its only one.

    Raises:
        SettingsError: the encoders cannot fit beside at least one reader and one writer.
    """
    wanted = settings.gpus_per_encoder
    encoder_gpus = (1.0 if gpus >= 1 else 0.0) if wanted is None else wanted
    if encoder_gpus > 0:
        num_encoders = settings.num_encoders or max(1, int(gpus / encoder_gpus))
        encoder_cpus = 1.0 if cpus >= 2 * num_encoders else 0.25
        threads = settings.threads_per_encoder or 1
    else:
        num_encoders = settings.num_encoders or max(1, int(cpus))
        share = (cpus - CPUS_FOR_TASKS) / num_encoders if cpus > CPUS_FOR_TASKS else 0.5 / num_encoders
        share = min(share, node_cpus or share)
        encoder_cpus = float(int(share)) if share >= 1 else int(share * 10_000) / 10_000
        threads = settings.threads_per_encoder or max(1, int(cpus) // num_encoders)
    left = cpus - num_encoders * encoder_cpus
    if left < WRITER_CPUS + 0.1:
        raise SettingsError(
            f"resources.num_encoders {num_encoders}: they reserve {num_encoders * encoder_cpus:g} of "
            f"{cpus:g} CPUs and leave none for reading and writing; lower it, or add CPUs"
        )
    num_writers = max(1, min(MAX_WRITERS, num_encoders, int(left / 4 / WRITER_CPUS)))
    for_readers = left - num_writers * WRITER_CPUS
    reader_cpus = 1.0 if for_readers >= 1 else int(for_readers * 100) / 100
    most = max(1, int(for_readers / reader_cpus))
    useful = READERS_PER_GPU * num_encoders if encoder_gpus else max(1, num_encoders // 4)
    shared = not encoder_gpus or encoder_cpus < 1
    return Sizes(
        num_encoders=num_encoders,
        encoder_cpus=encoder_cpus,
        encoder_gpus=encoder_gpus,
        encoder_threads=threads,
        num_readers=settings.num_readers or min(most, useful),
        reader_cpus=0.0 if shared else reader_cpus,
        num_writers=num_writers,
        writer_cpus=0.0 if shared else WRITER_CPUS,
    )


def cap_sizes(sizes: Sizes, *, spans: int, units: int) -> Sizes:
    """Return sizes without the actors and tasks that a small job would leave idle."""
    return dataclasses.replace(
        sizes,
        num_encoders=min(sizes.num_encoders, units),
        num_readers=min(sizes.num_readers, spans),
        num_writers=min(sizes.num_writers, units),
    )


def _configure_ray_data() -> None:
    from ray.data import DataContext

    # Our own lines say how far the run is; Ray's warnings still come through.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.issue_detectors_config.detectors = []
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # One row is one unit: without this a stream of small units is held back until 128 MiB are there.
    context.target_max_block_size = 1
    # A job may wait for its GPUs longer than the half hour after which Ray gives up.
    context.execution_no_progress_timeout_s = -1
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
