"""20,000 real passages: no copy of a positive is left, by brute force; a second run writes the same."""

import hashlib
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.mine.job import mine
from bge_ray.storage.objects import join
from tests.support.corpora import docstrings, mixed_objects
from tests.support.datasets import vectors_by_id
from tests.support.searches import STORAGE, jsonl, settings_for, upload

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("ray_cluster"),
]

PASSAGES, QUERIES = 20_000, 200
COSINE, OVERLAP = 0.9995, 0.7


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def is_copy(one: str, two: str) -> bool:
    a, b = words(one), words(two)
    return one == two or len(a & b) >= OVERLAP * len(a | b)


def test_no_copy_of_a_positive_among_the_negatives_of_20_000_passages(bucket: str, tiny_model: Path) -> None:
    found = docstrings(PASSAGES)
    texts = {passage["id"]: f"{passage['title']} {passage['text']}".strip() for passage in found}
    upload(f"{bucket}/corpus", mixed_objects(found, pieces=10))
    asked = found[:: len(found) // QUERIES]
    upload(
        bucket,
        {
            "queries.jsonl": jsonl([{"_id": f"q{i}", "text": texts[p["id"]]} for i, p in enumerate(asked)]),
            "qrels.txt": "".join(f"q{i} 0 {p['id']} 1\n" for i, p in enumerate(asked)).encode(),
        },
    )
    keys = {
        "corpus__uri": f"{bucket}/corpus",
        "output__uri": f"{bucket}/data",
        "model__name": str(tiny_model),
    }
    embed(settings_for(**keys, model__max_length=64, resources__num_encoders=2))
    rules = {
        "output__uri": f"{bucket}/data",
        "mine__queries": f"{bucket}/queries.jsonl",
        "mine__qrels": f"{bucket}/qrels.txt",
        "mine__depth": 100,
        "mine__sampling": "random",
        "mine__copy_cosine": COSINE,
        "mine__copy_overlap": OVERLAP,
        "mine__relative_margin": 0.0005,
        "search__unit_queries": 50,
    }
    digests = []
    for name in ("a", "b"):
        report = mine(settings_for(**rules, mine__output=f"{bucket}/{name}"))
        files = [STORAGE.read(join(f"{bucket}/{name}", file.path)) for file in report.files]
        digests.append([hashlib.sha256(data).hexdigest() for data in files])
    assert digests[0] == digests[1]

    vectors = vectors_by_id(f"{bucket}/data")
    records = [json.loads(line) for line in STORAGE.read(f"{bucket}/a/negatives.jsonl").splitlines()]
    assert len(records) > QUERIES // 2
    for record in records:
        (positive,) = record["pos_id"]
        for name, score in zip(record["neg_id"], record["neg_scores"], strict=True):
            assert not is_copy(texts[name], texts[positive])
            assert float(vectors[name].astype(np.float64) @ vectors[positive]) < COSINE
            assert score <= record["pos_scores"][0] * (1 - 0.0005) + 1e-9
    # There were some to be found.
    audit = pq.read_table(pa.BufferReader(STORAGE.read(f"{bucket}/a/audit.parquet"))).to_pylist()
    own = {f"q{i}": passage["id"] for i, passage in enumerate(asked)}
    results = [row for row in audit if row["reason"] != "positive"]
    copies = [row for row in results if is_copy(texts[row["passage_id"]], texts[own[row["query_id"]]])]
    assert len(copies) > 20
    assert not any(row["kept"] for row in copies)
