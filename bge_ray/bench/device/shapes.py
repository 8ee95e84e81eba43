"""Models of known shapes with random weights, and rows of random tokens: what is measured and compared."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

from bge_ray.bench.models import SHAPES
from bge_ray.model.heads import Pooled
from bge_ray.model.run.executor import Executor, Loaded
from bge_ray.model.run.last_layer import keep_one_token
from bge_ray.model.run.load import Loading, load_config, load_decoder
from bge_ray.model.run.model import Model, Place
from bge_ray.model.run.packed import ATTENTION, register
from bge_ray.model.spec import resolve_encoder, resolve_reranker
from bge_ray.records.outputs import Output
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import ModelSettings, RerankSettings

SEED = 11
KERNELS = ("plain", "fused")
# Wide enough that attention decides something: at BERT's own 0.02 a random model hardly looks at others.
SPREAD = 0.08
# Docstrings under BERT's tokenizer: half of them below 55 tokens, 90 on average, cut at 512.
NATURAL_MEDIAN, NATURAL_SPREAD = 55, 1.05


@dataclass(frozen=True)
class Shape:
    """Sizes of a BERT, or of an XLM-R with room for ``positions`` tokens; named as in a configuration."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    positions: int = 512
    xlm: bool = False
    vocabulary: int = 30_522


SPEED = {
    "minilm": Shape(384, 6, 12, 1536),
    **{name: Shape(**sizes) for name, sizes in SHAPES.items()},
    "m3": replace(Shape(**SHAPES["large"]), positions=8192, xlm=True, vocabulary=250_002),
}
# Few layers, so that what is wrong in one cannot vanish behind others.
TRUTH = {
    "head 32": Shape(384, 3, 12, 1536, vocabulary=2_000),
    "head 64": Shape(768, 2, 12, 3072, vocabulary=2_000),
    "large": Shape(1024, 2, 16, 4096, vocabulary=2_000),
    "xlm-r": Shape(768, 2, 12, 3072, positions=8192, xlm=True, vocabulary=2_000),
}


def make_model(shape: Shape, folder: Path, *, spread: float = 0.02, reranker: bool = False) -> Path:
    """Save a random model of a shape, unless it is there; returns its folder."""
    if (folder / "config.json").is_file():
        return folder
    config = _config(shape, spread)
    torch.manual_seed(SEED)
    model: PreTrainedModel
    if reranker:
        config.num_labels = 1
        model = XLMRobertaForSequenceClassification(config)
    else:
        model = XLMRobertaModel(config) if shape.xlm else BertModel(config)
    model.save_pretrained(folder)
    return folder


def _config(shape: Shape, spread: float) -> PreTrainedConfig:
    sizes: dict[str, Any] = {
        **{name: getattr(shape, name) for name in SHAPES["base"]},
        "vocab_size": shape.vocabulary,
        "initializer_range": spread,
    }
    if not shape.xlm:
        return BertConfig(max_position_embeddings=shape.positions, **sizes)
    return XLMRobertaConfig(
        max_position_embeddings=shape.positions + 2, type_vocab_size=1, pad_token_id=1, **sizes
    )


@dataclass(frozen=True)
class Variant:
    """How one model is run."""

    dtype: str
    kernels: str = "plain"
    pooling: str = "cls"
    packed: bool | None = None


def load_encoder(folder: Path, variant: Variant, device: str, max_length: int) -> Model:
    """Load the encoder of a folder as a variant says."""
    settings = ModelSettings(
        name=str(folder),
        dtype=variant.dtype,
        pooling=variant.pooling,
        max_length=max_length,
        normalize=True,
        kernels=variant.kernels,
    )
    spec = resolve_encoder(settings, on_gpu=device == "cuda")
    return Model(spec, folder, Place(device, torch.get_num_threads()), packed=variant.packed)


# Of each a small one: heads that share keys, a window, norms of queries and keys.
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
}


def make_decoder(kind: str, folder: Path) -> Path:
    """Save a small random decoder of a kind of `DECODERS`, unless it is there; returns its folder."""
    if (folder / "config.json").is_file():
        return folder
    config = AutoConfig.for_model(
        kind,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=2_000,
        max_position_embeddings=1024,
        initializer_range=SPREAD,
        **DECODERS[kind],
    )
    torch.manual_seed(SEED)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def load_decoding(folder: Path, dtype: str, device: str, *, packed: bool) -> Executor:
    """Load a decoder whose output is the last token's state, without a tokenizer and what that decides."""
    if packed:
        register()
    config = load_config(folder)
    output = Output("embedding", "dense", config.hidden_size, "float32")

    def load(how: Loading) -> Loaded:
        head = Pooled(output, "last_token", normalize=True)
        return Loaded(load_decoder(folder, load_config(folder), how), (head,))

    loaded = load(Loading(getattr(torch, dtype), ATTENTION if packed else None))
    if packed:
        keep_one_token(loaded.model, {"last_token"})
    exact = Loading(torch.float32)
    return Executor(loaded, lambda: load(exact), device=torch.device(device), packed=packed)


def load_reranker(folder: Path, variant: Variant, device: str, max_length: int) -> Model:
    """Load the cross-encoder of a folder as a variant says."""
    settings = RerankSettings(
        model=str(folder), dtype=variant.dtype, kernels=variant.kernels, max_length=max_length
    )
    spec = resolve_reranker(settings, on_gpu=device == "cuda")
    return Model(spec, folder, Place(device, torch.get_num_threads()), packed=variant.packed)


def random_rows(lengths: np.ndarray, vocabulary: int) -> PackedTokens:
    """Return rows of random tokens, none of them special, of (n,) lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    ids = np.random.default_rng(SEED).integers(10, vocabulary - 10, offsets[-1], dtype=np.int32)
    return PackedTokens(ids, offsets, np.zeros(len(lengths), np.bool_))


def natural_lengths(n_rows: int) -> np.ndarray:
    """Return (n_rows,) lengths as short documentation has them, 3 to 512 tokens."""
    drawn = np.random.default_rng(SEED).lognormal(np.log(NATURAL_MEDIAN), NATURAL_SPREAD, n_rows)
    return np.clip(drawn, 3, 512).astype(np.int64)
