"""Measure this machine: `python jobs/bench.py`; one table with what a user would pick instead."""

from bge_ray.command import script

if __name__ == "__main__":
    script("bench")
