"""Merge models: `python jobs/merge.py --config configs/merge.yaml --set merge.output=/models/merged`."""

from bge_ray.command import script

if __name__ == "__main__":
    script("merge")
