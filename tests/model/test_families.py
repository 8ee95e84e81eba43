"""What the families know of checkpoints, against transformers' own classes; a spec takes no torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    ElectraConfig,
    ElectraModel,
)

from bge_ray.model.families.cross_encoder import _ON_TOP
from bge_ray.model.modules import write_modules
from bge_ray.model.spec import text_feeder
from tests.model.conftest import load, resolve, run, vectors
from tests.support.models import make_wordpiece

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 1,
}


@pytest.mark.parametrize("kind", _ON_TOP)
def test_what_lies_on_top_of_an_encoder_is_what_transformers_puts_there(kind: str) -> None:
    config = AutoConfig.for_model(kind, **SIZES)
    whole = AutoModelForSequenceClassification.from_config(config)
    bare = AutoModel.from_config(config).state_dict()
    prefix = whole.base_model_prefix
    encoder = {f"{prefix}.{name}" for name in bare if not name.startswith("pooler.")}
    on_top = {name.removeprefix(f"{prefix}.") for name in set(whole.state_dict()) - encoder}
    assert on_top == {f"{layer}.{part}" for layer in _ON_TOP[kind] for part in ("weight", "bias")}


def test_an_electra_encoder_has_no_switch_for_a_pooler(tmp_path: Path) -> None:
    size = len(make_wordpiece(tmp_path, 128))
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=size,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    ElectraModel(config).save_pretrained(tmp_path)
    write_modules(tmp_path, "cls", 32)
    spec = resolve(tmp_path)
    tokens = text_feeder(spec).passages(["the quick brown fox"])
    with torch.no_grad():
        ids = torch.from_numpy(tokens.input_ids)[None].long()
        state = AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state[:, 0]
    theirs = torch.nn.functional.normalize(state, dim=-1).numpy()
    np.testing.assert_allclose(vectors(run(load(spec), tokens)), theirs, atol=1e-5, rtol=0)


CHILD = """
import sys
from bge_ray.model.spec import resolve_encoder, resolve_reranker
from bge_ray.settings.sections import ModelSettings, RerankSettings
assert resolve_encoder(ModelSettings(name=sys.argv[1]), on_gpu=False).family == "dense"
assert resolve_reranker(RerankSettings(model=sys.argv[2]), on_gpu=False).family == "cross_encoder"
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_a_spec_takes_neither_torch_nor_transformers(tiny_model: Path, reranker_folder) -> None:
    command = [sys.executable, "-c", CHILD, str(tiny_model), str(reranker_folder("bert"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
