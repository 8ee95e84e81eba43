"""Train a model: `python jobs/train.py --config configs/train.yaml --set train.output=/models/tuned`."""

from bge_ray.command import script

if __name__ == "__main__":
    script("train")
