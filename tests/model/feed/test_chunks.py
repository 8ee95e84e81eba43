"""Chunks against what they promise: the text covered, no chunk too long, overlaps as asked, spans exact."""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bge_ray.errors import ModelError
from bge_ray.model.feed.chunks import Chunker, Chunks, splitting_rules
from bge_ray.model.feed.texts import TextFeeder
from bge_ray.records.chunking import Chunking
from bge_ray.records.ids import MAX_CHUNKS_PER_ROW
from tests.support.models import SENTENCES, make_unigram, make_wordpiece

RULES = Chunking(
    max_tokens=24,
    overlap_tokens=0,
    boundary="sentence",
    language="en",
    titles="every",
    keep_text=False,
    rules=splitting_rules(),
)
KINDS = ("wordpiece", "unigram", "byte_bpe")


def make_byte_bpe(folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that puts an end-of-text token after each text, as Qwen's embedders do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    end = tokenizer.token_to_id("<|end|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", end)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.save_pretrained(folder)
    return fast


@dataclass(frozen=True)
class Kind:
    """A tokenizer as transformers has it, and its folder."""

    tokenizer: PreTrainedTokenizerFast
    folder: Path

    def chunker(self, rules: Chunking, instruction: str = "") -> Chunker:
        return Chunker(TextFeeder(self.folder, 10_000, passage_instruction=instruction), rules)

    def ids(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {"wordpiece": make_wordpiece, "unigram": make_unigram, "byte_bpe": make_byte_bpe}
    return {name: Kind(make(folder / name), folder / name) for name, make in made.items()}


# What people write, and what is unkind: other scripts, marks that combine, emoji of several characters.
ALPHABET = st.one_of(
    st.sampled_from(
        [
            "Hello world. ",
            "e.g. ",
            "\n\n",
            "\n",
            "。",
            "今天天气很好",
            "שלום עולם. ",
            "مرحبا؟ ",
            "👨‍👩‍👧‍👦",
            "👍🏽",
            "e\u0301",
            "\u0301" * 40,
            " ",
            "\t",
            "x" * 150,
        ]
    ),
    st.text(max_size=12),
    st.sampled_from(SENTENCES),
)
TEXTS = st.lists(ALPHABET, max_size=60).map("".join).filter(lambda text: text.strip() != "")


def read(chunks: Chunks, title: str, text: str, rules: Chunking, instruction: str) -> list[str]:
    """Return what the model is to read of each chunk, from the spans alone."""
    found = []
    for number, (start, stop) in enumerate(chunks.spans.tolist()):
        head = title if rules.titles == "every" or number == 0 else ""
        found.append(instruction + f"{head} {text[start:stop]}".strip())
    return found


@settings(max_examples=60)
@given(
    text=TEXTS,
    title=st.sampled_from(["", "A title", "标题"]),
    instruction=st.sampled_from(["", "passage: "]),
    kind=st.sampled_from(KINDS),
    boundary=st.sampled_from(["paragraph", "sentence", "token"]),
    overlap=st.sampled_from([0, 3, 10]),
    titles=st.sampled_from(["every", "first"]),
)
@example("\u0301" * 400, "", "", "byte_bpe", "sentence", 0, "every")
@example(
    "。éthe quick brown fox jumps over the lazy dog\n\n",
    "A title",
    "passage: ",
    "byte_bpe",
    "token",
    3,
    "every",
)
@example("a" * 30_000 + " end.", "", "", "unigram", "token", 3, "every")
def test_chunks_cover_the_text_within_the_budget_and_overlap_as_asked(
    tokenizers: dict[str, Kind],
    text: str,
    title: str,
    instruction: str,
    kind: str,
    boundary: str,
    overlap: int,
    titles: str,
) -> None:
    found = tokenizers[kind]
    rules = dataclasses.replace(
        RULES, max_tokens=40, overlap_tokens=overlap, boundary=boundary, titles=titles
    )
    chunks = found.chunker(rules, instruction).cut([title], [text])
    spans = chunks.spans.tolist()
    assert chunks.numbers.tolist() == list(range(len(spans)))
    covered = set()
    for start, stop in spans:
        assert 0 <= start < stop <= len(text)
        covered.update(range(start, stop))
    assert {i for i, c in enumerate(text) if not c.isspace()} <= covered
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(spans))  # each begins later
    assert all(a < b for (_, a), (_, b) in itertools.pairwise(spans))  # and ends later
    given_ids = [chunks.tokens.input_ids[a:b].tolist() for a, b in itertools.pairwise(chunks.tokens.offsets)]
    assert given_ids == [found.ids(s) for s in chunks.read]
    assert chunks.read == read(chunks, title, text, rules, instruction)
    assert max(len(ids) for ids in given_ids) <= 40
    for (_, before), (start, _) in itertools.pairwise(spans):
        if overlap == 0:
            assert start >= before
        elif start < before and kind == "wordpiece":  # where tokens of words add up to those of the whole
            inside_a_word = 1 if boundary == "token" else 0
            assert len(found.ids(text[start:before], special_tokens=False)) <= overlap + inside_a_word


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_fits_is_one_chunk_and_its_tokens_are_those_of_the_text(
    tokenizers: dict[str, Kind], kind: str
) -> None:
    chunks = (
        tokenizers[kind]
        .chunker(dataclasses.replace(RULES, max_tokens=400))
        .cut(["", "T"], [" the quick brown fox. \n", "a corpus."])
    )
    assert chunks.texts.tolist() == [0, 1]
    assert chunks.spans.tolist() == [[1, 21], [0, 9]]
    first = chunks.tokens.input_ids[: chunks.tokens.offsets[1]].tolist()
    assert first == tokenizers[kind].ids("the quick brown fox.")


def test_chunks_end_where_sentences_do_in_english_and_chinese(
    tokenizers: dict[str, Kind],
) -> None:
    english = "The quick brown fox jumps over Dr. Smith. A dog runs. Ray runs actors on a cluster. " * 8
    chinese = "为这个句子生成表示。以用于检索相关文章!为这个句子生成表示?" * 4
    chunks = (
        tokenizers["wordpiece"]
        .chunker(dataclasses.replace(RULES, max_tokens=60))
        .cut(["", ""], [english, chinese])
    )
    pieces = {0: [], 1: []}
    for n, (start, stop) in zip(chunks.texts.tolist(), chunks.spans.tolist(), strict=True):
        pieces[n].append((english, chinese)[n][start:stop])
    assert len(pieces[0]) > 2 and len(pieces[1]) > 2
    assert all(piece.endswith((".", "cluster.")) and not piece.endswith("Dr.") for piece in pieces[0])
    assert all(piece[-1] in "。!?" for piece in pieces[1])


def test_paragraphs_stay_whole_where_they_fit(tokenizers: dict[str, Kind]) -> None:
    paragraph = "ray runs actors on a cluster of machines. the lazy dog jumps."
    text = "\n\n".join([paragraph] * 5)
    size = len(tokenizers["wordpiece"].ids(paragraph))
    rules = dataclasses.replace(RULES, max_tokens=2 * size - 3, boundary="paragraph")
    chunks = tokenizers["wordpiece"].chunker(rules).cut([""], [text])
    assert [text[a:b] for a, b in chunks.spans.tolist()] == [paragraph] * 5


def test_overlap_repeats_whole_sentences_up_to_the_number_asked(
    tokenizers: dict[str, Kind],
) -> None:
    wordpiece = tokenizers["wordpiece"]
    text = " ".join(f"dog {n} jumps over fox {n}." for n in range(30))
    size = len(wordpiece.ids("dog 7 jumps over fox 7.", special_tokens=False))
    rules = dataclasses.replace(RULES, max_tokens=4 * size + 10, overlap_tokens=2 * size)
    spans = wordpiece.chunker(rules).cut([""], [text]).spans.tolist()
    repeated = [text[start:before] for (_, before), (start, _) in itertools.pairwise(spans)]
    assert {piece.count(".") for piece in repeated} <= {1, 2}
    assert all(piece.startswith("dog") for piece in repeated)


def test_long_texts_without_a_space_and_of_many_sentences_are_cut(
    tokenizers: dict[str, Kind],
) -> None:
    rules = dataclasses.replace(RULES, max_tokens=510)
    for kind in KINDS:
        chunker = tokenizers[kind].chunker(rules)
        chunks = chunker.cut([""], ["为这个句子生成表示" * 3_000])
        assert len(chunks.spans) > 20
        assert chunks.spans[-1][1] == 27_000
        assert int(chunks.tokens.lengths.max(initial=0)) <= 510
    wide = dataclasses.replace(RULES, max_tokens=800)
    chunks = tokenizers["wordpiece"].chunker(wide).cut([""], ["A quick brown fox. " * 20_000])
    assert not chunks.too_many
    assert chunks.spans[-1][1] == 19 * 20_000 - 1


def test_too_many_chunks_are_counted_and_the_other_texts_cut(
    tokenizers: dict[str, Kind],
) -> None:
    text = "fox jumps over lazy dog now. " * 20_000
    chunks = (
        tokenizers["wordpiece"]
        .chunker(dataclasses.replace(RULES, max_tokens=18))
        .cut(["", ""], [text, "a dog."])
    )
    assert set(chunks.too_many) == {0}
    assert chunks.too_many[0] > MAX_CHUNKS_PER_ROW
    assert chunks.texts.tolist() == [1]


def test_a_title_longer_than_half_a_chunk_is_cut_and_said(
    tokenizers: dict[str, Kind],
) -> None:
    chunker = tokenizers["wordpiece"].chunker(dataclasses.replace(RULES, max_tokens=40))
    chunks = chunker.cut(["fox " * 300, "a fox"], ["the dog runs. " * 30, "the dog runs. " * 30])
    told = dict(zip(chunks.texts.tolist(), chunks.tokens.truncated.tolist(), strict=True))
    assert told == {0: True, 1: False}
    assert int(chunks.tokens.lengths.max()) <= 40


def test_an_instruction_that_leaves_no_room_is_refused(
    tokenizers: dict[str, Kind],
) -> None:
    with pytest.raises(ModelError, match=r"chunking.max_tokens 24: leaves \d+ tokens"):
        tokenizers["wordpiece"].chunker(RULES, "the quick brown fox jumps over the lazy dog: ")
