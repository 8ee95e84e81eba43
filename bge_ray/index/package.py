"""The one place that imports FAISS, and says what to install when it cannot.

Every module of ``bge_ray.index`` takes ``faiss`` from here.
"""

import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any, TypeAlias

from bge_ray.errors import InstallationError

# FAISS ships type stubs, but they lack fields and functions that are used here.
Index: TypeAlias = Any

# All of them install the same top-level module `faiss`: the second one silently overwrites the first.
DISTRIBUTIONS = (
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cuvs",
    "faiss-gpu-cu11",
    "faiss-gpu-cu12",
    "faiss-gpu-cu11-cuvs",
    "faiss-gpu-cu12-cuvs",
    "faiss-gpu-cu13-cuvs",
)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_distributions(is_installed: Callable[[str], bool] = _is_installed) -> None:
    """Refuse an environment in which two packages own the module ``faiss``.

    No package at all is not refused here: conda and self-built FAISS have other names, so the
    import itself decides.

    Args:
        is_installed: tells whether a distribution of that name is installed.

    Raises:
        InstallationError: several of DISTRIBUTIONS are installed.
    """
    found = [name for name in DISTRIBUTIONS if is_installed(name)]
    if len(found) > 1:
        raise InstallationError(
            f"{' and '.join(found)} are both installed, and one has overwritten files of the other: "
            f"run `pip uninstall -y {' '.join(found)}`, then `pip install 'bge-ray[cpu]'` "
            "or `pip install 'bge-ray[gpu]'`"
        )


check_distributions()
try:
    faiss: Any = importlib.import_module("faiss")
except (ImportError, RuntimeError) as error:  # faiss-gpu raises RuntimeError without its CUDA libraries
    raise InstallationError(
        "FAISS cannot be imported: run `pip install 'bge-ray[cpu]'`, or `pip install 'bge-ray[gpu]'` "
        f"on a machine with CUDA ({error})"
    ) from error
if not hasattr(faiss, "index_factory"):
    # Uninstalling one of two packages leaves an empty `faiss` folder, which imports.
    raise InstallationError(
        "the module faiss is an empty remainder of an uninstalled package: run "
        "`pip install --force-reinstall 'bge-ray[cpu]'` or `'bge-ray[gpu]'`"
    )


def use_threads(count: int) -> None:
    """Let FAISS and its BLAS use so many threads of this process, however many cores the machine has.

    OMP_NUM_THREADS is read once, when the library is loaded, and a worker process outlives its task.
    """
    faiss.omp_set_num_threads(max(1, count))
