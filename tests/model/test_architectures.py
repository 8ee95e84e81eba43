"""Every architecture of the table in docs/models.md: vectors are those of sentence-transformers."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bge_ray.errors import ModelError
from bge_ray.model.modules import write_modules
from bge_ray.model.run.load import load_config
from bge_ray.model.run.packed import is_packable
from bge_ray.model.spec import pair_feeder, resolve_encoder, resolve_reranker
from bge_ray.records.model import SCORE
from bge_ray.settings.sections import ModelSettings, RerankSettings
from tests.model.conftest import encode, load, resolve, run, vectors
from tests.support.models import make_unigram, make_wordpiece
from tests.support.slow import slow_but

pytestmark = pytest.mark.parity

TEXTS = [
    *("the quick brown fox jumps over the lazy dog " * n for n in (1, 3, 9)),
    "a",
    "",
    "ray runs actors",
    "为这个句子生成表示以用于检索相关文章" * 5,
]
RERANKER = "ForSequenceClassification"
COMMON = {"initializer_range": 0.4}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    **COMMON,
}
OFFSET = SIZES | {"max_position_embeddings": 130}
ENDS = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 128, **COMMON}
TWO_WAYS = {
    "use_bidirectional_attention": True,
    "sliding_window": 16,
    "head_dim": 8,
    "num_key_value_heads": 2,
}

Tokenizer = Callable[[Path, int], Any]
# Model and configuration class of transformers, tokenizer, and sizes.
ARCHITECTURES: dict[str, tuple[str, Tokenizer, dict[str, Any]]] = {
    "albert": ("Albert", make_wordpiece, {"embedding_size": 16, **SIZES}),
    "camembert": ("Camembert", make_unigram, {"type_vocab_size": 1, "pad_token_id": 1, **OFFSET}),
    "deberta": ("Deberta", make_wordpiece, {**RELATIVE, **SIZES}),
    "deberta-v2": ("DebertaV2", make_wordpiece, {**RELATIVE, **SIZES}),
    "distilbert": ("DistilBert", make_wordpiece, DISTIL),
    # None of these three may be padded, whatever their mask says.
    "convbert": ("ConvBert", make_wordpiece, {"embedding_size": 16, **SIZES}),
    "fnet": ("FNet", make_wordpiece, {"type_vocab_size": 2, **SIZES}),
    "nystromformer": ("Nystromformer", make_wordpiece, SIZES),
    "electra": ("Electra", make_wordpiece, {"embedding_size": 16, **SIZES}),
    "gemma3_text": ("Gemma3Text", make_unigram, {"pad_token_id": 1, **TWO_WAYS, **SIZES}),
    "gte": ("Gte", make_wordpiece, {"type_vocab_size": 2, **SIZES}),
    "modernbert": ("ModernBert", make_wordpiece, {"local_attention": 16, "pad_token_id": 0, **ENDS, **SIZES}),
    "mpnet": ("MPNet", make_unigram, OFFSET),
    "nomic_bert": ("NomicBert", make_wordpiece, SIZES),
    "roberta": ("Roberta", make_unigram, {"type_vocab_size": 1, "pad_token_id": 1, **OFFSET}),
    # One that reads the weights of its linear layers, and one that reckons with its mask.
    "mamba": ("Mamba", make_wordpiece, {"state_size": 4, **SIZES}),
    "xlnet": ("XLNet", make_wordpiece, {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, **COMMON}),
}


# Of those with a head on top that transformers has.
KNOWN = frozenset(dir(transformers))  # A second's work, and nothing is imported for it.
CROSS_ENCODERS = [
    kind
    for kind, (name, *_) in ARCHITECTURES.items()
    if f"{name}{RERANKER}" in KNOWN and kind not in ("nystromformer", "xlnet")
]
BUDGETS = (1, 200, 100_000)  # each row alone, some rows, all of them


def make(kind: str, folder: Path, pooling: str) -> Path:
    save(kind, folder, "Model")
    write_modules(folder, pooling, 32)
    return folder


def save(kind: str, folder: Path, what: str, **changes: Any) -> Path:
    name, make_tokenizer, sizes = ARCHITECTURES[kind]
    folder.mkdir()
    vocabulary = len(make_tokenizer(folder, 128))
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=vocabulary, **sizes, **changes)
    getattr(transformers, f"{name}{what}")(config).eval().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", slow_but(["mean"], ["cls", "mean"]))
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equal_sentence_transformers(tmp_path: Path, kind: str, pooling: str) -> None:
    from sentence_transformers import SentenceTransformer

    folder = make(kind, tmp_path / kind, pooling)
    model = SentenceTransformer(str(folder), device="cpu")
    # One by one: what it pads, it may give other vectors.
    theirs = model.encode(TEXTS, batch_size=1, show_progress_bar=False)
    packable = is_packable(load_config(folder))
    assert packable == (kind in ("camembert", "roberta"))
    for packed, budget in itertools.product((False, True) if packable else (False,), BUDGETS):
        ours = encode(folder, TEXTS, packed=packed, budget=budget)
        assert not ours.faults
        np.testing.assert_allclose(vectors(ours), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", CROSS_ENCODERS)
def test_cross_encoders_equal_sentence_transformers(tmp_path: Path, kind: str) -> None:
    from sentence_transformers import CrossEncoder

    folder = save(kind, tmp_path / kind, RERANKER, num_labels=1)
    pairs = [
        (query, passage) for query in ("fox", "ray runs actors", "") for passage in (*TEXTS[:2], *TEXTS[3:6])
    ]
    theirs = CrossEncoder(str(folder), device="cpu").predict(
        pairs, activation_fn=torch.nn.Identity(), batch_size=1, show_progress_bar=False
    )
    spec = resolve_reranker(RerankSettings(model=str(folder)), on_gpu=False)
    rows = pair_feeder(spec).pairs([query for query, _ in pairs], [passage for _, passage in pairs])
    assert not rows.truncated.any()
    packable = is_packable(load_config(folder))
    for packed, budget in itertools.product((False, True) if packable else (False,), BUDGETS):
        ours = run(load(spec, packed=packed), rows, budget)
        assert not ours.faults
        np.testing.assert_allclose(ours.array(SCORE), theirs, atol=1e-4, rtol=0)
    assert np.ptp(theirs) > 0.1, "the scores do not tell pairs apart"


def test_attention_reaches_both_ways(tmp_path: Path) -> None:
    """EmbeddingGemma is a decoder that was made to look both ways; taken for a plain one, vectors differ."""
    folder = make("gemma3_text", tmp_path / "gemma", "mean")
    both = vectors(encode(folder, TEXTS))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_bidirectional_attention": False}))
    assert np.abs(vectors(encode(folder, TEXTS)) - both).max() > 1e-2


def test_half_precision_on_a_gpu_is_that_of_the_card(tmp_path: Path) -> None:
    folder = make("gemma3_text", tmp_path / "embeddinggemma-300m", "mean")
    asked = ModelSettings(name=str(folder))
    assert resolve_encoder(asked, on_gpu=True).dtype == "bfloat16"
    assert resolve_encoder(asked, on_gpu=False).dtype == "float32"
    assert resolve_encoder(asked.model_copy(update={"dtype": "float16"}), on_gpu=True).dtype == "float16"


@pytest.mark.parametrize("part", ["Model", "EncoderModel"])
@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5", "LongT5"])
def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path, kind: str, part: str) -> None:
    """The encoder alone, too, as sentence-transformers saves a T5; not every one of them says what it is."""
    vocabulary = len(make_unigram(tmp_path, 128))
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = getattr(transformers, f"{kind}Config")(vocab_size=vocabulary, **sizes)
    getattr(transformers, f"{kind}{part}")(config).save_pretrained(tmp_path)
    write_modules(tmp_path, "mean", 32)
    with pytest.raises(ModelError, match=rf"encoder with a decoder \({kind.lower()}\)"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bge-m3-retromae", "a base to train from"), ("jina-embeddings-v3", "an adapter for each task")],
)
def test_a_model_that_its_card_refuses(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        resolve(make("roberta", tmp_path / name, "mean"))


def test_code_over_a_known_architecture(tmp_path: Path) -> None:
    """Loaded as it is, it makes vectors; whether they are its authors', only a card can say."""
    code = {"auto_map": {"AutoModel": "modeling.Mine"}}
    for name, cleared in (("mine", False), ("nomic-embed-text-v1.5", True)):
        folder = make("nomic_bert", tmp_path / name, "mean")
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | code))
        if cleared:
            assert not encode(folder, TEXTS[:1]).faults
            assert resolve(folder).query_instruction == "search_query: "
            continue
        with pytest.raises(ModelError, match=r"name Python code \(auto_map\).*model\.trust_remote_code"):
            resolve(folder)
        assert resolve(folder, trust_remote_code=True).dim == 32
