"""Ray's workers with their imports behind them, by fork, where tests start them by hundreds.

A worker that holds a model imports torch and transformers, seven seconds of a core before it does anything,
and a job starts several. One server imports them once. In place of the interpreter, Ray is given a launcher:
at its word the server forks, and what runs is Ray's own ``default_worker.py`` in a process of its own, to be
killed like any other. Whatever is no worker of Ray's, or reads another environment at its imports, goes to
the real interpreter.

Ray's own modules read Ray's variables when they are imported, of which some name raylet and job: the server
forks a server for each job of a raylet, which imports them, and sends the workers of that job to it.
"""

import array
import atexit
import contextlib
import functools
import gc
import importlib
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
PACKAGES = ("settings", "storage", "formats", "dataset", "model", "index")
RAY_LIBRARIES = ("ray.data", "ray.actor", "ray._private.node", "ray._private.external_storage")
RAY_PACKAGES = tuple(f"pipeline.{name}" for name in ("engine", "runs", "embed", "index", "search", "rerank"))
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
LOOK_EVERY_S = 2.0
COLD = "BGE_RAY_TESTS_COLD"  # Set: every worker is started as Ray starts it.
PREFIX = "bge-ray-warm-"
# The core of the standard library only, so that it costs nothing. It lives as long as the worker does, and
# either ends with the other.
LAUNCHER = """#!{python} -ISE
import os, sys
if len(sys.argv) < 2 or not sys.argv[1].endswith("ray/_private/workers/default_worker.py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
import array, json, socket, time
address = {address!r}
wish = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}
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
    path.write_text(LAUNCHER.format(python=sys.executable, address=address))
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
    """Import what has no Ray in it, then fork a server for each job of a raylet; returns in workers alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    mine = _read_at_import(dict(os.environ))  # Some of the imports set more.
    listener = _open(address, LIBRARIES, PACKAGES)
    assert "ray" not in sys.modules
    servers: dict[tuple[tuple[str, str], ...], str] = {}
    while True:
        line, wish, places = _next(listener)
        answer = "c"
        if _read_at_import(wish["environment"]) == mine:
            job = _variables_of_ray(wish["environment"])
            is_new = job not in servers
            answer = servers.setdefault(job, f"{address}.{len(servers)}")
            if is_new and os.fork() == 0:
                listener.close()
                _close(line, places)
                _serve_job(answer, dict(job))
                return
        with contextlib.suppress(BrokenPipeError):  # Killed while it waited.
            line.sendall(answer.encode())
        _close(line, places)


def _serve_job(address: str, variables: dict[str, str]) -> None:
    """Import Ray as its variables say, then fork a worker at each word; returns in the worker alone."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ.update(variables)
    listener = _open(address, RAY_LIBRARIES, RAY_PACKAGES)
    threading.Thread(target=_end_with_raylet, args=(int(variables[RAYLET]),), daemon=True).start()
    while True:
        line, wish, places = _next(listener)
        if os.fork() == 0:
            listener.close()
            _become(wish, places)
            Path(address).with_name(str(wish["pid"])).write_text(str(os.getpid()))
            line.sendall(b"w")
            threading.Thread(target=_end_with, args=(line,), daemon=True).start()
            return
        _close(line, places)


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
        path = importlib.import_module(f"bge_ray.{package}").__path__
        for found in pkgutil.walk_packages(path, f"bge_ray.{package}."):
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
    return {**read, "PYTHONPATH": read.get("PYTHONPATH", "").removeprefix(f"{SITE}:") or str(REPOSITORY)}


def _variables_of_ray(environment: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in environment.items() if name.startswith("RAY_")))


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
