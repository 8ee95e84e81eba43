"""Small models with random weights, made on the spot: real formats, real code, no download."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

from bge_ray.model.modules import write_modules

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

# As their trainers made them once (tests/goldens/vocabularies.py).
VOCABULARIES = Path(__file__).parents[1] / "goldens" / "vocabularies.json"
WORDPIECE_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNIGRAM_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def _vocabulary(name: str) -> list:
    return json.loads(VOCABULARIES.read_text())[name]


def make_wordpiece(folder: Path, max_length: int = 512) -> PreTrainedTokenizerFast:
    """Save a lower-casing WordPiece tokenizer with BERT's special tokens."""
    pieces = {piece: number for number, piece in enumerate(_vocabulary("wordpiece"))}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(WORDPIECE_SPECIALS))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
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
    """Save a SentencePiece-like Unigram tokenizer with XLM-RoBERTa's special tokens and pair format."""
    pieces = [(piece, score) for piece, score in _vocabulary("unigram")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNIGRAM_SPECIALS.index("<unk>")))
    tokenizer.add_special_tokens(list(UNIGRAM_SPECIALS))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    fast = like_xlm_roberta(tokenizer, max_length)
    fast.save_pretrained(folder)
    return fast


def like_xlm_roberta(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with XLM-RoBERTa's names for its special tokens."""
    return PreTrainedTokenizerFast(
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
    write_modules(folder, pooling, dim)
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


def make_byte_level(folder: Path, max_length: int = 512, *, ends: bool = True) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer as Qwen's; ``ends``: its post-processor puts <|endoftext|> last."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    byte_level = processors.ByteLevel(trim_offsets=False)
    end = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    )
    tokenizer.post_processor = processors.Sequence([byte_level, end]) if ends else byte_level
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    return fast


def make_sentencepiece(
    folder: Path,
    max_length: int = 512,
    *,
    specials: Sequence[str] = ("<unk>", "<s>", "</s>"),
    ends: bool = True,
) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer with spaces as symbols and bytes for what it does not know, as Mistral's.

    Args:
        folder: where it is saved.
        max_length: written into its configuration.
        specials: unknown, begin and end token.
        ends: its post-processor puts the end token last, and not only the begin token first.
    """
    unknown, begin, end = specials
    tokenizer = Tokenizer(models.BPE(unk_token=unknown, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*dict.fromkeys([*specials, "<pad>"]), *bytes_]
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    ids = [(token, tokenizer.token_to_id(token)) for token in (begin, end)]
    single = f"{begin} $A {end}" if ends else f"{begin} $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        bos_token=begin,
        eos_token=end,
        unk_token=unknown,
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    return fast


def make_decoder(folder: Path, kind: str, *, ends: bool = True, seed: int = 0, **changes: object) -> Path:
    """Write a random bare decoder of a model type with last-token pooling; returns the folder.

    It has 2 layers of dim 32, 4 heads that share 2 heads of keys, 256 positions, and in Mistral and Gemma2 a
    window of 24 tokens; ``changes`` go into its configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("qwen2", "qwen3"):
        tokenizer = make_byte_level(folder, 256, ends=ends)
    elif kind == "gemma2":
        tokenizer = make_sentencepiece(folder, 256, specials=("<unk>", "<bos>", "<eos>"), ends=ends)
    else:
        tokenizer = make_sentencepiece(folder, 256, ends=ends)
    sizes: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if kind in ("mistral", "gemma2"):
        sizes["sliding_window"] = 24
    if kind == "gemma2":
        sizes |= {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
    torch.manual_seed(seed)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **(sizes | changes)))
    with torch.no_grad():  # norms that are all one hide whether they are applied
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(0.0 if kind == "gemma2" else 1.0, 0.2)
    model.eval().save_pretrained(folder)
    write_modules(folder, "last_token", 32)
    return folder
