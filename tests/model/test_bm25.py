"""Counts of tokens: alone, without weights, and beside what a model makes of the same tokens."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bge_ray.errors import ModelError
from bge_ray.model.canary import check_canaries, make_canaries
from bge_ray.model.feed.texts import load_tokenizer
from bge_ray.model.run.model import Place, open_model
from bge_ray.model.run.terms import TermModel
from bge_ray.model.spec import resolve_encoder, text_feeder
from bge_ray.records.arrays import SparseRows, sparse_rows
from bge_ray.records.model import ModelSpec
from bge_ray.settings.sections import ModelSettings
from tests.support.models import SENTENCES, make_encoder, make_m3

TEXTS = [*SENTENCES, "the fox the dog the the", "🙂", "the dog " * 400]


def resolve(folder: Path, **asked: object) -> ModelSpec:
    return resolve_encoder(ModelSettings(name=str(folder), **asked), on_gpu=False)


def made(
    spec: ModelSpec, folder: Path, texts: list[str], budget: int = 64
) -> tuple[SparseRows, dict[int, tuple[str, str]]]:
    model, feeder = open_model(spec, folder, Place()), text_feeder(spec)
    tokens = feeder.passages(texts)
    result = model.empty_result(len(texts))
    model.run(tokens, model.cut(tokens, budget), result)
    return sparse_rows(result.columns()["bm25"]), result.faults


def counted(folder: Path, texts: list[str], most: int | None = None) -> list[dict[int, int]]:
    """By transformers' own call, special tokens left out."""
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    special = set(tokenizer.all_special_ids)
    options = {} if most is None else {"truncation": True, "max_length": most}
    rows = [tokenizer(text, **options)["input_ids"] for text in texts]
    return [dict(sorted(Counter(t for t in ids if t not in special).items())) for ids in rows]


def as_dicts(rows: SparseRows) -> list[dict[int, int]]:
    spans = zip(rows.offsets[:-1], rows.offsets[1:], strict=True)
    return [
        dict(zip(rows.indices[a:b].tolist(), rows.values[a:b].astype(int).tolist(), strict=True))
        for a, b in spans
    ]


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_alone_it_takes_the_tokenizer_and_no_weights(tmp_path: Path, kind: str) -> None:
    folder = make_encoder(tmp_path / "model", kind=kind)
    spec = resolve(folder, outputs=("bm25",))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert resolve(folder, outputs=("bm25",)) == spec
    assert (spec.family, [o.name for o in spec.outputs], spec.counts_only) == ("bm25", ["bm25"], True)
    assert isinstance(open_model(spec, folder, Place()), TermModel)
    for budget in (64, 1_000_000):  # many batches; all rows in one, by their lengths
        rows, faults = made(spec, folder, TEXTS, budget)
        assert as_dicts(rows) == counted(folder, TEXTS) and not faults
    assert max(max(row, default=0) for row in as_dicts(rows)) < spec.output("bm25").dim
    assert rows.values.dtype == np.float16


def test_another_tokenizer_is_another_data_set_and_other_weights_are_not(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model")
    first = resolve(folder, outputs=("bm25",))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert resolve(folder, outputs=("bm25",)) == first
    other = make_encoder(tmp_path / "other", kind="xlm-roberta")
    shutil.copy(other / "tokenizer.json", folder / "tokenizer.json")
    assert resolve(folder, outputs=("bm25",)).weights_sha256 != first.weights_sha256
    with pytest.raises(ModelError, match="its files differ"):
        open_model(first, folder, Place())


def test_beside_a_vector_it_counts_what_the_model_reads(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", positions=64)
    spec = resolve(folder, outputs=("bm25", "embedding"), passage_instruction="the corpus: ")
    assert [o.name for o in spec.outputs] == ["embedding", "bm25"]
    plain = resolve(folder)
    assert spec.only("embedding") == ModelSpec(
        **{**vars(plain), "passage_instruction": "the corpus: "}
    )  # what is counted beside it changes nothing of the model
    rows, _ = made(spec, folder, TEXTS, budget=100_000)
    n_instruction = len(text_feeder(plain).passages(["the corpus:"]).input_ids) - 2
    assert n_instruction > 2
    assert as_dicts(rows) == counted(folder, TEXTS, most=64 - n_instruction)


def test_beside_the_three_outputs_of_an_m3_all_are_as_they_were(tmp_path: Path) -> None:
    folder = make_m3(tmp_path / "m3")
    texts = SENTENCES[:4]
    three = ("embedding", "sparse", "colbert")
    columns = []
    for outputs in (three, (*three, "bm25")):
        spec = resolve(folder, outputs=outputs)
        model, tokens = open_model(spec, folder, Place()), text_feeder(spec).passages(texts)
        result = model.empty_result(len(texts))
        model.run(tokens, model.cut(tokens, 64), result)
        columns.append(result.columns())
    assert all(columns[0][name].equals(columns[1][name]) for name in three)
    assert as_dicts(sparse_rows(columns[1]["bm25"])) == counted(folder, texts)


def test_canaries_know_it_again(tmp_path: Path) -> None:
    spec = resolve(folder := make_encoder(tmp_path / "model"), outputs=("bm25",))
    model, feeder = open_model(spec, folder, Place()), text_feeder(spec)
    canaries = make_canaries(model, feeder)
    assert {canary.output for canary in canaries} == {"bm25"}
    check_canaries(canaries, model, feeder)


def test_words_before_a_text_are_refused(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model")
    with pytest.raises(ModelError, match=r"model\.query_instruction: words before a text would be counted"):
        resolve(folder, outputs=("bm25",), query_instruction="find: ")
