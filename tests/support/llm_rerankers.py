"""Tiny LLM rerankers of the three kinds, the same to the bit wherever they are made; knows no transformers.

Weights come from numpy's frozen generator by name; tokenizers lie beside the goldens.
"""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GOLDENS = Path(__file__).parents[1] / "goldens"

# Short, long and overlong, empty, Chinese, with odd white space, with what no vocabulary has.
PAIRS = [
    ("what is a fox", "the quick brown fox jumps over the lazy dog"),
    ("Yes", "No"),
    ("how do I read a file", "a corpus in object storage becomes embeddings and an index " * 9),
    ("ray runs actors and tasks on a cluster of machines " * 8, "a lazy dog"),
    ("the fox " * 40, "faiss searches vectors, parquet stores columns; " * 30),
    ("", "the quick brown fox"),
    ("an index", ""),
    ("", ""),
    ("检索相关文章", "为这个句子生成表示以用于检索相关文章"),
    ("为这个句子生成表示" * 12, "狐狸跳过了懒狗" * 20),
    ("  two  spaces ", " lead and tail \n"),
    ("line\nbreak", "tab\there\n\nand a literal <eos> and </s>"),
    ("emoji 🦊?", "ﬁne ünïcode 🦊🐕"),
    ("0 1 2 3", "python 3.11; torch==2.13.0 (cpu)"),
]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS, START = 32, 4, 2, 8, 64, 6, 2
TOKENIZERS = {"gemma": "gemma", "minicpm": "llama", "gemma2": "gemma"}
SPECIALS = {
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"},
}
CLASSES = {"gemma": "GemmaTokenizer", "llama": "LlamaTokenizer"}


def make_llm_reranker(folder: Path, kind: str, **changes: Any) -> Path:
    """Write a tiny reranker: gemma (v2-gemma), minicpm (layer-wise) or gemma2 (lightweight).

    Args:
        folder: made here.
        kind: which.
        changes: to config.json.
    """
    folder.mkdir(parents=True)
    write_tokenizer(folder, TOKENIZERS[kind])
    vocab = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    config = {**_CONFIGS[kind], "vocab_size": vocab, **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    # A Gemma adds 1 to the weights of its norms.
    centre = 1.0 if kind == "minicpm" else 0.0
    weights = {name: draw(name, shape, centre) for name, shape in _shapes(config).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tokenizer(folder: Path, kind: str) -> None:
    """Write the files of a tiny tokenizer of Gemma's or Llama's kind."""
    shutil.copyfile(GOLDENS / f"{kind}-tokenizer.json", folder / "tokenizer.json")
    says = {**SPECIALS[kind], "tokenizer_class": CLASSES[kind], "add_bos_token": True, "add_eos_token": False}
    says |= {"model_max_length": 4096, "clean_up_tokenization_spaces": False, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(says, indent=1))


def draw(name: str, shape: tuple[int, ...], centre: float) -> np.ndarray:
    """Return random weights that depend on name and shape alone; those of norms lie around a centre."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name:
        return (0.1 * values + centre).astype(np.float32)
    return (values * (0.5 if "embed" in name or "head" in name else 0.25)).astype(np.float32)


_COMMON = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
_GEMMA = {
    **_COMMON,
    "head_dim": HEAD_DIM,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": {
        **_GEMMA,
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "num_key_value_heads": 1,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "minicpm": {
        **_COMMON,
        "architectures": ["LayerWiseMiniCPMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_minicpm_reranker.LayerWiseMiniCPMConfig",
            "AutoModelForCausalLM": "modeling_minicpm_reranker.LayerWiseMiniCPMForCausalLM",
        },
        "model_type": "minicpm",
        "hidden_act": "silu",
        "num_key_value_heads": KV_HEADS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "scale_emb": 3,
        "scale_depth": 1.4,
        "dim_model_base": 8,
        "start_layer": START,
        "head_multi": True,
        "head_type": "simple",
    },
    "gemma2": {
        **_GEMMA,
        "architectures": ["CostWiseGemmaForCausalLM"],
        "auto_map": {
            "AutoConfig": "gemma_config.CostWiseGemmaConfig",
            "AutoModelForCausalLM": "gemma_model.CostWiseGemmaForCausalLM",
        },
        "model_type": "cost_wise_gemma",
        "num_key_value_heads": KV_HEADS,
        "query_pre_attn_scalar": HEAD_DIM,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 24,
        "start_layer": START,
        "layer_sep": 1,
        "layer_wise": True,
    },
}


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    width = config["num_attention_heads"] * HEAD_DIM
    keys = config["num_key_value_heads"] * HEAD_DIM
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind == "cost_wise_gemma":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.{name}.weight": (hidden,) for name in norms}
        shapes |= {
            f"{stem}.self_attn.q_proj.weight": (width, hidden),
            f"{stem}.self_attn.k_proj.weight": (keys, hidden),
            f"{stem}.self_attn.v_proj.weight": (keys, hidden),
            f"{stem}.self_attn.o_proj.weight": (hidden, width),
            f"{stem}.mlp.gate_proj.weight": (inner, hidden),
            f"{stem}.mlp.up_proj.weight": (inner, hidden),
            f"{stem}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if kind != "gemma":
        heads = range(config["num_hidden_layers"] + 1 - config["start_layer"])
        shapes |= {f"lm_head.{i}.linear_head.weight": (1, hidden) for i in heads}
    return shapes
