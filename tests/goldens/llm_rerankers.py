"""Makes llm_rerankers.json: what FlagEmbedding's LLM rerankers say of the tiny models and pairs of the tests.

FlagEmbedding's own code for two of the three kinds runs only under an older transformers than ours, so this
runs in an environment of its own:

    python -m venv golden && golden/bin/pip install torch==2.13.0 transformers==4.47.1 FlagEmbedding==1.4.2
    PYTHONPATH=. golden/bin/python tests/goldens/llm_rerankers.py

Tokenizers are trained only where they are missing; a new one makes all goldens new.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from FlagEmbedding import FlagLLMReranker, LayerWiseFlagLLMReranker, LightWeightFlagLLMReranker
from FlagEmbedding.inference.reranker.decoder_only.models.gemma_model import CostWiseGemmaForCausalLM
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

from tests.goldens.llm_rerankers_cases import COMPRESSED, COMPRESSIONS, CUTS
from tests.support.llm_rerankers import GOLDENS, PAIRS, make_llm_reranker

SENTENCES = [
    "the quick brown fox jumps over the lazy dog; a corpus in object storage becomes embeddings and an index",
    "ray runs actors and tasks on a cluster of machines. faiss searches vectors, parquet stores columns",
    "为这个句子生成表示以用于检索相关文章",
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by",
    "providing a prediction of either 'Yes' or 'No'. Predict whether passage B contains an answer to query A.",  # noqa: E501 - tokenizers were trained with it
    "how do I read a file line by line in python? A: B: Yes No Yes No",
]


def make_tokenizer(kind: str, path: Path) -> None:
    """Train a BPE with byte fallback, as SentencePiece models of Gemma and Llama are converted."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>"] if kind == "gemma" else ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = [word for sentence in SENTENCES for word in sentence.split()]
    trained.train_from_iterator(words * 5, trainers.BpeTrainer(vocab_size=420, show_progress=False))
    own = json.loads(trained.to_str())["model"]
    extra = ["\n", "\n\n", "▁"] if kind == "gemma" else []
    pieces = list(dict.fromkeys([*names, *fallback, *extra, *own["vocab"]]))
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in own["merges"]]
    merges += [("\n", "\n")] if kind == "gemma" else []
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replace = normalizers.Replace(" ", "▁")
    if kind == "gemma":
        tokenizer.normalizer = replace
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    first = names[2] if kind == "gemma" else names[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, vocab[first])]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    path.write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False) + "\n")


class Noting:
    """Stands around a model and notes the token ids that it is given, without their padding."""

    def __init__(self, reranker: Any) -> None:
        self.rows: list[list[int]] = []
        self._forward = reranker.model.forward
        reranker.model.forward = self

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: Any) -> Any:
        self.rows += [row[kept.bool()].tolist() for row, kept in zip(input_ids, attention_mask, strict=True)]
        return self._forward(input_ids=input_ids, attention_mask=attention_mask, **rest)


def scores(reranker: Any, **how: Any) -> Any:
    """Return rounded scores of all pairs, in one list, or one a layer."""
    pairs = [list(pair) for pair in PAIRS]
    found = np.asarray(reranker.compute_score(pairs, batch_size=5, **how), dtype=np.float64)
    return np.round(found, 7).tolist()


def token_ids(reranker: Any, **how: Any) -> list[list[int]]:
    """Return the token ids of each pair as the model gets them."""
    noting, rows = Noting(reranker), []
    for pair in PAIRS:
        noting.rows.clear()
        reranker.compute_score([list(pair)], batch_size=1, **how)
        rows.append(noting.rows[-1])
    reranker.model.forward = noting._forward
    return rows


def main() -> None:
    """Write the goldens of all three kinds."""
    for kind in ("gemma", "llama"):
        path = GOLDENS / f"{kind}-tokenizer.json"
        if not path.is_file():
            make_tokenizer(kind, path)
    plain: dict[str, Any] = {"use_fp16": False, "use_bf16": False, "devices": "cpu", "max_length": 64}
    goldens: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = {
            kind: str(make_llm_reranker(Path(place) / kind, kind)) for kind in ("gemma", "minicpm", "gemma2")
        }
        yes = FlagLLMReranker(folders["gemma"], **plain)
        goldens["gemma"] = {
            "ids": {
                "64": token_ids(yes),
                "100, query 20": token_ids(yes, max_length=100, query_max_length=20),
                "prompt": token_ids(yes, prompt="Predict whether passage B contains an answer to query A."),
            },
            "scores": {"64": scores(yes), "100, query 20": scores(yes, max_length=100, query_max_length=20)},
            "normalized": scores(yes, normalize=True),
        }
        named = FlagLLMReranker(
            folders["gemma"],
            query_instruction_for_rerank="query: ",
            passage_instruction_for_rerank="passage: ",
            **plain,
        )
        goldens["gemma"]["ids"]["instructions"] = token_ids(named)
        layers = LayerWiseFlagLLMReranker(folders["minicpm"], **plain)
        layers.model.float()  # it is made half without a flag, and its weights are then rounded
        layers = _float32(layers, folders["minicpm"])
        goldens["minicpm"] = {
            "ids": {"64": token_ids(layers)},
            "scores": {name: scores(layers, cutoff_layers=cuts) for name, cuts in CUTS.items()},
        }
        for attention in ("sdpa", "eager"):
            light = LightWeightFlagLLMReranker(folders["gemma2"], **plain)
            light.model = CostWiseGemmaForCausalLM.from_pretrained(
                folders["gemma2"], attn_implementation=attention
            )
            found = {name: scores(light, cutoff_layers=cuts) for name, cuts in CUTS.items()}
            for name, (ratio, where) in COMPRESSIONS.items():
                found |= {
                    f"{cut} {name}": scores(
                        light, cutoff_layers=CUTS[cut], compress_ratio=ratio, compress_layers=where
                    )
                    for cut in COMPRESSED
                }
            goldens[f"gemma2 {attention}"] = {"ids": {"64": token_ids(light)}, "scores": found}
        default = LightWeightFlagLLMReranker(folders["gemma2"], **plain)
        goldens["gemma2 default"] = default.model.config._attn_implementation
    (GOLDENS / "llm_rerankers.json").write_text(json.dumps(goldens) + "\n")


def _float32(reranker: Any, folder: str) -> Any:
    """Give a layer-wise reranker weights that were never rounded."""
    reranker.use_fp16 = False
    reranker.model = type(reranker.model).from_pretrained(folder, torch_dtype=torch.float32)
    return reranker


if __name__ == "__main__":
    main()
