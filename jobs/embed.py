"""Embed a corpus: `python jobs/embed.py --config configs/embed.yaml --set output.uri=s3://bucket/out`."""

from bge_ray.command import script

if __name__ == "__main__":
    script("embed")
