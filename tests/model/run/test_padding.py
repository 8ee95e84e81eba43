"""Models that see what a row is padded with, and tokens that a model does not know."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import BertModel, LlamaConfig

from bge_ray.model.run.batching import token_budget_batches
from bge_ray.model.run.packed import is_placed_by_batch
from bge_ray.model.run.padding import SEES_PADDING
from bge_ray.model.spec import text_feeder
from tests.model.conftest import encode, load, resolve, vectors
from tests.model.run.test_decoders import alone
from tests.support.models import make_decoder, make_encoder


def test_rows_of_one_length_alone_go_together() -> None:
    lengths = np.array([3, 5, 3, 3, 5, 1, 3])
    for budget, expected in ((1000, [[1, 4], [0, 2, 3, 6], [5]]), (6, [[1], [4], [0, 2], [3, 6], [5]])):
        batches = token_budget_batches(lengths, budget, equal=True)
        assert [rows.tolist() for rows in batches] == expected


def test_a_model_that_looks_at_no_mask_is_found_out(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_encoder(tmp_path / "bert", positions=128)
    assert "bert" not in SEES_PADDING
    texts = texts[:12]
    expected = vectors(encode(folder, texts, packed=False, budget=1))
    whole = BertModel.forward

    def without_mask(
        self: BertModel, *words: object, attention_mask: object = None, **more: object
    ) -> object:
        return whole(self, *words, **more)

    monkeypatch.setattr(BertModel, "forward", without_mask)
    for budget in (100, 100_000):
        got = vectors(encode(folder, texts, packed=False, budget=budget))
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    spec = resolve(folder)
    tokens = text_feeder(spec).passages(texts)
    batches = load(spec, packed=False).cut(tokens, 100_000)
    assert len(batches) == len(set(tokens.lengths.tolist())) > 1
    monkeypatch.undo()
    assert len(load(spec, packed=False).cut(tokens, 100_000)) == 1


@pytest.mark.parametrize("by_kind", [False, True])
def test_rows_whose_places_depend_on_the_longest_of_a_batch_go_by_length(
    tmp_path: Path, texts: list[str], by_kind: bool
) -> None:
    """Rotary positions of longrope have other factors in a batch with a row beyond the original length."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 48}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    folder = make_decoder(tmp_path / "llama", "llama", rope_parameters=rope)
    assert is_placed_by_batch(LlamaConfig(rope_parameters=rope))
    config = LlamaConfig()
    assert not is_placed_by_batch(config)
    config.rope_parameters = {"sliding": {"rope_type": "default"}, "full": rope} if by_kind else None
    assert is_placed_by_batch(config) is by_kind
    asked = ["a fox", "two foxes", "a dog " * 30, *texts[:9]]
    lengths = text_feeder(resolve(folder)).passages(asked).lengths
    assert lengths.min() < 40 and lengths.max() > 50
    for budget in (1, 100_000):
        got = vectors(encode(folder, asked, budget=budget))
        np.testing.assert_allclose(got, alone(folder, asked), atol=1e-5, rtol=0)


@pytest.mark.parametrize("packed", [True, False])
def test_a_token_that_the_model_has_no_vector_of_costs_its_row(tmp_path: Path, packed: bool) -> None:
    folder = make_encoder(tmp_path / "bert", positions=128)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    known = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["newword"])
    tokenizer.save(str(folder / "tokenizer.json"))
    got = encode(folder, ["a fox", "a newword", "a dog"], packed=packed)
    assert set(got.faults) == {1}
    assert got.faults[1] == (
        "unknown_token",
        f"its tokenizer makes token {known} of it, and the model has {known} from 0 on",
    )
    assert torch.from_numpy(vectors(got)[[0, 2]]).norm(dim=1).allclose(torch.ones(2))
