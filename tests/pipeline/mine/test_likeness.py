"""Words in common, by hand and against a plain count."""

import itertools

import pytest

from bge_ray.pipeline.mine.likeness import overlap, words
from tests.support.corpora import docstrings


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The cat, the CAT!", {"the", "cat"}),
        ("ﬁnal Straße \uff12", {"final", "strasse", "2"}),  # ligature, sharp s, full width
        ("e\u0301tude = étude", {"étude"}),
        ("向量检索", {"向量", "量检", "检索"}),
        ("BGE是模型", {"bge", "是模", "模型"}),
        ("字", {"字"}),
        ("", set()),
        ("--- !!", set()),
    ],
)
def test_words(text: str, found: set[str]) -> None:
    assert words(text) == found


def test_overlap_is_shared_words_over_all_words() -> None:
    assert overlap(words("a b c d"), words("c d e")) == pytest.approx(2 / 5)
    assert overlap(words("seven of ten"), words("ten of SEVEN")) == 1.0
    assert overlap(frozenset(), frozenset()) == 0.0
    assert overlap(words("a"), frozenset()) == 0.0


def test_overlap_of_real_texts_equals_a_plain_count() -> None:
    texts = [record["text"] for record in docstrings(40)]
    for one, two in itertools.combinations(texts, 2):
        a, b = words(one), words(two)
        either = [word for word in a if word in b]
        assert overlap(a, b) == pytest.approx(len(either) / (len(a) + len(b) - len(either)))
