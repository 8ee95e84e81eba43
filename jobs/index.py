"""Build the FAISS index of a data set: `python jobs/index.py --set output.uri=s3://bucket/embeddings`."""

from bge_ray.command import script

if __name__ == "__main__":
    script("index")
