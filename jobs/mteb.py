"""Measure models on mteb: `python jobs/mteb.py --config configs/mteb.yaml --set mteb.output=/data/mteb`."""

import sys
from pathlib import Path

# Python looks for modules beside a script first, where this one would be taken for the package mteb.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from bge_ray.command import script  # noqa: E402

if __name__ == "__main__":
    script("mteb")
