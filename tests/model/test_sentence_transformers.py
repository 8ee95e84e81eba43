"""Folders that sentence-transformers saved: vectors are those that the library itself makes of them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from bge_ray.errors import ModelError
from bge_ray.model.source import fetch_model, hash_model
from bge_ray.model.spec import text_feeder
from bge_ray.records.model import ModelSpec
from tests.model.conftest import MakeModel, encode, load, resolve, run, vectors

pytestmark = pytest.mark.parity

TEXTS = [
    "the quick brown fox",
    "a corpus in object storage becomes embeddings and an index " * 9,
    "a",
    "",
    "为这个句子生成表示以用于检索相关文章",
    "Faiss searches VECTORS, parquet stores columns",
]


def save(folder: Path, base: Path, *after: object, pooling: object = "mean", **options: object) -> Path:
    """Let the library put modules behind a transformer, and save them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    asked = {name: options.pop(name) for name in ("max_seq_length", "do_lower_case") if name in options}
    transformer = Transformer(str(base), **asked)
    pool = Pooling(32, pooling, include_prompt=bool(options.pop("include_prompt", True)))
    torch.manual_seed(1)
    modules = [transformer, pool, *(make() for make in after)]
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(folder))
    return folder


def theirs(folder: Path, texts: Sequence[str], side: str = "") -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    encode_texts = {"": model.encode, "query": model.encode_query, "document": model.encode_document}[side]
    return encode_texts(list(texts), show_progress_bar=False)


def dense(n_in: int, n_out: int, **options: object):
    from sentence_transformers.base.modules import Dense

    return lambda: Dense(n_in, n_out, **options)


def unit_norm():
    from sentence_transformers.base.modules import Normalize

    return Normalize()


def layer_norm():
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    made = LayerNorm(32)
    torch.nn.init.normal_(made.norm.weight)
    return made


def dropout():
    from sentence_transformers.sentence_transformer.modules import Dropout

    return Dropout(0.5)


def assert_equal(folder: Path, texts: Sequence[str] = TEXTS, side: str = "") -> ModelSpec:
    """Compare the vectors of passages (or queries) with the library's, packed and padded."""
    spec = resolve(folder)
    feeder = text_feeder(spec)
    expected = theirs(folder, texts, side)
    for packed in (False, True):
        make = feeder.queries if side == "query" else feeder.passages
        result = run(load(spec, packed=packed), make(texts), 60)
        assert not result.faults
        np.testing.assert_allclose(vectors(result), expected, atol=1e-5, rtol=0)
    return spec


CHAINS = {
    "nothing": (),
    "norm": (unit_norm,),
    "one layer": (dense(32, 48),),
    "two layers": (
        dense(32, 48, bias=False, activation_function=torch.nn.Identity()),
        dense(48, 8),
        unit_norm,
    ),
    "norm in the middle": (unit_norm, dense(32, 8, activation_function=torch.nn.GELU())),
    "weights in the activation": (dense(32, 8, activation_function=torch.nn.PReLU()), unit_norm),
    "residual": (dense(32, 32, use_residual=True), dense(32, 16, use_residual=True)),
    "layer norm and dropout": (layer_norm, dropout, unit_norm),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_modules_in_their_order(encoder_folder: MakeModel, tmp_path: Path, chain: str) -> None:
    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"), *CHAINS[chain])
    spec = assert_equal(folder)
    assert spec.normalize == bool(CHAINS[chain] and CHAINS[chain][-1] is unit_norm)


POOLINGS = [
    "cls",
    "max",
    "mean",
    "mean_sqrt_len_tokens",
    "weightedmean",
    "lasttoken",
    ("lasttoken", "cls"),
    ("weightedmean", "max", "mean"),
]


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_every_pooling(encoder_folder: MakeModel, tmp_path: Path, kind: str, pooling: object) -> None:
    modes = 1 if isinstance(pooling, str) else len(pooling)
    project = dense(32 * modes, 8, activation_function=torch.nn.Identity())
    folder = save(tmp_path / "saved", encoder_folder(kind, "mean"), project, unit_norm, pooling=pooling)
    assert_equal(folder)


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_pooling_without_the_prompt(encoder_folder: MakeModel, tmp_path: Path, pooling: object) -> None:
    prompts = {"query": "represent this: ", "document": "index and "}
    folder = save(
        tmp_path / "saved",
        encoder_folder("bert", "mean"),
        pooling=pooling,
        include_prompt=False,
        prompts=prompts,
    )
    for side in ("query", "document"):
        assert_equal(folder, [text for text in TEXTS if text], side)
    without = vectors(encode(folder, TEXTS[:1]))
    edit(folder / "1_Pooling" / "config.json", include_prompt=True)
    if pooling != "lasttoken":
        assert np.abs(vectors(encode(folder, TEXTS[:1])) - without).max() > 1e-3, "nothing was left out"


def test_a_text_must_fit_behind_a_prompt_that_is_left_out(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = save(
        tmp_path / "saved",
        encoder_folder("bert", "mean"),
        include_prompt=False,
        prompts={"document": "the quick brown fox jumps over"},
    )
    with pytest.raises(ModelError, match="max_length 8 leaves no room for a text behind the 7 tokens"):
        text_feeder(resolve(folder, max_length=8))
    assert not encode(folder, TEXTS, max_length=9).faults


@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({"query": "how do i ", "document": "a corpus "}, None),
        ({"query": "how do i "}, None),
        ({"document": "a corpus "}, "document"),
        ({"query": "how do i ", "document": "a corpus "}, "query"),
        ({}, None),
    ],
)
def test_prompts_of_both_sides(
    encoder_folder: MakeModel, tmp_path: Path, prompts: dict[str, str], default: str | None
) -> None:
    folder = save(
        tmp_path / "saved",
        encoder_folder("bert", "mean"),
        unit_norm,
        prompts=prompts,
        default_prompt_name=default,
    )
    for side in ("query", "document"):
        spec = assert_equal(folder, TEXTS, side)
    assert spec.query_instruction == prompts.get("query", "")
    assert spec.passage_instruction == prompts.get("document", "")


def test_a_default_prompt_of_neither_side_is_both_sides(encoder_folder: MakeModel, tmp_path: Path) -> None:
    """As `encode` takes it; the library's own names win, and a passage prompt by its older names."""
    base = encoder_folder("bert", "mean")
    folder = save(tmp_path / "a", base, prompts={"all": "read this: "}, default_prompt_name="all")
    spec = assert_equal(folder)
    assert spec.query_instruction == spec.passage_instruction == "read this: "
    prompts = {"all": "read this: ", "query": "q: ", "passage": "p: "}
    spec = resolve(save(tmp_path / "b", base, prompts=prompts, default_prompt_name="all"))
    assert (spec.query_instruction, spec.passage_instruction) == ("q: ", "p: ")
    edit(tmp_path / "b" / "config_sentence_transformers.json", default_prompt_name="none")
    with pytest.raises(ModelError, match="default_prompt_name 'none'"):
        resolve(tmp_path / "b")


@pytest.mark.parametrize("max_seq_length", [5, 48, None])
def test_texts_are_cut_where_the_library_cuts_them(
    encoder_folder: MakeModel, tmp_path: Path, max_seq_length: int | None
) -> None:
    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"), max_seq_length=max_seq_length)
    assert assert_equal(folder).max_length == (max_seq_length or 128)


def test_lower_casing_before_the_tokenizer(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", encoder_folder("xlm-roberta", "mean"), unit_norm)
    before = vectors(encode(folder, TEXTS))
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    assert_equal(folder)
    assert np.abs(vectors(encode(folder, TEXTS)) - before).max() > 1e-3, "no capital was lost"


def test_normalize_as_asked(encoder_folder: MakeModel, tmp_path: Path) -> None:
    base = encoder_folder("bert", "mean")
    bare, unit = save(tmp_path / "bare", base), save(tmp_path / "unit", base, unit_norm)
    assert [resolve(folder).normalize for folder in (bare, unit, base)] == [False, True, True]
    np.testing.assert_allclose(
        vectors(encode(bare, TEXTS, normalize=True)), vectors(encode(unit, TEXTS)), atol=1e-6
    )
    np.testing.assert_allclose(
        vectors(encode(unit, TEXTS, normalize=False)), vectors(encode(bare, TEXTS)), atol=1e-6
    )


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("chain", ["nothing", "norm", "one layer", "two layers"])
def test_vectors_are_cut_where_the_folder_says(encoder_folder: MakeModel, tmp_path: Path, chain: str) -> None:
    base = encoder_folder("bert", "mean")
    whole = save(tmp_path / "whole", base, *CHAINS[chain])
    cut = save(tmp_path / "cut", base, *CHAINS[chain], truncate_dim=5)
    expected = theirs(cut, TEXTS)
    assert expected.shape == (len(TEXTS), 5)
    # The library leaves the norm of what it cuts to its caller.
    expected = unit(expected) if resolve(cut).normalize else expected
    for packed in (False, True):
        np.testing.assert_allclose(vectors(encode(cut, TEXTS, packed=packed)), expected, atol=1e-5)
        asked = vectors(encode(whole, TEXTS, packed=packed, truncate_dim=5))
        np.testing.assert_allclose(asked, expected, atol=1e-5)
    # What is asked for wins, and more than there is is no cut.
    assert resolve(cut, truncate_dim=7).dim == 7
    config = cut / "config_sentence_transformers.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"truncate_dim": 500}))
    assert resolve(cut).dim == resolve(whole).dim


def test_a_length_that_no_vector_has_is_refused(encoder_folder: MakeModel, tmp_path: Path) -> None:
    base = encoder_folder("bert", "mean")
    with pytest.raises(ModelError, match=r"^model\.truncate_dim 33: vectors of .* have 32 numbers"):
        resolve(base, truncate_dim=33)
    with pytest.raises(ModelError, match=r"^model\.truncate_dim 8: is of embedding"):
        resolve(base, truncate_dim=8, outputs=["bm25"])
    folder = save(tmp_path / "saved", base, truncate_dim=5)
    config = folder / "config_sentence_transformers.json"
    config.write_text(config.read_text().replace('"truncate_dim": 5', '"truncate_dim": "5"'))
    with pytest.raises(ModelError, match="truncate_dim '5' is no length of a vector"):
        resolve(folder)


def test_a_float16_run_is_close(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"), *CHAINS["two layers"])
    half = vectors(encode(folder, TEXTS, dtype="bfloat16", packed=False))
    assert (half * theirs(folder, TEXTS)).sum(1).min() > 0.99


def test_weights_of_modules_are_part_of_the_model(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"), *CHAINS["two layers"])
    spec = resolve(folder)
    shutil.copy(folder / "README.md", folder / "2_Dense" / "README.md")
    assert hash_model(folder) == spec.weights_sha256
    path = folder / "2_Dense" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert hash_model(folder) != spec.weights_sha256
    with pytest.raises(ModelError, match="differ from those the run was planned with"):
        load(spec)


def test_pickled_weights_of_a_module(encoder_folder: MakeModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"), *CHAINS["one layer"])
    expected = vectors(encode(folder, TEXTS))
    place = folder / "2_Dense"
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    np.testing.assert_array_equal(vectors(encode(folder, TEXTS)), expected)
    torch.save(torch.nn.Linear(2, 2), place / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"2_Dense.*restricted reader"):
        load(resolve(folder))


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None takes one out."""
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({k: v for k, v in (old | changes).items() if v is not None}))


def change_module(folder: Path, number: int, **changes: object) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[number].update(changes)
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sentence_transformers.models.Router", "different ways"),
        ("sentence_transformers.models.Asym", "different ways"),
        ("sentence_transformers.models.CNN", "another kind"),
        ("sentence_transformers.models.LSTM", "another kind"),
        ("sentence_transformers.models.WeightedLayerPooling", "all layers"),
        ("sentence_transformers.models.StaticEmbedding", "word vectors"),
        (
            "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
            "each token",
        ),
        ("sentence_transformers.models.Unheard", "not supported"),
        ("custom_st.Dense", "code of its own"),
    ],
)
def test_a_module_that_is_not_run_is_refused_by_name(
    encoder_folder: MakeModel, tmp_path: Path, kind: str, reason: str
) -> None:
    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"), *CHAINS["one layer"])
    change_module(folder, 2, type=kind)
    with pytest.raises(ModelError, match=f"{kind.rpartition('.')[2]}.*{reason}"):
        resolve(folder)


@pytest.mark.parametrize(
    ("place", "changes", "reason"),
    [
        ("2_Dense", {"module_input_name": "token_embeddings"}, "each token"),
        ("2_Dense", {"activation_function": "mine.Swish"}, "none of torch.nn"),
        ("2_Dense", {"in_features": 40}, "takes vectors of 40 numbers.*have 32"),
        ("2_Dense", {"out_features": None}, "out_features"),
        (".", {"query_length": 32}, "query_length"),
        (".", {"transformer_task": "fill-mask"}, "transformer_task"),
        (".", {"processing_kwargs": {"text": {"max_length": 4}}}, "processing_kwargs"),
        (".", {"modality_config": {"message": {}}}, "chat template"),
        (".", {"config_kwargs": {"num_hidden_layers": 1}}, "config_kwargs {'num_hidden_layers': 1}"),
        (".", {"config_args": {"num_hidden_layers": 1}}, "config_args .* write them into config.json"),
        (".", {"tokenizer_args": {"model_max_length": 9, "use_fast": True}}, "{'model_max_length': 9}"),
        (".", {"model_kwargs": {"num_hidden_layers": 1}}, "model_kwargs"),
    ],
)
def test_what_a_module_is_told_and_is_not_done_is_refused(
    encoder_folder: MakeModel, tmp_path: Path, place: str, changes: dict[str, object], reason: str
) -> None:
    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"), *CHAINS["one layer"])
    edit(folder / place / ("config.json" if place != "." else "sentence_bert_config.json"), **changes)
    with pytest.raises(ModelError, match=reason):
        resolve(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bias": False}, "is not what its config.json says"),
        ({"out_features": 47}, "is not what its config.json says"),
        ({"activation_function": "torch.nn.modules.activation.Hm"}, "no activation Hm"),
        ({"activation_function": "torch.nn.modules.activation.MultiheadAttention"}, "not complete"),
    ],
)
def test_weights_that_do_not_fit_are_refused_when_loaded(
    encoder_folder: MakeModel, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"), *CHAINS["one layer"])
    edit(folder / "2_Dense" / "config.json", **changes)
    with pytest.raises(ModelError, match=reason):
        load(resolve(folder))


def test_missing_weights_of_a_module(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"), *CHAINS["one layer"])
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="2_Dense: has no weights"):
        resolve(folder)


def test_folders_without_a_transformer(encoder_folder: MakeModel, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_folder("bert", "mean"))
    static = StaticEmbedding(tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    with pytest.raises(ModelError, match="StaticEmbedding"):
        fetch_model(str(tmp_path / "static"), None)
    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"))
    change_module(folder, 0, path="0_Transformer")
    with pytest.raises(ModelError, match=r"before 2\.0"):
        resolve(folder)
    (folder / "0_Transformer").mkdir()
    (folder / "config.json").rename(folder / "0_Transformer" / "config.json")
    with pytest.raises(ModelError, match=r"lies in 0_Transformer, .* save it again"):
        fetch_model(str(folder), None)


def test_what_the_library_loads_with_and_changes_no_vector(encoder_folder: MakeModel, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"))
    loading = {"model_args": {"attn_implementation": "eager"}, "tokenizer_args": {"use_fast": True}}
    edit(folder / "sentence_bert_config.json", **loading)
    assert_equal(folder)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_to_be_merged_first(encoder_folder: MakeModel, tmp_path: Path, whole: bool) -> None:
    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not whole:
        (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter of another model; merge the two"):
        resolve(folder)


def test_the_library_reads_nothing_that_is_not_fetched(encoder_folder: MakeModel, tmp_path: Path) -> None:
    """From storage come the modules, too: the copy on this node makes the same vectors."""
    folder = save(tmp_path / "saved", encoder_folder("bert", "mean"), *CHAINS["two layers"])
    expected = vectors(encode(folder, TEXTS))
    copied = fetch_model(f"file://{folder}", None)[0]
    assert copied != folder
    assert hash_model(copied) == hash_model(folder)
    np.testing.assert_array_equal(vectors(encode(copied, TEXTS)), expected)
