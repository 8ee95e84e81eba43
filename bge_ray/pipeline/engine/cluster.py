"""Joins or starts Ray, and leaves it again."""

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from bge_ray.errors import BgeRayError, IncompleteRunError, SettingsError
from bge_ray.pipeline.engine.liveness import tcp_door, unwatch_cluster, watch_cluster
from bge_ray.pipeline.engine.receipts import wait_for_paths
from bge_ray.settings.sections import ResourcesSettings

logger = logging.getLogger(__name__)

LOCAL = "local"
_TOO_LATE = "timed out during startup"
# With less than this left, what Ray writes of a session at its start may not fit.
SESSION_BYTES = 16 << 20
# What data paths that were cut off are given to end, and then the processes of a local cluster, which hold
# nothing any more: some take seconds to unload their libraries, and now and then one hangs doing so.
PATHS_EXIT_S, PROCESSES_EXIT_S = 10.0, 0.5
# Set to anything, it keeps the session folder of a run that went well, too.
KEEP_SESSION = "BGE_RAY_KEEP_SESSION"
# What a cluster that is there needs to answer, and one that is about to be there may take.
PROBE_S, PROBES = 3.0, 3
# What every gRPC server answers to: how HTTP/2 begins (RFC 9113, 3.4), with settings that change nothing.
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
SETTINGS_FRAME = 4


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


def cluster_address(settings: ResourcesSettings) -> str:
    """Return the address of the cluster to join, or LOCAL for one of this process's own."""
    return settings.address or os.environ.get("RAY_ADDRESS") or LOCAL


def is_shared(settings: ResourcesSettings) -> bool:
    """Tell whether the job joins a cluster, which may grow, instead of starting one on this machine."""
    return cluster_address(settings) != LOCAL


def prepare_environment(settings: ResourcesSettings) -> None:
    """Choose safe defaults for a local cluster, before Ray is imported where that is possible.

    A cluster that this process will start listens on the loopback interface only, asks for a
    token that exists in this process tree alone, tells nobody that it is used, and keeps its workers. A job
    that joins a cluster changes none of that. No job connects again once it has left.
    """
    if is_connected():
        return
    if "ray" not in sys.modules:
        # A thread of Ray Data that outlives its stopped run would otherwise join the cluster, or start one.
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if is_shared(settings):
        return
    for name, value in LOCAL_RAY.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "ray" in sys.modules:
        _reread_environment()


def is_connected() -> bool:
    """Tell whether this process is in a cluster, without importing Ray."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def restore_environment(variables: Mapping[str, str]) -> None:
    """Put the environment back as it was before `prepare_environment`, for this process and for its Ray."""
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
    if "ray" in sys.modules:
        _reread_environment()


def _reread_environment() -> None:
    """Let a Ray that was imported before, by a notebook say, take what it reads at its import."""
    import ray._private.ray_constants as constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    constants.ENABLE_RAY_CLUSTER = constants.env_bool(
        constants.ENABLE_RAY_CLUSTERS_ENV_VAR, not constants.IS_WINDOWS_OR_OSX
    )
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def connect(settings: ResourcesSettings) -> None:
    """Join the cluster of ``resources.address`` or RAY_ADDRESS, or start a local one.

    Raises:
        SettingsError: no cluster is there, or it refuses; or the address is not that of a cluster.
        IncompleteRunError: a local one did not start in time.
    """
    prepare_environment(settings)
    import ray

    if ray.is_initialized():
        _watch(ray)
        return
    address = cluster_address(settings)
    with _signal_handlers_kept():
        if address == LOCAL:
            # An address left over from a cluster that died would otherwise be tried first, for minutes.
            _start(ray)
        else:
            _join(ray, address, "resources.address" if settings.address else "RAY_ADDRESS")
    _watch(ray)


def _start(ray: Any) -> None:
    try:
        ray.init(
            address=LOCAL, include_dashboard=False, logging_level="WARNING", _node_ip_address="127.0.0.1"
        )
    except Exception as error:
        if _TOO_LATE not in str(error):  # Ray has no class for it
            raise
        folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
        if (free := shutil.disk_usage(folder).free) < SESSION_BYTES:
            raise IncompleteRunError(
                f"the Ray of this job's own did not start: {folder}, where it writes, has {free:,} bytes "
                "left; make room, or name another folder with RAY_TMPDIR"
            ) from error
        raise IncompleteRunError(
            "the Ray of this job's own did not start in time, as on a machine that is too busy; run it again"
        ) from error


def _join(ray: Any, address: str, key: str) -> None:
    check_address(_newest_cluster(ray, key) if address == "auto" else address, key)
    try:
        ray.init(address=address, logging_level="WARNING")
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        said = " ".join(str(error).split())[:300]
        raise SettingsError(f"{key} {address}: the cluster cannot be joined: {said}") from error


def _newest_cluster(ray: Any, key: str) -> str:
    """Return what `auto` stands for; a cluster that died leaves its address behind."""
    given = os.environ.get("RAY_ADDRESS", "auto")
    found = ray._private.utils.read_ray_address(None) if given in ("", "auto") else given
    if not found:
        raise SettingsError(f"{key} auto: no Ray cluster runs on this machine; start one, or give host:port")
    return str(found)


def check_address(address: str, key: str) -> None:
    """Refuse an address at which there is no Ray cluster: Ray itself would wait for one.

    Args:
        address: what was given.
        key: by which setting or variable, for messages.

    Raises:
        SettingsError: says what is wrong with it.
    """
    scheme = address.partition("://")[0]
    if scheme in ("http", "https"):
        raise SettingsError(
            f"{key} {address}: is the address of a dashboard, for `ray job submit`; a job takes that of the "
            "cluster, such as head:6379, and a submitted job needs none"
        )
    if scheme == "ray":
        raise SettingsError(
            f"{key} {address}: Ray Client cannot run these jobs; submit the job with `ray job submit`, or "
            "run it on a node of the cluster and give the cluster's address, such as head:6379"
        )
    if (match := re.fullmatch(r"(?:[\w.-]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", address)) is None:
        raise SettingsError(f"{key} {address}: is no address; expected host:port, `auto` or `{LOCAL}`")
    if not 0 < int(match[1]) < 65536:
        raise SettingsError(f"{key} {address}: there is no port {match[1]}")
    for attempt in range(PROBES):
        try:
            with tcp_door(address)() as made:
                speaks = _speaks_grpc(made)
        except OSError as error:
            said = str(error)
            time.sleep(1 if attempt < PROBES - 1 else 0)
            continue
        if speaks:
            return
        raise SettingsError(
            f"{key} {address}: what answers there is no Ray cluster; give the address that "
            "`ray start` printed"
        )
    raise SettingsError(
        f"{key} {address}: no Ray cluster answers there ({said}); start it, or correct or unset {key}"
    )


def _speaks_grpc(made: socket.socket) -> bool:
    """Tell whether a server answers as gRPC does; one behind TLS is not asked."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return True
    made.settimeout(PROBE_S)
    made.sendall(HTTP2)
    answer = b""
    with contextlib.suppress(TimeoutError):
        while len(answer) < 9 and (more := made.recv(9 - len(answer))):
            answer += more
    return len(answer) == 9 and answer[3] == SETTINGS_FRAME


def _watch(ray: Any) -> None:
    """Have the cluster watched: neither Ray nor its data paths tell of its end in time."""
    if ray.util.client.ray.is_connected():
        return  # by Ray Client, which a user may have started; head and raylet are out of reach
    here = ray.get_runtime_context()
    doors = {"head": tcp_door(here.gcs_address)}
    for node in ray.nodes():
        if node["NodeID"] == here.get_node_id():
            doors["raylet on this node"] = tcp_door(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    watch_cluster(doors)


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[Callable[[], None]]:
    """Put back the handlers that Ray replaces by its own, which exit without giving the lease back.

    Yields:
        What puts them back before the end.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)

    try:
        yield put_back
    finally:
        put_back()


def disconnect(*, keep_logs: bool = True) -> None:
    """Leave the cluster; a local one ends with it, to its last process. Nothing to do where Ray never was.

    Args:
        keep_logs: leave the session folder of a local cluster, with the logs of its processes; Ray itself
            never removes one.
    """
    unwatch_cluster()
    if not is_connected():
        return
    # Data paths that were cut off end through Ray, while they can.
    wait_for_paths(PATHS_EXIT_S)
    node = sys.modules["ray"]._private.worker._global_node
    own = node is not None and node.head
    session = Path(node.get_session_dir_path()) if own else None
    started = _processes_of(node) if own else []
    with _signal_handlers_kept() as put_back:
        if own:
            _before(node, "kill_all_processes", put_back, lambda: _kill_autoscaler(node))
        sys.modules["ray"].shutdown()
    for process in (left := _still_running(started, PROCESSES_EXIT_S)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _still_running(left, PROCESSES_EXIT_S)
    if session is not None and not keep_logs and not os.environ.get(KEEP_SESSION):
        _remove_session(session)


def _processes_of(node: Any) -> list[psutil.Process]:
    """Return the processes of a local cluster, its workers among them; none else that this one started."""
    started = {process.process.pid for kind in node.all_processes.values() for process in kind}
    found = []
    for child in psutil.Process().children():
        if child.pid in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [*child.children(recursive=True), child]
    return found


def _still_running(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until processes have ended, and return those that have not; one that nobody buries has ended."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + timeout_s
    while (left := [process for process in processes if runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _kill_autoscaler(node: Any) -> None:
    """End the process that would start nodes; it hears only once a second that it is to end."""
    for monitor in node.all_processes.get("monitor", ()):
        monitor.process.kill()


def _before(thing: Any, method: str, *first: Callable[[], None]) -> None:
    """Have a method of one object do something else first.

    Ray's core takes all signal handlers away on its way out, and a second or two pass in which Ray ends its
    processes.
    """
    after = getattr(thing, method)

    def both(*words: Any, **more: Any) -> Any:
        for step in first:
            step()
        return after(*words, **more)

    setattr(thing, method, both)


def _remove_session(session: Path) -> None:
    shutil.rmtree(session, ignore_errors=True)
    latest = session.parent / "session_latest"
    if latest.is_symlink() and not latest.exists():
        latest.unlink(missing_ok=True)


@contextlib.contextmanager
def quiet_ray() -> Iterator[None]:
    """Leave out what Ray tells of its own while a job tells how far it is; its warnings still come through.

    Loads Ray Data, which sets up loggers of its own. Levels, filters and what is warned of are as they were
    afterwards.
    """
    import ray.data  # noqa: F401 - before its levels are set

    operators = logging.getLogger("ray.data._internal.execution.operators.map_operator")
    tracing = [
        logging.getLogger(name)
        for name in ("ray.data._internal.execution.streaming_executor_state", "ray.data.exceptions")
    ]
    levels = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    # Starting or joining Ray sets the level of this one.
    before = {name: logging.getLogger(name).level for name in (*levels, "ray")}
    with warnings.catch_warnings():
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        # Encoders reserve a GPU and a CPU on purpose: the process that feeds the GPU needs a core.
        operators.addFilter(_is_news)
        for traced in tracing:
            traced.addFilter(_is_not_ours)
        # They compare a pool with the number of spans; one span may hold many units.
        for text in ("The maximum number of concurrent tasks", "The minimum number of concurrent actors"):
            warnings.filterwarnings("ignore", message=text, module="ray.data")
        try:
            yield
        finally:
            operators.removeFilter(_is_news)
            for traced in tracing:
                traced.removeFilter(_is_not_ours)
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


def _is_news(record: logging.LogRecord) -> bool:
    return "both num_cpus and num_gpus" not in record.getMessage()


def _is_not_ours(record: logging.LogRecord) -> bool:
    """Leave out what is logged while an error of ours is on its way, which the job tells in a line."""
    error = record.exc_info[1] if record.exc_info else sys.exc_info()[1]
    return not isinstance(getattr(error, "cause", error), BgeRayError)


def root_cause(error: Exception) -> str:
    """Return in one line what made a Ray task or actor fail; Ray's own text is its whole traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BgeRayError):
        return " ".join(str(cause).split())
    return str(error).strip().splitlines()[-1]
