"""LLM rerankers against FlagEmbedding: token ids one by one, scores of every kind and setting within 1e-4.

What FlagEmbedding says is in tests/goldens, made by the script there.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config

from bge_ray.errors import ModelError, SettingsError
from bge_ray.model.families.llm_reranker import HALVES
from bge_ray.model.feed.prompts import PREDICT, YES_OR_NO, prompt_template
from bge_ray.model.feed.texts import load_tokenizer
from bge_ray.model.run.layers import LayerByLayer, Merging, PackedRows, PaddedRows, load_layer_heads
from bge_ray.model.run.load import Loading, load_decoder
from bge_ray.model.run.packed import equal_runs
from bge_ray.model.run.result import Result
from bge_ray.model.spec import pair_feeder, resolve_reranker
from bge_ray.records.model import SCORE, RerankerSpec, as_reranker
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import RerankSettings, parse_settings
from tests.goldens.llm_rerankers_cases import COMPRESSED, COMPRESSIONS, CUTS
from tests.model.conftest import load, run
from tests.support.llm_rerankers import GOLDENS, PAIRS, make_llm_reranker, write_tokenizer
from tests.support.varlen import attend_by_reference

pytestmark = pytest.mark.long

KINDS = ("gemma", "minicpm", "gemma2")
BUDGETS = (300, 2000, 1)
NAMES = {"gemma": "bge-reranker-v2-gemma", "minicpm": "layerwise", "gemma2": "lightweight"}
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def goldens() -> dict[str, Any]:
    return json.loads((GOLDENS / "llm_rerankers.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Kind to the folder of a tiny reranker."""
    root = tmp_path_factory.mktemp("llm-rerankers")
    made = {kind: make_llm_reranker(root / NAMES[kind], kind) for kind in KINDS}
    return made.__getitem__


def resolve(folder: Path, **changes: Any) -> RerankerSpec:
    settings = RerankSettings(model=str(folder), **{"max_length": 64, **changes})
    return as_reranker(resolve_reranker(settings, on_gpu=False))


def pairs_of(spec: RerankerSpec, pairs: list[tuple[str, str]] = PAIRS) -> PackedTokens:
    return pair_feeder(spec).pairs([q for q, _ in pairs], [p for _, p in pairs])


def score(folder: Path, **changes: Any) -> Result:
    """Score all pairs, in batches of several sizes and each alone, which all say the same."""
    spec = resolve(folder, **changes)
    model, tokens = load(spec), pairs_of(spec)
    results = [run(model, tokens, budget) for budget in BUDGETS]
    for result in results:
        assert not result.faults
        np.testing.assert_allclose(columns(result), columns(results[0]), atol=5e-5, rtol=0)
    return results[-1]


def columns(result: Result) -> list[list[float]]:
    """Return the scores of each layer, ascending, or the one score."""
    layers = [o.name for o in result.outputs if o.name != SCORE]
    return [result.array(name).tolist() for name in layers or [SCORE]]


def rows_of(tokens: PackedTokens) -> list[list[int]]:
    return [row.tolist() for row in np.split(tokens.input_ids, tokens.offsets[1:-1])]


def reweighed(folder: Path, target: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """Copy a folder with other weights."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def reconfigured(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("place", "known"),
    [
        ("me/BGE-Reranker-v2-Gemma", True),
        ("bge-reranker-v2-gemma/checkpoint-500", True),
        ("models--BAAI--bge-reranker-v2-gemma/snapshots/a5beb1e3e68b9ab74eb54cfd186867f64f240e1a", True),
        ("bge-reranker-v2-gemma/another", False),
        ("bge-multilingual-gemma2", False),
    ],
)
def test_the_prompt_of_a_card_goes_with_its_name(
    folders: Folders, tmp_path: Path, place: str, known: bool
) -> None:
    folder = Path(shutil.copytree(folders("gemma"), tmp_path / place))
    if known:
        assert resolve(folder).prompt == YES_OR_NO
        return
    with pytest.raises(ModelError, match=r"set rerank\.prompt"):
        resolve(folder)


INSTRUCTED = {"query_instruction": "query: ", "passage_instruction": "passage: "}


@pytest.mark.parametrize(
    ("kind", "golden", "case", "changes"),
    [
        ("gemma", "gemma", "64", {}),
        ("gemma", "gemma", "100, query 20", {"max_length": 100, "query_max_length": 20}),
        ("gemma", "gemma", "prompt", {"prompt": PREDICT}),
        ("gemma", "gemma", "instructions", INSTRUCTED),
        ("minicpm", "minicpm", "64", {}),
        ("gemma2", "gemma2 sdpa", "64", {}),
        ("gemma2", "gemma2 sdpa", "64", {"compress_ratio": 2, "compress_layers": (2,)}),
    ],
)
def test_token_ids_are_flag_embeddings(
    folders: Folders, goldens: dict[str, Any], kind: str, golden: str, case: str, changes: dict[str, Any]
) -> None:
    tokens = pairs_of(resolve(folders(kind), **changes))
    assert rows_of(tokens) == goldens[golden]["ids"][case]
    assert tokens.truncated.any()
    assert not tokens.truncated.all()
    assert (tokens.type_starts is not None) == ("compress_ratio" in changes)


def test_the_yes_row_scores_as_flag_llm_reranker(folders: Folders, goldens: dict[str, Any]) -> None:
    for case, changes in (("64", {}), ("100, query 20", {"max_length": 100, "query_max_length": 20})):
        ours = score(folders("gemma"), **changes).array(SCORE)
        np.testing.assert_allclose(ours, goldens["gemma"]["scores"][case], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CUTS)
def test_layers_score_as_layer_wise_flag_llm_reranker(
    folders: Folders, goldens: dict[str, Any], case: str
) -> None:
    result = score(folders("minicpm"), cutoff_layers=CUTS[case])
    theirs = np.atleast_2d(goldens["minicpm"]["scores"][case])
    np.testing.assert_allclose(columns(result), theirs, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(result.array(SCORE), columns(result)[-1])


@pytest.mark.parametrize("case", CUTS)
def test_a_lightweight_reranker_scores_as_flag_embeddings(
    folders: Folders, goldens: dict[str, Any], case: str
) -> None:
    result = score(folders("gemma2"), cutoff_layers=CUTS[case])
    theirs = np.atleast_2d(goldens["gemma2 sdpa"]["scores"][case])
    np.testing.assert_allclose(columns(result), theirs, atol=1e-4, rtol=0)
    assert goldens["gemma2 default"] == "sdpa", "FlagEmbedding's own choice of attention"


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("case", COMPRESSED)
def test_merged_passages_score_as_flag_embeddings(
    folders: Folders, goldens: dict[str, Any], case: str, compression: str
) -> None:
    ratio, layers = COMPRESSIONS[compression]
    theirs = np.atleast_2d(goldens["gemma2 sdpa"]["scores"][f"{case} {compression}"])
    # What FlagEmbedding passes by in silence is refused here: layer 0, layers that are not run, a ratio of 1.
    merging = [layer for layer in layers if 0 < layer < CUTS[case][-1] and ratio > 1]
    changes = {"compress_ratio": ratio, "compress_layers": merging} if merging else {}
    result = score(folders("gemma2"), cutoff_layers=CUTS[case], **changes)
    np.testing.assert_allclose(columns(result), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["3,4,5", "3,4,5 4@2,3"])
def test_with_a_cap_on_its_attention_it_scores_as_flag_embeddings_in_eager_mode(
    folders: Folders, goldens: dict[str, Any], case: str
) -> None:
    """The other side of decision 23: what the cap is worth is known, and the loop is right with it, too."""
    cut, _, compression = case.partition(" ")
    ratio, layers = COMPRESSIONS.get(compression, (1, []))
    asked = {"compress_ratio": ratio, "compress_layers": layers} if layers else {}
    spec, folder = resolve(folders("gemma2"), cutoff_layers=CUTS[cut], **asked), folders("gemma2")
    raw = json.loads((folder / "config.json").read_text())
    own = {"model_type", "architectures", "auto_map", "torch_dtype", "num_hidden_layers"}
    config = Gemma2Config(**{k: v for k, v in raw.items() if k not in own}, num_hidden_layers=spec.layers[-1])
    assert config.attn_logit_softcapping == 2.0
    decoder = load_decoder(folder, config, Loading(torch.float32, "eager"))
    tokens = pairs_of(spec)
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    template = prompt_template(tokenizer, PREDICT, folder, beginning="always")
    merging = Merging(spec.compress_layers, ratio, len(template.tail)) if layers else None
    model = LayerByLayer(decoder, spec.layers, merging)
    heads = load_layer_heads(spec, folder, config.hidden_size, 30.0)
    found = []
    for row, ids in enumerate(rows_of(tokens)):
        types = None
        if tokens.type_starts is not None:
            types = torch.arange(len(ids))[None].ge(int(tokens.type_starts[row])).long()
        with torch.inference_mode():
            hidden = model(torch.tensor([ids]), None, types)
            found.append([float(head(hidden, None)) for head in heads[1:]])
    theirs = goldens["gemma2 eager"]["scores"][case]
    np.testing.assert_allclose(np.transpose(found), theirs, atol=1e-4, rtol=0)
    assert np.abs(np.subtract(theirs, goldens["gemma2 sdpa"]["scores"][case])).max() > 1


def test_heads_by_layer_are_those_by_position_in_another_order(folders: Folders, tmp_path: Path) -> None:
    """`[3, 5]` by layer reads heads 1 and 3 of a model that scores from layer 2 on, by position 0 and 1."""

    def swap(weights: dict[str, np.ndarray]) -> None:
        heads = [weights[f"lm_head.{i}.linear_head.weight"] for i in range(5)]
        for place, number in enumerate((1, 3, 0, 2, 4)):
            weights[f"lm_head.{place}.linear_head.weight"] = heads[number]

    swapped = reweighed(folders("gemma2"), tmp_path / "swapped", swap)
    by_layer = columns(score(folders("gemma2"), cutoff_layers=[3, 5], head_choice="layer"))
    by_position = columns(score(swapped, cutoff_layers=[3, 5]))
    np.testing.assert_allclose(by_layer, by_position, atol=1e-6, rtol=0)
    here = columns(score(folders("gemma2"), cutoff_layers=[3, 5]))
    assert np.abs(np.subtract(by_layer, here)).max() > 1
    spec = resolve(folders("gemma2"), cutoff_layers=[3, 5])
    assert spec.heads == (0, 1)
    assert resolve(folders("gemma2"), cutoff_layers=[3, 5], head_choice="layer").heads == (1, 3)


@pytest.mark.parametrize("kind", ["minicpm", "gemma2"])
def test_layers_beyond_the_last_that_scores_are_not_even_read(
    folders: Folders, tmp_path: Path, kind: str
) -> None:
    def cut(weights: dict[str, np.ndarray]) -> None:
        for name in [n for n in weights if n.startswith(("model.layers.4.", "model.layers.5."))]:
            del weights[name]

    short = reweighed(folders(kind), tmp_path / "short", cut)
    ours = score(short, cutoff_layers=[3, 4])
    np.testing.assert_array_equal(columns(ours), columns(score(folders(kind), cutoff_layers=[3, 4])))
    with pytest.raises(ModelError, match="would be random, such as"):
        score(short, cutoff_layers=[5])


@pytest.mark.parametrize("kind", HALVES)
def test_a_row_of_the_head_gives_what_the_whole_head_gives(tmp_path: Path, kind: str) -> None:
    """Each type of language model against transformers' own, packed and padded, its head tied or not."""
    for tied in (True, False):
        folder = tmp_path / f"{kind}-{tied}"
        folder.mkdir()
        write_tokenizer(folder, "gemma")
        torch.manual_seed(3)
        sizes = {"vocab_size": 540, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
        extra = {"head_dim": 8} if kind in ("gemma", "gemma2", "qwen3") else {}
        config = AutoConfig.for_model(kind, **sizes, **extra, tie_word_embeddings=tied, pad_token_id=0)
        whole = AutoModelForCausalLM.from_config(config).eval()
        whole.save_pretrained(folder)
        result = score(folder, prompt=PREDICT)
        spec = resolve(folder, prompt=PREDICT)
        answer = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["Yes"]
        with torch.inference_mode():
            theirs = [
                float(whole(torch.tensor([ids])).logits[0, -1, answer]) for ids in rows_of(pairs_of(spec))
            ]
        np.testing.assert_allclose(result.array(SCORE), theirs, atol=1e-4, rtol=0)
        padded = run(load(spec, packed=False), pairs_of(spec), 2000)
        np.testing.assert_allclose(padded.array(SCORE), theirs, atol=1e-4, rtol=0)
        assert np.ptp(theirs) > 0.1


def test_states_are_merged_as_by_hand() -> None:
    """Padded, and packed end to end."""
    rng = np.random.default_rng(0)
    for ratio in (2, 3, 4, 8):
        starts = rng.integers(0, 5, 9)
        passages = rng.integers(0, 20, 9)
        n_tail = int(rng.integers(1, 4))
        lengths = starts + passages + n_tail
        hidden = torch.from_numpy(rng.normal(size=(9, int(lengths.max()), 3)).astype(np.float32))
        there = torch.arange(hidden.shape[1]) < torch.from_numpy(lengths)[:, None]
        hidden[~there] = torch.nan  # padding must not reach a row
        merging = Merging((1,), ratio, n_tail)
        out, padded = PaddedRows(there, torch.from_numpy(starts)).merged(hidden, merging)
        packed = PackedRows.of(
            position_ids=torch.arange(0),
            cu_seqlens=torch.arange(0),
            runs=equal_runs(lengths),
            max_seqlen=int(lengths.max()),
            passage_starts=starts,
        )
        flat, after = packed.merged(hidden[there][None], merging)
        at = 0
        for row in range(9):
            states = hidden[row, : lengths[row]]
            a, b = starts[row], starts[row] + passages[row]
            means = [states[i : min(i + ratio, b)].mean(0) for i in range(a, b, ratio)]
            by_hand = torch.stack([*states[:a], *means, *states[b:]])
            torch.testing.assert_close(out[row, padded.mask[row]], by_hand)
            assert padded.mask[row].sum() == after.lengths[row] == len(by_hand)
            assert after.cu_seqlens[row : row + 2].tolist() == [at, at + len(by_hand)]
            torch.testing.assert_close(flat[0, at : at + len(by_hand)], by_hand)
            assert after.positions[0, at : at + len(by_hand)].tolist() == list(range(len(by_hand)))
            at += len(by_hand)
        assert flat.shape == (1, at, 3)
        assert [length for rows, length in after.runs for _ in range(rows)] == after.lengths.tolist()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("minicpm", {"cutoff_layers": [2, 4, 5]}),
        ("minicpm", {}),
        ("gemma2", {"cutoff_layers": [3, 5]}),
        ("gemma2", {"cutoff_layers": [3, 5], "compress_ratio": 2, "compress_layers": [2, 4]}),
        ("gemma2", {"cutoff_layers": [5], "compress_ratio": 4, "compress_layers": [4]}),
    ],
)
def test_packed_layers_score_as_padded_ones(
    folders: Folders, kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer that scores, before and after states are merged, on the way of a GPU, too."""
    spec = resolve(folders(kind), **changes)
    tokens = pairs_of(spec)
    packed, padded = load(spec), load(spec, packed=False)
    assert packed._executor.packed, "the usual way on a CPU"
    assert not padded._executor.packed
    expected = columns(run(padded, tokens, 2000))
    for by_kernel in (False, True):
        if by_kernel:
            attend_by_reference(monkeypatch)
        for budget in BUDGETS:
            ours = run(packed, tokens, budget)
            assert not ours.faults
            np.testing.assert_allclose(columns(ours), expected, atol=5e-5, rtol=0)
    assert ours.padded_tokens == tokens.offsets[-1]
    assert run(packed, tokens, 2000).padded_tokens < run(padded, tokens, 2000).padded_tokens
    assert np.ptp(columns(ours)) > 0.1


@pytest.mark.parametrize("form", [pytest.param("pickled", marks=pytest.mark.slow), "shards"])
def test_heads_are_read_from_any_form_of_weights(folders: Folders, tmp_path: Path, form: str) -> None:
    folder = tmp_path / form
    shutil.copytree(folders("minicpm"), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if form == "pickled":
        torch.save({k: torch.from_numpy(v) for k, v in weights.items()}, folder / "pytorch_model.bin")
    else:
        parts = {f"model-{i}.safetensors": dict(list(weights.items())[i::3]) for i in range(3)}
        for name, part in parts.items():
            save_file(part, folder / name, metadata={"format": "pt"})
        listed = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(listed))
    ours = columns(score(folder, cutoff_layers=[2, 5]))
    assert ours == columns(score(folders("minicpm"), cutoff_layers=[2, 5]))


def test_a_model_is_one_copy_in_the_dtype_that_it_is_computed_in(folders: Folders) -> None:
    spec = resolve(folders("gemma2"), cutoff_layers=[3], dtype="bfloat16")
    model = load(spec)
    loaded = model._executor._loaded
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert not any("layers.3." in name or "lm_head" in name for name, _ in loaded.model.named_parameters())
    exact = score(folders("gemma2"), cutoff_layers=[3]).array(SCORE)
    half = run(model, pairs_of(spec)).array(SCORE)
    assert np.corrcoef(exact, half)[0, 1] > 0.99


def test_a_gemma_is_computed_in_bfloat16_on_a_gpu(folders: Folders) -> None:
    found = {}
    for kind in KINDS:
        settings = RerankSettings(model=str(folders(kind)))
        found[kind] = resolve_reranker(settings, on_gpu=True).dtype
    assert found == {"gemma": "bfloat16", "minicpm": "float16", "gemma2": "bfloat16"}


def test_a_warm_up_takes_a_model_that_merges(folders: Folders) -> None:
    spec = resolve(folders("gemma2"), compress_ratio=2, compress_layers=[2])
    load(spec).warm_up(256)


def test_what_is_no_reranker_or_not_whole_is_named(folders: Folders, tmp_path: Path) -> None:
    gemma, minicpm, gemma2 = map(folders, KINDS)

    def without(part: str) -> Callable[[dict[str, np.ndarray]], None]:
        def change(weights: dict[str, np.ndarray]) -> None:
            for name in [n for n in weights if n.startswith(part)]:
                del weights[name]

        return change

    other = tmp_path / "other-model"
    shutil.copytree(gemma, other)
    mute = tmp_path / "mute" / NAMES["gemma"]
    shutil.copytree(gemma, mute)
    tokenizer = json.loads((mute / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [pair for pair in merges if "Yes" not in ("".join(pair), *pair)]
    (mute / "tokenizer.json").write_text(json.dumps(tokenizer))
    cases = [
        (other, {}, "set rerank.prompt to the one it was tuned with"),
        (mute, {}, "no token for 'Yes'"),
        (reconfigured(gemma, tmp_path / "bare", architectures=["GemmaModel"]), {}, "no classification head"),
        (reconfigured(gemma, tmp_path / "kind", model_type="gpt2"), {}, "language model of type gpt2"),
        (reconfigured(gemma, tmp_path / "map", auto_map={"AutoModel": "x.Y"}), {}, "Python code of its own"),
        (reconfigured(gemma, tmp_path / "untied", tie_word_embeddings=False), {}, "its head, lm_head.weight"),
        (reconfigured(minicpm, tmp_path / "raw", head_type="raw"), {}, "head_type is 'raw'"),
        (reconfigured(minicpm, tmp_path / "rope", rope_scaling={"type": "linear"}), {}, "rope_scaling is"),
        (reconfigured(minicpm, tmp_path / "start", start_layer="x"), {}, "start_layer is 'x'"),
        (reconfigured(gemma2, tmp_path / "one", layer_wise=False), {}, "layer_wise is not true"),
        (
            reweighed(minicpm, tmp_path / "headless", without("lm_head.4")),
            {},
            "such as lm_head.4.linear_head",
        ),
        (reweighed(gemma2, tmp_path / "hatless", without("lm_head.0")), {}, "such as lm_head.0.linear_head"),
        (minicpm, {"cutoff_layers": [1, 4]}, "scores after layers 2 to 6, not after 1"),
        (gemma2, {"cutoff_layers": [4, 7]}, "scores after layers 2 to 6, not after 7"),
        (minicpm, {"compress_ratio": 2}, "rerank.compress_ratio: .* is no lightweight reranker"),
        (gemma, {"cutoff_layers": [4]}, "rerank.cutoff_layers: .* with one score"),
        (gemma2, {"compress_ratio": 2}, "none of rerank.compress_layers"),
        (gemma2, {"compress_ratio": 2, "compress_layers": [4], "cutoff_layers": [4]}, "front of layer 4"),
        (gemma, {"query_max_length": 64}, "leaves no room for a passage"),
        (gemma, {"max_length": 5000}, "has positions for 4096 tokens"),
    ]
    for folder, changes, message in cases:
        with pytest.raises(ModelError, match=message):
            resolve(folder, **changes)

    def misshape(weights: dict[str, np.ndarray]) -> None:
        weights["lm_head.4.linear_head.weight"] = np.zeros((1, 8), np.float32)

    with pytest.raises(ModelError, match=r"lm_head\.4\.linear_head\.weight has the shape \(1, 8\)"):
        resolve(reweighed(minicpm, tmp_path / "misshaped", misshape))
    # Of a pickled file it is known only when that is read.
    with pytest.raises(ModelError, match=r"weight has 32 numbers, a state of the model 16"):
        load_layer_heads(resolve(minicpm), minicpm, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cutoff_layers=[6, 2]"], "cutoff_layers: must be different layers from 1 on, ascending"),
        (["cutoff_layers=[2, 2]"], "cutoff_layers: must be different layers"),
        (["cutoff_layers=[]"], "cutoff_layers: must be different layers"),
        (["compress_layers=[24]"], "compress_layers: do nothing while compress_ratio is 1"),
        (["compress_ratio=2", "compress_layers=[0, 24]"], "compress_layers: must be layers from 1 on"),
        (["compress_ratio=3"], "compress_ratio"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_settings(None, [f"rerank.{each}" for each in given])
    assert parse_settings(None, ["rerank.cutoff_layers=28"]).rerank.cutoff_layers == (28,)


def test_a_cross_encoder_takes_instructions_but_no_layers(reranker_folder: Callable[[str], Path]) -> None:
    folder = reranker_folder("bert")
    plain, said = resolve(folder), resolve(folder, query_instruction="a fox ", passage_instruction="the dog ")
    assert rows_of(pairs_of(said, [("jumps", "over")])) == rows_of(
        pairs_of(plain, [("a fox jumps", "the dog over")])
    )
    for changes in ({"cutoff_layers": [1]}, {"prompt": "?"}, {"compress_ratio": 2}, {"head_choice": "layer"}):
        with pytest.raises(ModelError, match="is a cross-encoder, which has none"):
            resolve(folder, **changes)
