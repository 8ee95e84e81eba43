"""A model is exported with its pooling: other runtimes make of a batch what sentence-transformers makes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from bge_ray.bench.contestants import write_corpus
from bge_ray.bench.runtimes import (
    EXPORTS,
    LOADERS,
    PooledModel,
    Runtime,
    encode_padded,
    onnx_runtime,
    openvino,
)
from bge_ray.bench.task import NotHereError, Task
from bge_ray.model.run.batching import token_budget_batches
from bge_ray.model.run.load import load_config
from bge_ray.model.spec import resolve_encoder, text_feeder
from bge_ray.settings.sections import ModelSettings
from tests.support.corpora import docstrings
from tests.support.models import make_encoder

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vectors_equal_sentence_transformers(tmp_path: Path, runtime: Runtime, pooling: str) -> None:
    folder = make_encoder(tmp_path / "model", pooling=pooling)
    spec = resolve_encoder(ModelSettings(name=str(folder), max_length=64), on_gpu=False)
    texts = [passage["text"][: 10 + 8 * n] for n, passage in enumerate(docstrings(40))]
    EXPORTS[runtime](PooledModel(spec), tmp_path / "model.xml")
    tokens = text_feeder(spec).passages(texts)
    batches = token_budget_batches(tokens.lengths, 256)
    assert len({len(rows) for rows in batches}) > 2  # of many shapes, none of them the traced one
    forward = LOADERS[runtime](tmp_path / "model.xml", "float32")
    found = encode_padded(forward, load_config(folder), tokens, batches)
    theirs = SentenceTransformer(str(folder), device="cpu")
    theirs.max_seq_length = 64
    np.testing.assert_allclose(found, theirs.encode(texts, normalize_embeddings=True), atol=1e-5)


def test_both_are_timed_over_all_rows_and_say_what_they_lack(tmp_path: Path) -> None:
    texts = [passage["text"] for passage in docstrings(30)]
    write_corpus(tmp_path / "corpus", texts, texts, 2)
    task = Task(
        corpus=str(tmp_path / "corpus"),
        model=str(make_encoder(tmp_path / "model")),
        reranker="",
        dtype="float32",
        max_length=64,
        num_encoders=2,
        token_budget="auto",
        unit_rows=8,
        device="cpu",
    )
    for contestant in (onnx_runtime, openvino):
        result = contestant(task)
        assert (result.rows, result.seconds > 0) == (30, True)
        with pytest.raises(NotHereError, match="on a CPU alone"):
            contestant(dataclasses.replace(task, device="cuda"))
        with pytest.raises(NotHereError, match="no float16 on a CPU"):
            contestant(dataclasses.replace(task, dtype="float16"))
