"""Where sentences end: as the library says of the whole text, in time that grows with its length alone."""

import itertools
import random
import re
import time
from collections.abc import Iterable

import hypothesis.strategies as st
import pytest
import sentencex
from hypothesis import given, settings

from bge_ray.model.feed import sentences
from bge_ray.model.feed.sentences import AHEAD, WINDOW, sentence_ends

pytestmark = pytest.mark.long

# What is closed in itself, and shorter than a window sees ahead.
BLOCKS = [
    "Hello world. ",
    "Dr. Smith e.g. this. ",
    "He said “yes. no” and went. ",
    '"quoted. thing" ',
    "(see there. yes.) ",
    "mail a.b@c.de. ",
    "it's 3.5 or so. ",
    " [1] ",
    "今天天气很好。",
    "他说：“好。走吧。”然后",  # noqa: RUF001 - full width is meant
    "《书。名》",
    "これは「文。章」です！",  # noqa: RUF001 - full width is meant
    "Yahoo!",
    "。Dr. X",
    "किताब है। ",
    "هذه جملة؟ ",
    "😀。",
    "\n",
    "\n\n",
    "\r\n\r\n",
    "x" * 300 + " ",
    "汉" * 200,
]
# One line each, of which each is something else to the library.
LINES = {
    "chinese": "这是一个句子啊，因为今天天气很好。",  # noqa: RUF001 - full width is meant
    "japanese": "これは「日本語」の文章です！",  # noqa: RUF001 - full width is meant
    "thai": "นี่คือประโยคภาษาไทย",
    "arabic": "هذه جملة عربية؟ ",
    "hindi": "यह एक वाक्य है।",
    "greek": "Αυτή είναι μια πρόταση. ",
    "english": "The cat sat on the mat, it is said. ",
    "emoji": "😀😃。",
    "no end": "中文字",
    "no end after a stop": "中。1",
    "base64": "aGVsbG8gd29ybGQx",
    "a quotation that nothing closes": '“ "a" b. C ',
}


def gone_past_space(text: str, ends: Iterable[int]) -> list[int]:
    """Return where the next sentences begin: the library leaves out some of the line ends between two."""
    space = re.compile(r"\s*")
    return sorted({space.match(text, end).end() for end in ends})  # type: ignore[union-attr]


def of_the_whole(language: str, text: str) -> list[int]:
    found = sentencex.get_sentence_boundaries(language, text)
    return gone_past_space(text, (sentence["end_index"] for sentence in found))


@settings(max_examples=80, deadline=None)
@given(
    blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=200),
    language=st.sampled_from(["en", "zh", "ja", "de", "fi"]),
)
def test_ends_are_those_of_the_whole_at_the_edges_of_small_windows(blocks: list[str], language: str) -> None:
    text = "".join(blocks)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sentences, "WINDOW", 1_600)
        patched.setattr(sentences, "AHEAD", 500)
        found = list(sentence_ends(language, text))
    assert all(a < b for a, b in itertools.pairwise([0, *found]))
    assert found[-1] == len(text)
    assert gone_past_space(text, found) == of_the_whole(language, text)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_ends_are_those_of_the_whole_in_many_windows(language: str) -> None:
    for seed in range(12):
        text = "".join(random.Random(seed).choices(BLOCKS, k=1_500))
        assert len(text) > 3 * WINDOW
        found = list(sentence_ends(language, text))
        assert gone_past_space(text, found) == of_the_whole(language, text)


def test_ends_are_those_of_the_whole_in_one_line_of_any_script() -> None:
    for name in set(LINES) - {"no end", "no end after a stop", "a quotation that nothing closes"}:
        text = (LINES[name] * WINDOW)[: 3 * WINDOW + 17]
        assert list(sentence_ends("en", text)) == of_the_whole("en", text), name


def test_the_word_before_a_full_stop_is_seen_whole_at_the_beginning_of_a_window() -> None:
    first = "汉字。" * ((WINDOW - AHEAD) // 3)
    assert len(first) == WINDOW - AHEAD
    text = first + "Dr. Smith. " + first
    found = list(sentence_ends("en", text))
    assert len(first) + len("Dr. ") in found  # for the library "。Dr" is a word, and no abbreviation
    assert found == of_the_whole("en", text)


def test_a_quotation_wider_than_a_window_ends_no_later_than_the_text() -> None:
    text = "Before. “" + "A cat sat. " * 3_000 + "” After. Last."
    found = list(sentence_ends("en", text))
    assert found[:2] == [9, 20]  # the library would find no end before the quotation's
    assert len(found) > 2_900
    assert found[-1] == len(text)


def test_nothing_ends_in_an_empty_text() -> None:
    assert list(sentence_ends("en", "")) == []


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_what_the_library_is_handed_grows_with_the_text_alone(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[int] = []
    real = sentencex.get_sentence_boundaries

    def counted(language: str, text: str) -> list[dict[str, int]]:
        handed.append(len(text))
        return real(language, text)

    monkeypatch.setattr(sentencex, "get_sentence_boundaries", counted)
    sums = []
    for length in (100_000, 200_000):
        handed.clear()
        found = list(sentence_ends("en", (line * length)[:length]))
        assert found[-1] == length
        assert max(handed) <= WINDOW
        assert sum(handed) <= length * WINDOW / (WINDOW - 2 * AHEAD) + WINDOW
        sums.append(sum(handed))
    assert sums[1] == pytest.approx(2 * sums[0], rel=0.05)


def test_a_million_characters_of_chinese_in_one_line_take_seconds() -> None:
    before = time.process_time()
    found = list(sentence_ends("en", LINES["chinese"] * 60_000))
    assert len(found) == 60_000
    assert time.process_time() - before < 60  # 2 s; handed to the library whole, 3 minutes
