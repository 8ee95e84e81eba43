"""Measure runs: `python jobs/evaluate.py --set evaluate.run=[a/run.trec,b] --set evaluate.qrels=test.tsv`."""

from bge_ray.command import script

if __name__ == "__main__":
    script("evaluate")
