"""The same model passes its own canaries, in other precisions too; another tokenizer or model does not."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from bge_ray.errors import DatasetMismatchError
from bge_ray.model.canary import CANARY_TEXTS, check_canaries, make_canaries
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.model.spec import text_feeder
from tests.model.conftest import MakeModel, load, resolve


def test_the_same_model_in_every_precision(encoder_folder: MakeModel) -> None:
    folder = encoder_folder("bert", "cls")
    specs = [resolve(folder, dtype=dtype) for dtype in ("float32", "float16")]
    for made in specs:
        stored = make_canaries(load(made), text_feeder(made))
        assert [c.text for c in stored] == list(CANARY_TEXTS)
        assert {(c.output, c.dtype, len(c.vector)) for c in stored} == {("embedding", made.dtype, 32)}
        for spec in specs:
            check_canaries(stored, load(spec), text_feeder(spec))


def test_other_vectors_of_the_same_weights_are_refused(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = encoder_folder("bert", "cls")
    spec = resolve(folder)
    model = load(spec)
    stored = make_canaries(model, text_feeder(spec))
    other = Path(shutil.copytree(folder, tmp_path / "m"))
    content = json.loads((other / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DatasetMismatchError) as caught:
        check_canaries(stored, model, TextFeeder(other, spec.max_length))
    for part in (
        "other vectors",
        "The quick brown fox",
        "cosine 0.",
        "0.99999",
        "transformers or tokenizers",
    ):
        assert part in str(caught.value)
    # A text that is cut finds another length, which no short text does.
    with pytest.raises(DatasetMismatchError, match="Rain fell on the harbour"):
        check_canaries(stored, model, TextFeeder(folder, 100))
    longer = [dataclasses.replace(c, vector=(*c.vector, 0.0)) for c in stored]
    with pytest.raises(DatasetMismatchError, match="cosine nan"):
        check_canaries(longer, model, text_feeder(spec))
