"""Folders as version 5 of sentence-transformers laid them out make the vectors that it made of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bge_ray.model.spec import text_feeder
from tests.model.conftest import load, resolve, run, vectors

GOLDENS = Path(__file__).parents[1] / "goldens" / "sentence_transformers_5"
GOLDEN = json.loads((GOLDENS / "vectors.json").read_text())


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("layers", ("mean", 6, 48, True)),
        ("side-by-side", ("cls+weighted_mean", 16, 20, False)),
        ("without-prompt", ("mean", 8, 32, True)),
    ],
)
def test_equal_version_5(tmp_path: Path, name: str, facts: tuple[str, int, int, bool]) -> None:
    assert GOLDEN["made_by"]["sentence-transformers"].startswith("5.")
    folder = Path(shutil.copytree(GOLDENS / name, tmp_path / name))
    spec = resolve(folder)
    assert (spec.pooling, spec.dim, spec.max_length, spec.normalize) == facts
    feeder = text_feeder(spec)
    for packed in (False, True):
        model = load(spec, packed=packed)
        for side, make in (("query", feeder.queries), ("document", feeder.passages)):
            made = run(model, make(GOLDEN["texts"]), 40)
            np.testing.assert_allclose(vectors(made), GOLDEN["vectors"][name][side], atol=1e-5, rtol=0)
