"""Small models with random weights, made on the spot: real formats, real code, no download."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a corpus in object storage becomes embeddings and an index",
    "ray runs actors and tasks on a cluster of machines",
    "faiss searches vectors, parquet stores columns",
    "为这个句子生成表示以用于检索相关文章",
    "how do I read a file line by line in python?",
    "Represent this sentence for searching relevant passages: ",
    "0 1 2 3 4 5 6 7 8 9 ( ) [ ] { } . , ; : ! ? - _ / é ü ñ",
]


def make_wordpiece(folder: Path, max_length: int = 512) -> PreTrainedTokenizerFast:
    """Train a lower-casing WordPiece tokenizer with BERT's special tokens and save it."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        SENTENCES * 4, trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials)
    )
    cls_id, sep_id = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls_id), ("[SEP]", sep_id)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    return fast


def make_unigram(folder: Path, max_length: int = 512) -> PreTrainedTokenizerFast:
    """Train a SentencePiece-like Unigram tokenizer with XLM-RoBERTa's special tokens and pair format."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=specials, unk_token="<unk>")
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    return fast


def make_encoder(
    folder: Path,
    *,
    pooling: str = "cls",
    kind: str = "bert",
    dim: int = 32,
    layers: int = 2,
    positions: int = 512,
    intermediate: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a random encoder with sentence-transformers' pooling files; returns the folder."""
    config = _make_config(folder, kind, dim, layers, positions, seed)
    config.intermediate_size = intermediate or config.intermediate_size
    model = BertModel(config) if kind == "bert" else XLMRobertaModel(config)
    model.eval().save_pretrained(folder)
    write_pooling(folder, pooling, dim)
    return folder


def make_m3(
    folder: Path,
    *,
    dim: int = 32,
    colbert_dim: int | None = None,
    positions: int = 128,
    seed: int = 0,
    pickled: bool = False,
) -> Path:
    """Write a random XLM-RoBERTa with the two heads of bge-m3 in their files; returns the folder.

    Those of the published model are pickled, which takes a process of their own to look at.
    """
    make_encoder(folder, kind="xlm-roberta", dim=dim, positions=positions, seed=seed)
    sparse, colbert = torch.nn.Linear(dim, 1), torch.nn.Linear(dim, colbert_dim or dim)
    with torch.no_grad():
        states = XLMRobertaModel.from_pretrained(folder)(torch.arange(5, 100)[None]).last_hidden_state[0]
        # Random states have much in common, of which all weights would be positive, or none. Those of the
        # published model are below one, and most tokens have one.
        common = states.mean(0)
        sparse.weight -= (sparse.weight @ common) / (common @ common) * common
        sparse.weight *= 0.1 / (states @ sparse.weight.T).std()
        sparse.bias.fill_(0.05)
    for name, linear in (("sparse_linear", sparse), ("colbert_linear", colbert)):
        if pickled:
            torch.save(linear.state_dict(), folder / f"{name}.pt")
        else:
            save_file(linear.state_dict(), folder / f"{name}.safetensors")
    return folder


def make_cross_encoder(
    folder: Path, *, kind: str = "bert", dim: int = 32, layers: int = 2, positions: int = 512, seed: int = 0
) -> Path:
    """Write a random cross-encoder with one output; returns the folder."""
    config = _make_config(folder, kind, dim, layers, positions, seed)
    config.num_labels = 1
    classes = {"bert": BertForSequenceClassification, "xlm-roberta": XLMRobertaForSequenceClassification}
    classes[kind](config).eval().save_pretrained(folder)
    return folder


def _make_config(
    folder: Path, kind: str, dim: int, layers: int, positions: int, seed: int
) -> BertConfig | XLMRobertaConfig:
    """Write the tokenizer of a new model and return its configuration; seeds torch."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * dim,
        "initializer_range": 0.4,
    }
    if kind == "bert":
        vocab_size = len(make_wordpiece(folder, positions))
        return BertConfig(vocab_size=vocab_size, max_position_embeddings=positions, **sizes)
    return XLMRobertaConfig(
        vocab_size=len(make_unigram(folder, positions)),
        max_position_embeddings=positions + 2,
        pad_token_id=1,
        type_vocab_size=1,
        **sizes,
    )


def write_pooling(folder: Path, pooling: str, dim: int) -> None:
    """Write the files in which sentence-transformers keeps pooling and normalisation."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {
        "word_embedding_dimension": dim,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_lasttoken": pooling == "last_token",
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
