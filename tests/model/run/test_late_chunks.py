"""Late chunks are the means of their tokens' states in their window, as transformers gives these."""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from bge_ray.model.feed.chunks import Chunker, Chunks, splitting_rules
from bge_ray.model.spec import text_feeder
from bge_ray.records.chunking import Chunking
from bge_ray.records.model import ModelSpec
from bge_ray.records.tokens import PackedTokens
from tests.model.conftest import MakeModel, load, resolve, vectors
from tests.support.models import SENTENCES, make_encoder
from tests.support.slow import slow_but

RULES = Chunking(
    max_tokens=30,
    overlap_tokens=0,
    boundary="sentence",
    language="en",
    titles="first",
    keep_text=False,
    rules=splitting_rules(late=True),
    late=True,
)
KINDS = ("bert", "xlm-roberta")


@pytest.fixture(scope="module")
def passages() -> list[tuple[str, str]]:
    """Titles and texts: one chunk, several, several windows, and odd ones."""
    rng = random.Random(7)
    long = [" ".join(rng.choices(SENTENCES, k=k)) for k in (1, 4, 9, 30)]
    return [
        *zip(["", "A title", "", "Of a long one"], long, strict=True),
        ("only a title", ""),
        ("", "狐狸和狗。" * 40),
        ("", "one two\n\n\n" * 30),
        ("t" * 300, "fox 🦊 dog e\u0301. " * 25),
    ]


def chunked(spec: ModelSpec, passages: Sequence[tuple[str, str]], rules: Chunking = RULES) -> Chunks:
    titles, texts = zip(*passages, strict=True)
    return Chunker(text_feeder(spec), rules).cut(titles, texts)


def encoded(spec: ModelSpec, tokens: PackedTokens, *, packed: bool, budget: int) -> np.ndarray:
    model = load(spec, packed=packed)
    result = model.empty_result(tokens.n_results)
    model.run(tokens, model.cut(tokens, budget), result)
    assert not result.faults
    return vectors(result)


def by_transformers(folder: Path, names: Sequence[str]) -> np.ndarray:
    """Run each window alone, and take the mean of the states of each span of characters."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    made = []
    for name in names:
        window, _, place = name.rpartition("\0")
        first, last = map(int, place.split(","))
        inputs = tokenizer(
            window, return_offsets_mapping=True, return_special_tokens_mask=True, return_tensors="pt"
        )
        places, special = inputs.pop("offset_mapping")[0], inputs.pop("special_tokens_mask")[0]
        with torch.no_grad():
            states = model(**inputs).last_hidden_state[0]
        own = [
            state
            for state, (a, b), is_special in zip(states, places.tolist(), special.tolist(), strict=True)
            if not is_special and a < b and max(a, first) < min(b, last)
        ]
        vector = torch.stack(own).mean(0)
        made.append((vector / vector.norm()).numpy())
    return np.stack(made)


@pytest.mark.parametrize(
    ("overlap", "kind"), slow_but([(0, "bert"), (12, "xlm-roberta")], itertools.product([0, 12], KINDS))
)
def test_vectors_are_those_of_transformers(
    encoder_folder: MakeModel, passages: list[tuple[str, str]], kind: str, overlap: int
) -> None:
    folder = encoder_folder(kind, "mean")
    spec = resolve(folder, passage_instruction="passage: ")
    chunks = chunked(spec, passages, dataclasses.replace(RULES, overlap_tokens=overlap))
    expected = by_transformers(folder, chunks.read)
    assert chunks.tokens.n_results == len(chunks.read) > len(chunks.tokens) > len(passages)
    for packed, budget in itertools.product((True, False), (1, 512)):
        ours = encoded(spec, chunks.tokens, packed=packed, budget=budget)
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0, err_msg=f"{packed} {budget}")


@pytest.mark.parametrize("titles", ["first", "every"])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_hold_chunks_of_one_text_in_order_and_as_many_as_fit(
    encoder_folder: MakeModel, passages: list[tuple[str, str]], kind: str, titles: str
) -> None:
    spec = resolve(encoder_folder(kind, "mean"), passage_instruction="passage: ")
    rules = dataclasses.replace(RULES, titles=titles)
    chunks, alone = (
        chunked(spec, passages, rules),
        chunked(spec, passages, dataclasses.replace(rules, late=False)),
    )
    for name in ("texts", "numbers", "spans"):
        assert getattr(chunks, name).tolist() == getattr(alone, name).tolist(), "borders are the same"
    assert chunks.tokens.lengths.max() <= spec.max_length
    assert chunks.tokens.result_truncated.tolist() == alone.tokens.truncated.tolist()
    windows = [name.rpartition("\0") for name in chunks.read]
    rows = chunks.tokens.spans.rows
    assert (np.diff(rows) >= 0).all() and set(rows) == set(range(len(chunks.tokens)))
    feeder = text_feeder(spec)
    around = len(next(feeder.uncut(["passage: "])))
    for row in range(len(chunks.tokens)):
        own = np.flatnonzero(rows == row)
        texts = {windows[n][0] for n in own}
        assert len(texts) == 1 and len(set(chunks.texts[own])) == 1
        [window] = texts
        title, body = passages[chunks.texts[own[0]]]
        for n in own:
            first, last = map(int, windows[n][2].split(","))
            a, b = chunks.spans[n]
            assert window[first:last] == (body[a:b] or window)
        assert window.endswith(body[chunks.spans[own[0]][0] : chunks.spans[own[-1]][1]])
        has_title = titles == "every" or chunks.numbers[own[0]] == 0
        assert window.startswith(f"passage: {title[:5]}" if has_title else "passage: ")

    def too_long(group: list[int]) -> bool:
        body = passages[chunks.texts[group[0]]][1]
        begin = int(np.flatnonzero(chunks.texts == chunks.texts[group[0]])[0])
        start, stop = chunks.spans[begin]
        title = alone.read[begin].removeprefix("passage: ").removesuffix(body[start:stop]).strip()
        named = title if titles == "every" or group[0] == begin else ""
        text = f"{named} {body[chunks.spans[group[0]][0] : chunks.spans[group[-1]][1]]}".strip()
        return len(next(feeder.uncut([f"passage: {text}"]))) > spec.max_length

    def halved(group: list[int]) -> list[list[int]]:
        if len(group) == 1 or not too_long(group):
            return [group]
        return [*halved(group[: len(group) // 2]), *halved(group[len(group) // 2 :])]

    groups: list[list[int]] = []
    own_tokens = (alone.tokens.lengths - around).tolist()
    for n, more in enumerate(own_tokens):
        same = bool(groups) and chunks.texts[groups[-1][0]] == chunks.texts[n]
        if same and around + sum(own_tokens[k] for k in groups[-1]) + more <= spec.max_length:
            groups[-1].append(n)
        else:
            groups.append([n])
    expected = [part for group in groups for part in halved(group)]
    assert [np.flatnonzero(rows == row).tolist() for row in range(len(chunks.tokens))] == expected


def test_some_chunks_of_a_window_are_as_they_are_among_all(
    encoder_folder: MakeModel, passages: list[tuple[str, str]]
) -> None:
    spec = resolve(encoder_folder("bert", "mean"))
    tokens = chunked(spec, passages).tokens
    every = encoded(spec, tokens, packed=True, budget=256)
    some = np.sort(np.random.default_rng(2).choice(tokens.n_results, 11, replace=False)).astype(np.int64)
    few = tokens.take_results(some)
    assert len(few) == len(set(tokens.spans.rows[some]))
    np.testing.assert_allclose(encoded(spec, few, packed=True, budget=256), every[some], atol=1e-6)


def test_the_name_of_a_chunk_says_its_context(encoder_folder: MakeModel) -> None:
    spec = resolve(encoder_folder("bert", "mean"))
    body = " ".join(SENTENCES[:6])
    other = body.replace(SENTENCES[0], SENTENCES[7])
    one, two, three = (chunked(spec, [("", text)]).read for text in (body, other, body))
    assert one == three and not set(one) & set(two)
    assert len(set(one)) == len(one)


def test_a_window_that_is_not_finite_is_told_for_each_of_its_chunks(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", pooling="mean", positions=128)
    spec = resolve(folder)
    tokens = chunked(spec, [("", " ".join(SENTENCES[:6])), ("", SENTENCES[0])]).tokens
    model = load(spec, packed=False)
    ids = tokens.input_ids.copy()
    bad = int(ids[5])
    with torch.no_grad():
        model._model.get_input_embeddings().weight[bad] = float("nan")
    result = model.empty_result(tokens.n_results)
    model.run(tokens, model.cut(tokens, 512), result)
    struck = [row for row in range(len(tokens)) if bad in ids[tokens.offsets[row] : tokens.offsets[row + 1]]]
    assert set(result.faults) == set(tokens.results_of(np.asarray(struck)).tolist())
    assert {reason for reason, _ in result.faults.values()} == {"non_finite"}
