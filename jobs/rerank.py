"""Rerank candidates: `python jobs/rerank.py --set rerank.candidates=... --set rerank.output=...`."""

from bge_ray.command import script

if __name__ == "__main__":
    script("rerank")
