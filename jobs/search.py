"""Answer queries: `python jobs/search.py --config configs/search.yaml --set search.queries=queries.jsonl`."""

from bge_ray.command import script

if __name__ == "__main__":
    script("search")
