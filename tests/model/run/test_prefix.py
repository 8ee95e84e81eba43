"""What rows begin with alike is computed once, and every row has the vector that it has alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from bge_ray.model.run.inputs import packed_inputs
from bge_ray.model.run.layers import LayerByLayer
from bge_ray.model.run.packed import Prefix, Reach, attend, attend_by_kernel, equal_runs
from bge_ray.model.run.prefix import LEAST_TOKENS, can_share, counted_lengths, shared_keys, shared_tokens
from bge_ray.model.spec import text_feeder
from bge_ray.records.tokens import PackedTokens
from tests.model.conftest import encode, load, resolve, run, vectors
from tests.model.run.test_decoders import KINDS, alone
from tests.support.models import make_decoder
from tests.support.slow import slow_but
from tests.support.varlen import attend_by_reference, register_reference

PROMPT = "Given a question about what foxes do on Sundays, retrieve passages that answer it. Question: " * 2


def tokens_of(rows: list[list[int]]) -> PackedTokens:
    return PackedTokens.of(rows, np.zeros(len(rows), np.bool_))


def prefix_of(shared: int, lengths: np.ndarray) -> Prefix:
    keys, queries_at, keys_at = (torch.from_numpy(array) for array in shared_keys(shared, lengths))
    longest = max(shared, int(lengths.max()))
    return Prefix(shared, longest, keys, queries_at.int(), keys_at.int())


@given(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_keys_are_those_in_front_and_a_rows_own(shared: int, lengths: list[int]) -> None:
    expected, queries_at, keys_at = list(range(shared)), [0, shared], [0, shared]
    for length in lengths:
        expected += [*range(shared), *range(queries_at[-1], queries_at[-1] + length)]
        queries_at.append(queries_at[-1] + length)
        keys_at.append(keys_at[-1] + shared + length)
    found = shared_keys(shared, np.array(lengths))
    for got, wanted in zip(found, (expected, queries_at, keys_at), strict=True):
        assert got.tolist() == wanted


@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("one_query", [True, False])
def test_attention_is_that_of_whole_rows(
    monkeypatch: pytest.MonkeyPatch, window: int | None, softcap: float | None, one_query: bool
) -> None:
    monkeypatch.setattr("bge_ray.model.run.packed.CAPPED_QUERIES", 3)
    register_reference()
    torch.manual_seed(1)
    shared, lengths, heads, key_heads, dim = 4, np.array([8, 8, 5, 1, 1]), 6, 2, 8
    total = shared + int(lengths.sum())
    q, k, v = torch.randn(total, heads, dim), *torch.randn(2, total, key_heads, dim)
    prefix = prefix_of(shared, lengths)
    # Whole rows, of which each begins with what is shared; the last queries of each are its own.
    places, own = prefix.keys[shared:], prefix.keys[shared:] >= shared
    whole = lengths + shared
    borders = torch.from_numpy(np.concatenate([[0], np.cumsum(whole)])).int()
    reach = Reach(causal=True, window=window, softcap=softcap)
    common = {"scaling": 0.9, "reach": reach}
    expected = attend(
        q[places],
        k[places],
        v[places],
        cu_seqlens=borders,
        runs=equal_runs(whole),
        max_seqlen=int(whole.max()),
        **common,
    )
    expected = expected[borders[1:].long() - 1] if one_query else expected[own]
    behind = prefix.queries_at[1:]
    asked = q[behind[1:].long() - 1] if one_query else q
    got = attend(
        asked,
        k,
        v,
        cu_seqlens=behind,
        runs=equal_runs(lengths),
        max_seqlen=int(whole.max()),
        one_query=one_query,
        prefix=prefix,
        **common,
    )
    torch.testing.assert_close(got if one_query else got[shared:], expected, atol=1e-6, rtol=1e-5)
    if softcap is None:
        got = attend_by_kernel(asked, k, v, behind, int(whole.max()), 0.9, reach, prefix)
        torch.testing.assert_close(got if one_query else got[shared:], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize(
    "kind",
    slow_but(["qwen2-windows", "gemma2"], ["mistral", "qwen2-windows", "qwen3", "gemma2", "gemma2-uncapped"]),
)
def test_vectors_are_those_of_transformers(
    tmp_path: Path, texts: list[str], kind: str, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, changes = KINDS[kind]
    if by_kernel and model_type == "gemma2" and not changes:
        pytest.skip("the kernel has no soft-cap")
    folder = make_decoder(tmp_path / kind, model_type, **changes)
    asked = [PROMPT + text for text in texts]
    expected = alone(folder, asked)
    if by_kernel:
        attend_by_reference(monkeypatch)
    for budget in (1, 300, 100_000):
        got = encode(folder, asked, packed=True, budget=budget)
        assert not got.faults
        np.testing.assert_allclose(vectors(got), expected, atol=1e-5, rtol=0)


def test_it_goes_through_the_model_once_a_batch(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_decoder(tmp_path / "qwen3", "qwen3")
    spec = resolve(folder)
    model, tokens = load(spec, packed=True), text_feeder(spec).passages([PROMPT + text for text in texts])
    seen: list[tuple[int, int]] = []

    def counting(source: PackedTokens, rows: np.ndarray, *others: object) -> object:
        made = packed_inputs(source, rows, *others)
        seen.append((int(source.lengths_of(rows).sum()), made.arguments["input_ids"].shape[1]))
        return made

    monkeypatch.setattr("bge_ray.model.run.executor.packed_inputs", counting)
    run(model, tokens, budget=100_000)
    (given_tokens, run_through) = seen[0]
    shared = shared_tokens(tokens)
    assert len(seen) == 1 and shared >= LEAST_TOKENS
    assert run_through == given_tokens - shared * (len(tokens) - 1)


@given(
    st.integers(0, 40),
    st.lists(st.lists(st.integers(0, 2), min_size=0, max_size=6), min_size=1, max_size=8),
)
@settings(max_examples=200)
def test_what_is_shared_is_counted(alike: int, ends: list[list[int]]) -> None:
    rows = [[7] * alike + end for end in ends]
    found = shared_tokens(tokens_of(rows))
    some = [row for row in rows if row]
    most = 0
    while len(some) > 1 and most < min(map(len, some)) - 1 and len({row[most] for row in some}) == 1:
        most += 1
    assert found == (most if most >= LEAST_TOKENS else 0)


def test_batches_hold_as_many_rows_as_their_own_tokens_allow(tmp_path: Path) -> None:
    model = load(resolve(make_decoder(tmp_path / "qwen3", "qwen3")), packed=True)
    rows = [[*range(10, 90), 100 + n % 7] * 1 for n in range(200)]
    batches = model.cut(tokens_of(rows), 100)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    # A token of its own and five for the 80 that it shares, in the 20 that these leave.
    assert counted_lengths(np.array([81], np.int32), 80).tolist() == [6]
    assert {len(rows) for rows in batches} == {3, 2}
    alone = model.cut(tokens_of([[n, *range(10, 90)] for n in range(200)]), 162)
    assert {len(rows) for rows in alone} == {2}


def test_rows_share_only_where_no_more_than_their_end_is_wanted(tmp_path: Path, texts: list[str]) -> None:
    folder = make_decoder(tmp_path / "qwen2", "qwen2")
    both_ways = make_decoder(tmp_path / "both", "qwen2", is_causal=False)
    named_otherwise = make_decoder(tmp_path / "gemma", "gemma", use_bidirectional_attention=True)
    for path, pooling, expected in (
        (folder, "last_token", True),
        (folder, "mean", False),
        (both_ways, "last_token", False),
        (named_otherwise, "last_token", False),
    ):
        model = load(resolve(path, pooling=pooling), packed=True)
        assert model._executor.shares is expected
        asked = [PROMPT + text for text in texts[:20]]
        packed, padded = (encode(path, asked, packed=how, pooling=pooling) for how in (True, False))
        np.testing.assert_allclose(vectors(packed), vectors(padded), atol=1e-5, rtol=0)
    decoder = AutoModel.from_pretrained(folder)
    assert can_share(decoder, {"last_token"})
    assert not can_share(LayerByLayer(decoder, [2]), {"last_token"}), "it may merge what is shared"
