"""Ray's workers with their imports behind them, by fork, where tests start them by hundreds.

A worker that holds a model imports torch and transformers, seven seconds of a core before it does anything,
and a job starts several. One server imports them once. In place of the interpreter, Ray is given a launcher:
at its word the server forks, and what runs is Ray's own ``default_worker.py`` in a process of its own, to be
killed like any other. Whatever is no worker of Ray's, or reads another environment at its imports, goes to
the real interpreter.

Ray's own modules read Ray's variables when they are imported, of which some name raylet and job: the server
forks a server for each job of a raylet, which imports them, and sends the workers of that job to it; it ends
when none has come for a while, because a raylet may see hundreds of jobs. Another one is for Ray's services,
of which each node starts two and each head three, and which import for a second or two of a core each; it
serves every Ray that is started with the same variables.
"""

import array
import atexit
import contextlib
import functools
import gc
import importlib
import itertools
import json
import os
import pkgutil
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
SITE = Path(__file__).with_name("warm_site")
LIBRARIES = (
    *("numpy", "pandas", "pyarrow.dataset", "pyarrow.parquet", "faiss", "s3fs", "aiobotocore.session"),
    *("transformers", "transformers.models.bert.modeling_bert"),
    "transformers.models.xlm_roberta.modeling_xlm_roberta",
)
PACKAGES = tuple(
    f"bge_ray.{name}" for name in ("settings", "storage", "formats", "dataset", "model", "index")
)
RAY_LIBRARIES = ("ray.data", "ray.actor", "ray._private.node", "ray._private.external_storage")
SERVICES = {
    "ray/dashboard/agent.py": "ray.dashboard.agent",
    "ray/dashboard/dashboard.py": "ray.dashboard.dashboard",
    "ray/_private/runtime_env/agent/main.py": "ray._private.runtime_env.agent.main",
    "ray/_private/log_monitor.py": "ray._private.log_monitor",
    "ray/autoscaler/_private/monitor.py": "ray.autoscaler._private.monitor",
}
# What all modules of a dashboard are looked for in.
SERVICE_PACKAGE = "ray.dashboard.modules"
RAY_PACKAGES = tuple(
    f"bge_ray.pipeline.{name}" for name in ("engine", "runs", "embed", "index", "search", "rerank")
)
# A worker for which these differ starts cold: they are read when a module is imported.
READ_AT_IMPORT = (
    "PYTHON",
    "LD_",
    "HF_",
    "TRANSFORMERS_",
    "TORCH",
    "PYTORCH_",
    "ARROW_",
    "OPENBLAS_",
    "FSSPEC_",
)
RAYLET = "RAY_RAYLET_PID"
# What tells Rays apart and is read by services as they need it, but not at their imports.
OF_ONE_RAY = (RAYLET, "RAY_AUTH_TOKEN", "RAY_TMPDIR")
# Ray gives its services an allocator that they run as well without.
ALLOCATOR = "LD_PRELOAD"
LOOK_EVERY_S = 2.0
# The server of a job holds a hundred megabytes of its own; another is made where one is missed.
IDLE_S = 60.0
IDS_OF_A_PROCESS = 10_000
WORKER = "ray/_private/workers/default_worker.py"
COLD = "BGE_RAY_TESTS_COLD"  # Set: every worker is started as Ray starts it.
PREFIX = "bge-ray-warm-"
# The core of the standard library only, so that it costs nothing. It lives as long as the worker does, and
# either ends with the other.
LAUNCHER = """#!{python} -ISE
import os, sys
arguments = sys.argv[2:] if sys.argv[1:2] == ["-u"] else sys.argv[1:]
if not arguments or not arguments[0].endswith({scripts!r}):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
import array, json, socket, time
address = {address!r}
wish = {{"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}}
wish = json.dumps(wish | {{"pid": os.getpid()}}).encode()
outputs = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
while address:
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(address)
    except FileNotFoundError:  # The server is at its imports.
        time.sleep(0.05)
        continue
    except ConnectionRefusedError:  # It failed there, or ended; the worker will say why.
        os.execv({python!r}, [{python!r}, *sys.argv[1:]])
    line.sendmsg([len(wish).to_bytes(4, "big")], [outputs])
    line.sendall(wish)
    answer = line.recv(200)
    if answer == b"c":
        os.execv({python!r}, [{python!r}, *sys.argv[1:]])
    address = answer.decode() if answer.startswith(b"/") else ""
line.recv(1)
"""


@functools.cache
def launcher() -> str:
    """Return the path to give to Ray as the interpreter; its server ends with this process."""
    folder = tempfile.mkdtemp(prefix=PREFIX)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path, address = Path(folder, "python"), f"{folder}/server"
    path.write_text(LAUNCHER.format(python=sys.executable, address=address, scripts=(WORKER, *SERVICES)))
    path.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.warm", address],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,  # Its end is ours.
    )
    atexit.register(server.kill)
    return str(path)


@contextlib.contextmanager
def warm_workers() -> Iterator[None]:
    """Give warm workers to the Ray that this process starts meanwhile."""
    real, sys.executable = sys.executable, sys.executable if COLD in os.environ else launcher()
    try:
        yield
    finally:
        sys.executable = real


def warm_environment() -> dict[str, str]:
    """Return what lets a Python process start a Ray with warm workers."""
    if COLD in os.environ:
        return {"PYTHONPATH": str(REPOSITORY)}
    return {"BGE_RAY_TESTS_PYTHON": launcher(), "PYTHONPATH": f"{SITE}:{REPOSITORY}"}


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Return all that a process started and that lives, a worker in place of its launcher."""
    children = process.children(recursive=True)
    return [_worker_of(child) or child for child in children if command(child)]


def command(process: psutil.Process) -> list[str]:
    """Return a process's command line; none if it ended meanwhile, whether its parent has noticed or not."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # ZombieProcess is one of them.
        return []


def _worker_of(process: psutil.Process) -> psutil.Process | None:
    words = command(process)
    if len(words) > 2 and words[2].endswith("/python") and PREFIX in words[2]:
        with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
            return psutil.Process(int(Path(words[2]).with_name(str(process.pid)).read_text()))
    return None


def serve(address: str) -> None:
    """Import what has no Ray in it, then fork servers of what has; returns in workers and services alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    mine = _read_at_import(dict(os.environ))  # Some of the imports set more.
    listener = _open(address, LIBRARIES, PACKAGES)
    assert "ray" not in sys.modules
    servers: dict[tuple[tuple[str, str], ...], tuple[str, int]] = {}
    addresses = (f"{address}.{number}" for number in itertools.count())
    while True:
        line, wish, places = _next(listener)
        answer = "c"
        kind = _kind(wish)
        if _read_at_import(wish["environment"]) == mine:
            answer, pid = servers.get(kind, ("", 0))
            if not pid or not psutil.pid_exists(pid):
                answer = next(addresses)
                pid = os.fork()
                if pid == 0:
                    listener.close()
                    _close(line, places)
                    _serve_kind(answer, dict(kind))
                    return
                servers[kind] = answer, pid
        with contextlib.suppress(BrokenPipeError):  # Killed while it waited.
            line.sendall(answer.encode())
        _close(line, places)


def _kind(wish: dict) -> tuple[tuple[str, str], ...]:
    """Return the variables that Ray's modules read in what is wished for, and with it whose server it needs.

    A job of a raylet has one, all services of Rays with the same variables have another. What does not
    matter to a service leaves its environment.
    """
    environment = wish["environment"]
    ray = {name: value for name, value in environment.items() if name.startswith("RAY_")}
    if not wish["arguments"][0].endswith(WORKER):
        environment.pop(ALLOCATOR, None)
        ray = {name: value for name, value in ray.items() if name not in OF_ONE_RAY}
    return tuple(sorted(ray.items()))


def _serve_kind(address: str, variables: dict[str, str]) -> None:
    """Import Ray as its variables say, then fork a process at each word; returns in that process alone."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ.update(variables)
    if RAYLET in variables:
        listener = _open(address, RAY_LIBRARIES, RAY_PACKAGES)
        threading.Thread(target=_end_with_raylet, args=(int(variables[RAYLET]),), daemon=True).start()
        listener.settimeout(IDLE_S)
    else:
        listener = _open(address, SERVICES.values(), (SERVICE_PACKAGE,))
    server = os.getpid()
    while True:
        try:
            line, wish, places = _next(listener)
        except TimeoutError:
            # The socket stays: a launcher that has just been sent here is refused, and starts cold.
            os._exit(0)
        _draw_ids()
        if os.fork() == 0:
            listener.close()
            _become(wish, places)
            Path(address).with_name(str(wish["pid"])).write_text(str(os.getpid()))
            line.sendall(b"w")
            threading.Thread(target=_end_with, args=(line,), daemon=True).start()
            if RAYLET not in variables and RAYLET in os.environ:
                # A service ends with its raylet, which it takes to be its parent.
                raylet = int(os.environ[RAYLET])
                threading.Thread(target=_end_with_raylet, args=(raylet,), daemon=True).start()
                os.environ[RAYLET] = str(server)
            return
        _close(line, places)


def _draw_ids() -> None:
    """Take more random ids from Ray than a process ever does, so that no two that are forked take the same.

    Ray's generator goes on in each of them where it stood here. A worker whose first object has the id of
    another's ends at once, and Ray waits a minute before it starts the next.
    """
    from ray import ObjectID

    for _ in range(IDS_OF_A_PROCESS):
        ObjectID.from_random()


def _open(address: str, libraries: Iterable[str], packages: Iterable[str]) -> socket.socket:
    """Import, then listen; whoever comes earlier waits for the name of the socket."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        _import_all(libraries, packages)
        gc.collect()
        gc.freeze()
        listener.listen(64)
    finally:
        # Where nobody listens behind the name, launchers are refused and start cold.
        Path(f"{address}.new").rename(address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    return listener


def _import_all(libraries: Iterable[str], packages: Iterable[str]) -> None:
    for name in libraries:
        importlib.import_module(name)
    for package in packages:
        path = importlib.import_module(package).__path__
        for found in pkgutil.walk_packages(path, f"{package}."):
            importlib.import_module(found.name)


def _end_with_stdin() -> None:
    os.read(0, 1)  # Not sys.stdin, whose lock a worker would inherit.
    os._exit(0)


def _end_with_raylet(pid: int) -> None:
    while psutil.pid_exists(pid):
        time.sleep(LOOK_EVERY_S)
    os._exit(0)


def _end_with(line: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):  # It was killed before it heard that there is a worker.
        line.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _read_at_import(environment: dict[str, str]) -> dict[str, str]:
    read = {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}
    read.pop("PYTHONBREAKPOINT", None)  # Ray sets it where it starts.
    return {**read, "PYTHONPATH": read.get("PYTHONPATH", "").removeprefix(f"{SITE}:") or str(REPOSITORY)}


def _next(listener: socket.socket) -> tuple[socket.socket, dict, list[int]]:
    """Return the next whole wish, on what line it came, and its outputs."""
    while True:
        line, _ = listener.accept()
        wish, places = _receive(line)
        if wish is not None:
            return line, wish, places
        _close(line, places)


def _close(line: socket.socket, places: list[int]) -> None:
    line.close()
    for place in places:
        os.close(place)


def _receive(line: socket.socket) -> tuple[dict | None, list[int]]:
    """Return what a launcher wishes and its outputs; no wish if it was killed while it spoke."""
    places = array.array("i")
    data, ancillary, _, _ = line.recvmsg(4, socket.CMSG_SPACE(3 * places.itemsize))
    for _, _, received in ancillary:
        places.frombytes(received)
    length, read = int.from_bytes(data, "big"), b""
    while data and len(read) < length and (part := line.recv(length - len(read))):
        read += part
    return json.loads(read) if data and len(read) == length else None, list(places)


def _become(wish: dict, places: list[int]) -> None:
    """Take the environment, folder, output and arguments of the process that was asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, place in enumerate(places):
        os.dup2(place, number)
        os.close(place)
    os.environ.clear()
    os.environ.update(wish["environment"])
    os.chdir(wish["folder"])
    sys.argv[:] = wish["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).parent)


if __name__ == "__main__":
    serve(sys.argv[1])
    runpy.run_path(sys.argv[0], run_name="__main__")
