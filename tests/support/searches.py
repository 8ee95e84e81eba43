"""What the tests of search and rerank share: data sets, query files, and reading runs back."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bge_ray.model.run.model import Model, Place
from bge_ray.model.spec import model_folder, resolve_encoder, text_feeder
from bge_ray.records.model import EMBEDDING
from bge_ray.settings.sections import ModelSettings, Settings, parse_settings
from bge_ray.storage.objects import Storage, join

STORAGE = Storage(20)


def settings_for(**keys: object) -> Settings:
    """Settings from ``section__key`` names; small pools, so that the tests' cluster holds them."""
    defaults = {
        "output__storage_timeout_s": 20,
        "resources__num_encoders": 1,
        "rerank__num_rerankers": 1,
    }
    words = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in (defaults | keys).items()]
    return parse_settings(None, words)


def upload(root: str, objects: dict[str, bytes]) -> None:
    for name, data in objects.items():
        STORAGE.write(join(root, name), data)


def jsonl(records: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def read_run(folder: str) -> list[dict[str, object]]:
    """Return the rows of run.parquet, checking that run.trec says the same."""
    table = pq.read_table(pa.BufferReader(STORAGE.read(join(folder, "run.parquet"))))
    rows = table.to_pylist()
    lines = [f"{r['query_id']} Q0 {r['passage_id']} {r['rank']} {r['score']!r} {r['tag']}\n" for r in rows]
    assert STORAGE.read(join(folder, "run.trec")).decode() == "".join(lines)
    return rows


def by_query(rows: list[dict[str, object]]) -> dict[str, list[tuple[str, float]]]:
    """Return (passage id, score) by query, checking ranks, order and that no pair stands twice."""
    found: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        found.setdefault(row["query_id"], []).append((row["passage_id"], row["score"]))
        assert row["rank"] == len(found[row["query_id"]])
    for pairs in found.values():
        assert len({passage_id for passage_id, _ in pairs}) == len(pairs)
        assert pairs == sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    return found


def read_rejected(folder: str) -> list[tuple[str, str, str]]:
    table = pq.read_table(pa.BufferReader(STORAGE.read(join(folder, "rejected.parquet"))))
    return [(row["query_id"], row["passage_id"], row["reason"]) for row in table.to_pylist()]


def query_vectors(model: Path, texts: list[str], **settings: object) -> np.ndarray:
    """Encode queries in this process."""
    spec = resolve_encoder(ModelSettings(name=str(model), **settings), on_gpu=False)
    tokens = text_feeder(spec).queries(texts)
    loaded = Model(spec, model_folder(spec), Place())
    result = loaded.empty_result(len(texts))
    loaded.run(tokens, loaded.cut(tokens, 1024), result)
    return result.array(EMBEDDING)


def brute_force(queries: np.ndarray, vectors: dict[str, np.ndarray], k: int) -> list[list[tuple[str, float]]]:
    """Return the k best of each query by numpy, ties by passage id."""
    names = np.array(list(vectors))
    matrix = np.stack([vectors[name] for name in names]).astype(np.float64)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    found = []
    for query in queries:
        # One dot product a row: a matrix product may round equal rows differently.
        scores = (matrix * query.astype(np.float64)).sum(axis=1)
        order = np.lexsort((names, -scores.astype(np.float32)))[:k]
        found.append([(str(names[i]), float(scores[i])) for i in order])
    return found


def assert_same_ranking(ours: list[tuple[str, float]], truth: list[tuple[str, float]]) -> None:
    """Equal scores; equal passages but where the last score ties with what lies beyond the end."""
    np.testing.assert_allclose([s for _, s in ours], [s for _, s in truth], atol=2e-6, rtol=0)
    last = truth[-1][1]
    clear = [name for name, score in truth if score > last + 4e-6]
    rounded = sorted(name for name, score in ours if score > last + 4e-6)
    assert rounded == sorted(clear)
