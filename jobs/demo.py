"""The whole chain on a small real corpus, offline: `python jobs/demo.py`, or `make demo`."""

from bge_ray.command import script

if __name__ == "__main__":
    script("demo")
