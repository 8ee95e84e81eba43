"""The examples run as they stand, on a data set that the jobs made."""

from pathlib import Path

import numpy as np
import pytest

from bge_ray.pipeline.embed.job import embed
from bge_ray.pipeline.index.job import build_index
from bge_ray.settings.sections import parse_settings
from tests.support.corpora import docstrings, parquet_bytes
from tests.support.datasets import vectors_by_id

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_llama_index_opens_the_index_and_finds_what_numpy_finds(
    tmp_path: Path, tiny_model: Path, metric: str
) -> None:
    from sentence_transformers import SentenceTransformer

    from examples.llama_index_search import retrieve

    passages = docstrings(600)
    (tmp_path / "corpus.parquet").write_bytes(parquet_bytes(passages))
    keys = {
        "corpus.uri": tmp_path / "corpus.parquet",
        "corpus.keep_columns": "[text]",
        "output.uri": tmp_path / "out",
        "model.name": tiny_model,
        "resources.num_encoders": 1,
        "index.factory": "Flat",
        "index.metric": metric,
    }
    settings = parse_settings(None, [f"{key}={value}" for key, value in keys.items()])
    embed(settings)
    build_index(settings)

    question = "read a file line by line"
    found = retrieve(tmp_path / "out", question, k=10)

    vectors = vectors_by_id(str(tmp_path / "out"))
    asked = SentenceTransformer(str(tiny_model), device="cpu").encode(question, normalize_embeddings=True)
    scores = np.stack(list(vectors.values())) @ asked
    best = np.argsort(-scores, kind="stable")[:10]
    assert [hit.node.node_id for hit in found] == [list(vectors)[i] for i in best]
    np.testing.assert_allclose([hit.score for hit in found], scores[best], atol=1e-5)
    texts = {passage["id"]: passage["text"] for passage in passages}
    assert [hit.node.text for hit in found] == [texts[hit.node.node_id] for hit in found]
