"""Scores equal FlagReranker's; pairs are cut and joined as it cuts and joins them."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from bge_ray.errors import ModelError
from bge_ray.model.feed.pairs import tokenizer_pairs
from bge_ray.model.run.load import Loading, load_cross_encoder
from bge_ray.model.run.result import Result
from bge_ray.model.spec import pair_feeder, resolve_reranker
from bge_ray.records.model import SCORE, ModelSpec
from bge_ray.settings.sections import RerankSettings
from tests.model.conftest import MakeModel, load, run
from tests.support.models import SENTENCES, make_decoder
from tests.support.slow import slow_but

pytestmark = pytest.mark.long

RerankerFolder = Callable[[str], Path]
KINDS = pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Short, long and overlong pairs of whole words of the tiny vocabularies, several to a query."""
    rng = random.Random(9)
    words = f"{SENTENCES[0]} {SENTENCES[1]}".split()

    def text(n: int) -> str:
        return " ".join(rng.choices(words, k=n))

    queries = [text(n) for n in (1, 4, 12, 90, 97, 300)] + [SENTENCES[4]]
    return [(query, text(n)) for query in queries for n in (1, 3, 20, 60, 120, 126, 400)]


def resolve(folder: Path, *, on_gpu: bool = False, **changes: object) -> ModelSpec:
    return resolve_reranker(RerankSettings(model=str(folder), **changes), on_gpu=on_gpu)


def scores(result: Result) -> np.ndarray:
    return result.array(SCORE)


def score(
    folder: Path,
    pairs: list[tuple[str, str]],
    *,
    budget: int = 600,
    packed: bool | None = None,
    **changes: object,
) -> Result:
    spec = resolve(folder, **changes)
    rows = pair_feeder(spec).pairs([q for q, _ in pairs], [p for _, p in pairs])
    return run(load(spec, packed=packed), rows, budget)


@pytest.mark.parity
@pytest.mark.parametrize("max_length", slow_but([128], [24, 128]))
@KINDS
def test_scores_equal_flag_reranker(
    reranker_folder: RerankerFolder, pairs: list[tuple[str, str]], kind: str, max_length: int
) -> None:
    from FlagEmbedding import FlagReranker

    folder = reranker_folder(kind)
    theirs = FlagReranker(str(folder), use_fp16=False, devices="cpu", max_length=max_length).compute_score(
        pairs
    )
    for packed in (False, True):
        ours = score(folder, pairs, max_length=max_length, packed=packed)
        assert not ours.faults
        np.testing.assert_allclose(scores(ours), theirs, atol=1e-4, rtol=0)
        assert (
            np.argsort(-scores(ours), kind="stable").tolist()
            == np.argsort(-np.array(theirs), kind="stable").tolist()
        )
    assert np.ptp(scores(ours)) > 0.1, "the scores do not tell pairs apart"


@pytest.mark.parity
def test_a_default_prompt_stands_before_queries(
    reranker_folder: RerankerFolder, pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    from sentence_transformers import CrossEncoder

    prompts = {"prompts": {"ask": "Which fox? "}, "default_prompt_name": "ask"}
    model = CrossEncoder(str(reranker_folder("bert")), device="cpu", max_length=128, **prompts)
    model.save_pretrained(str(tmp_path / "saved"))
    pairs = pairs[:12]
    theirs = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    ours = score(tmp_path / "saved", pairs, max_length=128)
    np.testing.assert_allclose(scores(ours), theirs, atol=1e-4, rtol=0)
    without = score(tmp_path / "saved", pairs, max_length=128, query_instruction="")
    assert np.abs(scores(without) - theirs).max() > 1e-3


@pytest.mark.parametrize("max_length", slow_but([24], [24, 60]))
@KINDS
def test_pairs_against_transformers(
    reranker_folder: RerankerFolder, pairs: list[tuple[str, str]], kind: str, max_length: int
) -> None:
    """The backend joins two encodings itself, which is the template in its own hands, row by row."""
    folder = reranker_folder(kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    odd = [
        ("", ""),
        ("fox", ""),
        ("", "the fox"),
        ("为这个句子生成" * 9, "é ü [SEP] </s> zq zq" * 9),
        ("fo" * 70, "fox"),
    ]
    rows = tokenizer_pairs(folder, max_length).pairs(*map(list, zip(*pairs, *odd, strict=True)))
    for row, (query, passage) in enumerate([*pairs, *odd]):
        backend.no_truncation()
        q_all = backend.encode(query, add_special_tokens=False)
        p_all = backend.encode(passage, add_special_tokens=False)
        q, p = (
            backend.encode(query, add_special_tokens=False),
            backend.encode(passage, add_special_tokens=False),
        )
        q.truncate(max_length * 3 // 4)
        backend.enable_truncation(max_length, strategy="only_second")
        joined = backend.post_process(q, p)
        a, b = rows.offsets[row : row + 2]
        assert rows.input_ids[a:b].tolist() == joined.ids
        if kind == "bert":
            starts = rows.type_starts[row]
            assert [int(i >= starts) for i in range(b - a)] == joined.type_ids
        specials = tokenizer.num_special_tokens_to_add(pair=True)
        assert rows.truncated[row] == (len(q_all.ids) + len(p_all.ids) + specials > b - a)
    assert (rows.type_starts is None) == (kind == "xlm-roberta")
    assert rows.truncated.any() and not rows.truncated.all()
    assert rows.lengths.max() == max_length


@KINDS
def test_batching_does_not_change_scores(
    reranker_folder: RerankerFolder, pairs: list[tuple[str, str]], kind: str
) -> None:
    folder = reranker_folder(kind)
    alone = score(folder, pairs, budget=1)
    assert alone.batches == len(pairs)
    np.testing.assert_allclose(scores(score(folder, pairs, budget=5000)), scores(alone), atol=1e-5, rtol=0)
    shuffled = list(np.random.default_rng(0).permutation(len(pairs)))
    again = scores(score(folder, [pairs[i] for i in shuffled]))
    np.testing.assert_allclose(again, scores(alone)[shuffled], atol=1e-5, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma2"])
def test_a_decoder_with_a_head_scores_as_cross_encoder(tmp_path: Path, kind: str) -> None:
    from sentence_transformers import CrossEncoder

    bare = make_decoder(tmp_path / "bare", kind)
    config = AutoConfig.from_pretrained(bare, num_labels=1)
    torch.manual_seed(2)
    whole = AutoModelForSequenceClassification.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(bare).save_pretrained(tmp_path / "whole")
    short = [(query, text) for query in ("a fox", "ray runs", SENTENCES[4]) for text in SENTENCES]
    theirs = CrossEncoder(str(tmp_path / "whole"), device="cpu").predict(
        short, activation_fn=torch.nn.Identity(), show_progress_bar=False
    )
    for budget in (1, 200, 100_000):
        ours = score(tmp_path / "whole", short, budget=budget)
        assert not ours.faults
        np.testing.assert_allclose(scores(ours), theirs, atol=1e-4, rtol=0)
    assert np.ptp(theirs) > 0.1


def test_no_pairs(reranker_folder: RerankerFolder) -> None:
    result = score(reranker_folder("bert"), [])
    assert scores(result).shape == (0,) and not result.faults
    with pytest.raises(ValueError, match="no pairs"):
        tokenizer_pairs(reranker_folder("bert"), 64).pairs(["a"], [])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close(
    reranker_folder: RerankerFolder, pairs: list[tuple[str, str]], dtype: str, packed: bool
) -> None:
    folder = reranker_folder("bert")
    exact = scores(score(folder, pairs))
    half = score(folder, pairs, dtype=dtype, packed=packed)
    assert not half.faults
    assert np.corrcoef(scores(half), exact)[0, 1] > 0.998


def test_nan_is_a_fault_of_its_pair_only(reranker_folder: RerankerFolder, tmp_path: Path) -> None:
    clean = reranker_folder("bert")
    folder = Path(shutil.copytree(clean, tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    token = AutoTokenizer.from_pretrained(folder)("lazy", add_special_tokens=False)["input_ids"]
    weights["bert.embeddings.word_embeddings.weight"][token[0]] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    pairs = [("fox", "brown"), ("lazy", "brown"), ("fox", "lazy dog"), ("ray", "actors")]
    result = score(folder, pairs, dtype="float16")
    assert {row: reason for row, (reason, _) in result.faults.items()} == {1: "non_finite", 2: "non_finite"}
    whole = score(clean, pairs, dtype="float16")
    np.testing.assert_allclose(scores(result)[[0, 3]], scores(whole)[[0, 3]], atol=2e-2)


def test_folders_that_are_no_rerankers(
    reranker_folder: RerankerFolder, encoder_folder: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"rerank\.model .*no classification head; it is an encoder"):
        resolve(encoder_folder("bert", "cls"))
    for kind, head in (("bert", "classifier.weight"), ("xlm-roberta", "classifier.dense.weight")):
        folder = Path(shutil.copytree(reranker_folder(kind), tmp_path / f"{kind}-headless"))
        weights = load_file(folder / "model.safetensors")
        kept = {k: v for k, v in weights.items() if not k.startswith("classifier")}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match="no classification head; it is an encoder"):
            resolve(folder)
        with pytest.raises(ModelError, match=r"would be random, such as classifier\."):
            load_cross_encoder(folder, Loading(torch.float32))
        assert head in weights
    for gone in ("bert.pooler.dense.weight", "classifier.bias"):
        folder = Path(shutil.copytree(reranker_folder("bert"), tmp_path / gone))
        weights = load_file(folder / "model.safetensors")
        del weights[gone]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"would be random, such as {gone.removeprefix('bert.')}"):
            resolve(folder)
        with pytest.raises(ModelError, match=f"would be random, such as {gone}"):
            load_cross_encoder(folder, Loading(torch.float32))
    folder = Path(shutil.copytree(reranker_folder("bert"), tmp_path / "two"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"rerank\.model .*has 2 outputs where a reranker has 1"):
        resolve(folder)
    with pytest.raises(ModelError, match="has 2 outputs where a reranker has 1"):
        load_cross_encoder(folder, Loading(torch.float32))


def test_code_over_a_known_reranker_is_refused(reranker_folder: RerankerFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reranker_folder("bert"), tmp_path / "coded"))
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json .*auto_map.*rerank\.trust_remote_code"):
        resolve(folder)
    assert resolve(folder, trust_remote_code=True).family == "cross_encoder"


def test_limits(reranker_folder: RerankerFolder, tmp_path: Path) -> None:
    folder = reranker_folder("bert")
    assert resolve(folder).max_length == 128
    assert resolve(folder, on_gpu=True).dtype == "float16"
    with pytest.raises(ModelError, match=r"rerank\.max_length 129: .*has positions for 128 tokens"):
        resolve(folder, max_length=129)
    with pytest.raises(ModelError, match="leaves no room for a passage"):
        tokenizer_pairs(folder, 12)
    tokenizer_pairs(folder, 13)


def test_template_of_another_kind_is_refused(reranker_folder: RerankerFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reranker_folder("bert"), tmp_path / "m"))
    content = json.loads((folder / "tokenizer.json").read_text())
    pair = content["post_processor"]["pair"]
    content["post_processor"]["pair"] = pair[:1] + pair[3:4] + pair[2:3] + pair[1:2] + pair[4:]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="joins pairs in a way that is not supported"):
        tokenizer_pairs(folder, 64)


@KINDS
def test_a_warm_up_runs_the_longest_pairs(reranker_folder: RerankerFolder, kind: str) -> None:
    load(resolve(reranker_folder(kind))).warm_up(1000)
