"""Mine hard negatives: `python jobs/mine.py --config configs/mine.yaml --set mine.depth=100`."""

from bge_ray.command import script

if __name__ == "__main__":
    script("mine")
