"""What is done once a node and not once a process: a cache folder, and a lock on each thing in it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from bge_ray.errors import ModelError

VARIABLE = "BGE_RAY_CACHE"


def cache_folder() -> Path:
    """Return the folder of this node's cache, made if need be.

    It is ``BGE_RAY_CACHE``, else ``$XDG_CACHE_HOME/bge-ray``, else ``~/.cache/bge-ray``, else a folder of
    this user in the temporary folder: a container often has no home that can be written.

    Raises:
        ModelError: the folder asked for cannot be written, or none can.
    """
    asked = os.environ.get(VARIABLE)
    if asked:
        folder = Path(asked).expanduser()
        if not _is_ours(folder):
            raise ModelError(
                f"{VARIABLE} {folder}: cannot be written, or is another user's; name another folder"
            )
        return folder
    xdg = os.environ.get("XDG_CACHE_HOME")
    home = Path(xdg) if xdg else Path("~/.cache").expanduser()
    temporary = Path(tempfile.gettempdir()) / f"bge-ray-{os.getuid()}"
    for folder in (home / "bge-ray", temporary):
        if _is_ours(folder):
            return folder
    raise ModelError(f"neither {home} nor {temporary} can be written; set {VARIABLE} to a folder for models")


@contextlib.contextmanager
def locked(name: str) -> Iterator[Path]:
    """Hold the lock of one name on this node and yield the cache folder; freed when its holder dies, too.

    Raises:
        ModelError: there is no folder for it, or its file system has no locks.
    """
    folder = cache_folder()
    lock = filelock.FileLock(folder / "locks" / f"{name}.lock")
    try:
        (folder / "locks").mkdir(exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise ModelError(
            f"{folder}: cannot be locked: {error}; set {VARIABLE} to a folder on a disk of this node"
        ) from error
    try:
        yield folder
    finally:
        lock.release()


def _is_ours(folder: Path) -> bool:
    """Make a folder unless it is there, and tell whether it is this user's and can be written."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False
