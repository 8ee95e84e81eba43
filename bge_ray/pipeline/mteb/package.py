"""The one place that imports mteb, and says what to install when it cannot.

It takes seconds to import, so nothing of this folder is imported before a job of it runs.
"""

import importlib
import os
from typing import Any

from bge_ray.errors import InstallationError

# Bars of mteb's tasks would stand among the lines of the log; this is read when tqdm is imported.
os.environ.setdefault("TQDM_DISABLE", "1")
try:
    mteb: Any = importlib.import_module("mteb")
except ImportError as error:
    raise InstallationError(
        f"mteb cannot be imported: run `pip install 'bge-ray[mteb]'` ({error})"
    ) from error
if not hasattr(mteb, "evaluate"):
    raise InstallationError(
        f"the module mteb at {getattr(mteb, '__file__', None)} is not the package of that name, which it "
        "hides; rename it, or run `bge-ray mteb`"
    )
