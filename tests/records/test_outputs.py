"""Outputs as Arrow columns and as JSON."""

import pyarrow as pa
import pytest

from bge_ray.records.canonical import from_json, to_json
from bge_ray.records.model import Canary, ModelSpec
from bge_ray.records.outputs import Output

HALF = pa.field("element", pa.float16(), nullable=False)
KINDS = {
    "dense": pa.list_(HALF, 3),
    "scalar": pa.float16(),
    "multi": pa.list_(pa.field("element", pa.binary(6), nullable=False)),
    "sparse": pa.struct(
        [
            pa.field("indices", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
            pa.field("values", pa.list_(HALF), nullable=False),
        ]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fields(kind: str) -> None:
    field = Output("x", kind, 3, "float16").field()
    assert (field.name, field.type, field.nullable) == ("x", KINDS[kind], False)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ValueError, match="output x: dtype bfloat16 is none of float16, float32"):
        Output("x", "dense", 3, "bfloat16")
    with pytest.raises(ValueError, match="output x: dim 0"):
        Output("x", "dense", 0, "float16")


def test_a_spec_survives_json_and_finds_its_outputs() -> None:
    outputs = (Output("embedding", "dense", 4, "float16"), Output("score", "scalar", 1, "float32"))
    spec = ModelSpec("m", None, "w", "dense", outputs, "cls", 16, True, "float16", "q: ", "")
    assert from_json(ModelSpec, to_json(spec)) == spec
    assert spec.dim == 4
    assert [o.dtype for o in spec.stored_as("float32").outputs] == ["float32", "float32"]
    with pytest.raises(KeyError, match=r"m has no output sparse, only \['embedding', 'score'\]"):
        spec.output("sparse")
    canary = Canary("text", "embedding", "float16", (0.1, -2.5))
    assert from_json(Canary, to_json(canary)) == canary
