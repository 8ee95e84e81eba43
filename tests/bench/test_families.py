"""The table of the families: both contestants of each read the same tokens, and its figures are theirs."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from bge_ray.bench import families
from bge_ray.bench.families import SHAPES, Measured, Shape, load_library, make_model, measure, to_markdown
from bge_ray.formats.docstrings import find_docstrings
from bge_ray.model.spec import pair_feeder, resolve_reranker
from bge_ray.settings.sections import RerankSettings
from tests.model.conftest import encode, vectors
from tests.support.slow import slow_but

pytestmark = pytest.mark.parity

TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
DECODER = TINY | {"num_key_value_heads": 2, "head_dim": 8}


def tiny(name: str) -> Shape:
    """The shape of a name with small layers, of the same kind, in float32."""
    shape = SHAPES[name]
    sizes = DECODER if "num_key_value_heads" in shape.sizes else TINY
    return dataclasses.replace(shape, sizes=sizes, dtype="float32")


@pytest.mark.parametrize(
    "name", slow_but(["bert-small"], [name for name, shape in SHAPES.items() if shape.role == "encoder"])
)
def test_both_make_the_same_vectors(tmp_path: Path, name: str) -> None:
    folder = make_model(tiny(name), tmp_path / "m")
    texts = [text for *_, text in itertools.islice(find_docstrings(), 12)]
    theirs = load_library(tiny(name), folder).encode(texts, show_progress_bar=False)
    np.testing.assert_allclose(vectors(encode(folder, texts)), theirs, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-small", "cross-encoder", "llm-reranker"])
def test_one_turn_of_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(families, "GFLOP", 0.01)
    monkeypatch.setattr(families, "MIN_ROWS", 5)
    found = measure(tiny(name), tmp_path / "m")
    rows = [(title, text) for _, title, text in itertools.islice(find_docstrings(), found.rows)]
    assert found.packed and found.rows >= 5
    assert min(found.ours + found.theirs) > 0
    if SHAPES[name].role == "encoder":
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
        texts = [text for _, text in rows]
        assert found.tokens == sum(map(len, tokenizer(texts, truncation=True)["input_ids"]))
        return
    asked = RerankSettings(model=str(tmp_path / "m"), prompt="?" if name == "llm-reranker" else None)
    pairs = pair_feeder(resolve_reranker(asked, on_gpu=False)).pairs(*map(list, zip(*rows, strict=True)))
    assert found.tokens >= pairs.lengths.sum()


def test_the_table_is_of_medians() -> None:
    measured = Measured("x", "bfloat16", True, 7, 1000, [1.0, 2.0, 5.0], [3.0, 4.0, 5.0])
    line = to_markdown({"mistral": dataclasses.asdict(measured)}).splitlines()[2]
    assert (
        "bge-en-icl (mistral) | 1 of 32 | bfloat16 | packed | 7 | 1,000 | 500 | x 250 | 2.00 | 1.00 to 3.00"
        in line
    )
