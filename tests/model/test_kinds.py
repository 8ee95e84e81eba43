"""Kinds of folders that a user has: what FlagEmbedding's training leaves, and what was cut off on its way.

Sharded, pickled and half-precision weights are in test_weights, sentence-transformers' in files of their own.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bge_ray.errors import ModelError
from bge_ray.model.cards import cards
from tests.model.conftest import MakeModel, encode, load, resolve, vectors


@pytest.mark.parity
def test_a_checkpoint_of_flagembedding(encoder_folder: MakeModel, tmp_path: Path, texts: list[str]) -> None:
    """It holds no word of the pooling: its place or the setting has to say it."""
    from FlagEmbedding import FlagModel
    from FlagEmbedding.finetune.embedder.encoder_only.base import BiEncoderOnlyEmbedderModel
    from transformers import AutoModel, AutoTokenizer

    start = encoder_folder("bert", "cls")
    tokenizer = AutoTokenizer.from_pretrained(start)
    trained = BiEncoderOnlyEmbedderModel(AutoModel.from_pretrained(start), tokenizer=tokenizer)
    with torch.no_grad():
        trained.model.get_input_embeddings().weight.add_(0.1)
    folder = tmp_path / "bge-small-en-v1.5" / "checkpoint-500"
    trained.save(str(folder))
    tokenizer.save_pretrained(folder)
    torch.save({"learning_rate": 1e-5}, folder / "training_args.bin")

    theirs = FlagModel(str(folder), use_fp16=False, devices="cpu", passage_max_length=128).encode_corpus(
        texts
    )
    np.testing.assert_allclose(vectors(encode(folder, texts)), theirs, atol=1e-5, rtol=0)
    spec = resolve(folder)
    assert (spec.pooling, spec.normalize) == ("cls", True)
    assert spec.query_instruction == cards()["BAAI/bge-small-en-v1.5"].query_prefix()
    moved = Path(shutil.copytree(folder, tmp_path / "mine"))
    with pytest.raises(ModelError, match=r"set model\.pooling") as refused:
        resolve(moved)
    assert "\n" not in str(refused.value)
    np.testing.assert_allclose(vectors(encode(moved, texts, pooling="cls")), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_weights_that_were_cut_off(encoder_folder: MakeModel, tmp_path: Path, kept: int) -> None:
    folder = Path(shutil.copytree(encoder_folder("bert", "cls"), tmp_path / "cut"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match="cut") as refused:
        load(resolve(folder))
    assert "\n" not in str(refused.value)


def test_a_weight_that_is_missing(encoder_folder: MakeModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(encoder_folder("bert", "cls"), tmp_path / "lacking"))
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are not in its files.*encoder\.layer\.1") as refused:
        load(resolve(folder))
    assert "\n" not in str(refused.value)
