"""What the card and the documentation say of reading the columns, done as they say."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from bge_ray.dataset.card import make_card
from bge_ray.records.canonical import to_json
from bge_ray.records.columns import Columns
from bge_ray.records.dataset import DatasetSpec, Manifest
from bge_ray.records.model import ModelSpec
from bge_ray.records.outputs import Output

OUTPUTS = (
    Output("embedding", "dense", 4, "float16"),
    Output("sparse", "sparse", 99, "float16", "s"),
    Output("colbert", "multi", 3, "float16", "c"),
)
MODEL = ModelSpec("BAAI/bge-m3", None, "w", "m3", OUTPUTS, "cls", 8192, True, "float16", "", "")
SPEC = DatasetSpec(MODEL, Columns("id", "text", None))
MANIFEST = Manifest("f", 4, 3, 1, 3, 30, 0, ())
WEIGHTS = [{5: 0.5, 98: 1.5}, {}, {0: 0.25}]
VECTORS = [np.arange(3 * n, dtype=np.float16).reshape(n, 3) + n for n in (2, 1, 3)]
DOCS = Path(__file__).parents[2] / "docs" / "dataset.md"


def table() -> pa.Table:
    dense, sparse, colbert = (output.type() for output in OUTPUTS)
    return pa.table(
        {
            "passage_id": ["a", "b", "c"],
            "embedding": pa.array([[float(i)] * 4 for i in range(3)], dense),
            "sparse": pa.array([{"indices": list(w), "values": list(w.values())} for w in WEIGHTS], sparse),
            "colbert": pa.array([[v.tobytes() for v in row] for row in VECTORS], colbert),
        }
    )


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def check(named: dict[str, Any], matrix: str) -> None:
    assert named[matrix].shape == (3, 99)
    assert [
        dict(zip(row.indices.tolist(), row.data.tolist(), strict=True)) for row in named[matrix]
    ] == WEIGHTS
    starts = named["starts"].tolist()
    assert starts == [0, 2, 3, 6]
    np.testing.assert_array_equal(named["vectors"], np.concatenate(VECTORS))


def test_the_card_reads_what_is_stored() -> None:
    _, front, text = make_card("s3://b/out", SPEC, MANIFEST).decode().split("---\n", 2)
    assert yaml.safe_load(front)["configs"][0]["data_files"] == [
        {"split": "train", "path": "embeddings/*.parquet"}
    ]
    assert "3 of 4 passages, in 3 rows; 1 were rejected" in text
    assert "| `embedding` | one vector of 4 numbers, float16 |" in text
    assert "one vector a token: the 6 bytes of 3 numbers each, float16" in text
    named: dict[str, Any] = {}
    for block in blocks(text)[1:]:
        name = re.search(r'table\["(\w+)"\]', block)
        assert name is not None
        exec(block, named | {"column": table()[name[1]].combine_chunks()}, named)
    check(named, "matrix")


def test_a_card_of_dense_vectors_has_nothing_to_explain() -> None:
    spec = DatasetSpec(MODEL.only("embedding"), SPEC.columns)
    assert len(blocks(make_card("s3://b/out", spec, MANIFEST).decode())) == 1


def test_the_documentation_reads_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "out"
    (root / "embeddings").mkdir(parents=True)
    for number in range(2):
        pq.write_table(table().slice(2 * number, 2), root / "embeddings" / f"{number}.parquet")
    shards = [{"embeddings": {"path": f"embeddings/{number}.parquet"}} for number in range(2)]
    (root / "manifest.json").write_text(json.dumps({"shards": shards}))
    (root / "dataset.json").write_bytes(to_json(SPEC))
    monkeypatch.chdir(tmp_path)
    named: dict[str, Any] = {}
    for block in blocks(DOCS.read_text()):
        if any(word in block for word in ("manifest.json", "pyarrow.dataset", "csr_matrix")):
            exec(block, named)
    check(named, "weights")
