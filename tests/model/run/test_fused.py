"""Fused layers give what transformers' layers give, in fewer launches, on every way through a model."""

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, BertConfig, BertModel

from bge_ray.errors import ModelError
from bge_ray.model.run.add_norm import AddNorm, add_norm, compile_norms
from bge_ray.model.run.fused import FusedLayer, fuse_layers
from bge_ray.model.run.inputs import Inputs, packed_inputs, padded_inputs
from bge_ray.model.run.last_layer import keep_one_token
from bge_ray.model.run.load import Loading, load_encoder
from bge_ray.model.run.packed import ATTENTION, register
from bge_ray.model.spec import pair_feeder, resolve_encoder, resolve_reranker, text_feeder
from bge_ray.records.arrays import dense_rows, multi_rows, sparse_rows
from bge_ray.records.model import SCORE
from bge_ray.records.tokens import PackedTokens
from bge_ray.settings.sections import ModelSettings, RerankSettings
from tests.model.conftest import MakeModel, cosines, encode, load, resolve, run, vectors
from tests.support.models import make_decoder, make_encoder, make_m3
from tests.support.varlen import attend_by_reference

LENGTHS = [9, 1, 17, 17, 2, 64, 33]


def tokens_of(lengths: list[int], vocabulary: int) -> PackedTokens:
    borders = np.cumsum([0, *lengths])
    ids = (5 + np.arange(borders[-1]) * 7 % (vocabulary - 5)).astype(np.int32)
    return PackedTokens(ids, borders.astype(np.int32), np.zeros(len(lengths), np.bool_))


def inputs_of(model: Any, lengths: list[int], *, packed: bool) -> Inputs:
    tokens, rows = tokens_of(lengths, 60), np.arange(len(lengths))
    make = packed_inputs if packed else padded_inputs
    return make(tokens, rows, model.config, torch.device("cpu"))


def states(model: Any, lengths: list[int], *, packed: bool) -> torch.Tensor:
    """Return (tokens or rows, dim) of the last layer, without padding."""
    inputs = inputs_of(model, lengths, packed=packed)
    with torch.inference_mode():
        hidden = model(**inputs.arguments).last_hidden_state
    return hidden.flatten(0, 1) if inputs.places is None else hidden.flatten(0, 1)[inputs.places]


def encoder(folder: Path, *, packed: bool) -> Any:
    register()
    return load_encoder(folder, Loading(torch.float32, ATTENTION if packed else None))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("needs", [{"all_tokens"}, {"first_token"}, {"last_token"}])
def test_the_exact_form_gives_the_same_states(
    encoder_folder: MakeModel, kind: str, needs: Collection[str], packed: bool
) -> None:
    plain = encoder(encoder_folder(kind, "cls"), packed=packed)
    made = copy.deepcopy(plain)
    fuse_layers(made, "none")
    if packed:
        for model in (plain, made):
            keep_one_token(model, needs)
    for lengths in (LENGTHS, [5], [1], [1, 1, 1]):
        expected, got = (states(model, lengths, packed=packed) for model in (plain, made))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_form_by_tanh_is_the_one_that_is_taken_on_every_device(encoder_folder: MakeModel) -> None:
    plain = encoder(encoder_folder("bert", "cls"), packed=True)
    expected, made = copy.deepcopy(plain), copy.deepcopy(plain)
    for layer in expected.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.GELU(approximate="tanh")
    fuse_layers(made)
    torch.testing.assert_close(
        states(made, LENGTHS, packed=True), states(expected, LENGTHS, packed=True), atol=1e-5, rtol=1e-5
    )


def test_states_of_every_layer_are_recorded(encoder_folder: MakeModel) -> None:
    plain = encoder(encoder_folder("bert", "cls"), packed=True)
    made = copy.deepcopy(plain)
    fuse_layers(made, "none")
    inputs = inputs_of(plain, LENGTHS, packed=True).arguments
    with torch.inference_mode():
        expected, got = (model(**inputs, output_hidden_states=True).hidden_states for model in (plain, made))
    assert len(got) == len(expected) == 3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whole models take the exact form, in which they give what plain ones give."""
    monkeypatch.setattr("bge_ray.model.run.model.fuse_layers", lambda model: fuse_layers(model, "none"))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token", "max"])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_vectors(encoder_folder: MakeModel, texts: list[str], kind: str, pooling: str, packed: bool) -> None:
    folder = encoder_folder(kind, "cls")
    expected, got = (
        encode(folder, texts, packed=packed, pooling=pooling, kernels=kernels)
        for kernels in ("plain", "fused")
    )
    assert not got.faults
    np.testing.assert_allclose(vectors(got), vectors(expected), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("packed", [True, False])
def test_the_three_outputs_of_an_m3(tmp_path: Path, texts: list[str], packed: bool) -> None:
    folder = make_m3(tmp_path / "m3")
    outputs = ("embedding", "sparse", "colbert")
    found = []
    for kernels in ("plain", "fused"):
        spec = resolve(folder, outputs=outputs, kernels=kernels).stored_as("float32")
        columns = run(load(spec, packed=packed), text_feeder(spec).passages(texts)).columns()
        weights, states = sparse_rows(columns["sparse"]), multi_rows(columns["colbert"], "float32")
        found.append([dense_rows(columns["embedding"]), weights.indices, weights.values, states.vectors])
    for expected, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_scores_of_a_cross_encoder(
    reranker_folder: Callable[[str], Path], texts: list[str], kind: str, packed: bool
) -> None:
    folder = reranker_folder(kind)
    scores = []
    for kernels in ("plain", "fused"):
        asked = RerankSettings(model=str(folder), max_length=128, kernels=kernels)
        spec = resolve_reranker(asked, on_gpu=False)
        assert spec.kernels == kernels
        pairs = pair_feeder(spec).pairs([texts[0]] * len(texts), texts)
        scores.append(run(load(spec, packed=packed), pairs).array(SCORE))
    np.testing.assert_allclose(scores[1], scores[0], atol=2e-5, rtol=0)


def test_a_row_that_overflows_is_done_again_by_plain_layers(
    encoder_folder: MakeModel, texts: list[str]
) -> None:
    spec = dataclasses.replace(resolve(encoder_folder("bert", "cls")), kernels="fused")
    model = load(spec)
    assert isinstance(model._executor._loaded.model.encoder.layer[0], FusedLayer)
    exact = model._executor._load_exact()
    assert not any(isinstance(part, FusedLayer) for part in exact.model.modules())
    tokens = text_feeder(spec).passages(texts)
    again = model._executor._launch_exact(tokens, 3).blocks()[0].values
    assert cosines(again, vectors(run(model, tokens))[3:4]) > 0.999


def test_weights_are_held_once(encoder_folder: MakeModel) -> None:
    model = encoder(encoder_folder("bert", "cls"), packed=True)
    before = sum(p.numel() for p in model.parameters())
    names = {p.data_ptr() for p in model.encoder.layer[0].output.parameters()}
    fuse_layers(model)
    assert sum(p.numel() for p in model.parameters()) == before
    assert names <= {p.data_ptr() for p in model.encoder.layer[0].parameters()}


def test_other_layers_are_refused(encoder_folder: MakeModel, tmp_path: Path) -> None:
    other = encoder(encoder_folder("bert", "cls"), packed=True)
    other.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.ReLU()
    with pytest.raises(ModelError, match=r"BertLayer: this version of transformers .* model\.kernels=plain"):
        fuse_layers(other)
    decoder = AutoModel.from_pretrained(make_decoder(tmp_path / "qwen", "qwen2"))
    with pytest.raises(ModelError, match="Qwen2Model: has no layers that could be fused"):
        fuse_layers(decoder)


def test_what_is_settled(encoder_folder: MakeModel, tmp_path: Path) -> None:
    def settled(folder: Path, *, on_gpu: bool, **asked: Any) -> str:
        return resolve_encoder(ModelSettings(name=str(folder), **asked), on_gpu=on_gpu).kernels

    bert = encoder_folder("bert", "cls")
    assert settled(bert, on_gpu=False) == "plain"
    assert settled(bert, on_gpu=True) == "fused"
    assert settled(bert, on_gpu=True, dtype="bfloat16") == "fused"
    assert settled(bert, on_gpu=True, dtype="float32") == "plain"
    assert settled(bert, on_gpu=True, kernels="plain") == "plain"
    assert settled(bert, on_gpu=False, kernels="fused") == "fused"
    qwen = make_decoder(tmp_path / "qwen", "qwen2")
    assert settled(qwen, on_gpu=True) == "plain"
    with pytest.raises(ModelError, match=r"model\.kernels fused: .* is no BERT"):
        settled(qwen, on_gpu=True, kernels="fused")
    relu = make_encoder(tmp_path / "relu")
    config = (relu / "config.json").read_text()
    (relu / "config.json").write_text(config.replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))
    assert settled(relu, on_gpu=True) == "plain"


# A CPU dispatches the operators for each of which a GPU launches a kernel; these compute nothing.
NO_LAUNCH = ("empty", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Notes the names of operators that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        of_views = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if not of_views and not name.startswith(NO_LAUNCH):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One operator for what is one kernel there: attention, GELU in the product, the compiled norm."""
    attend_by_reference(monkeypatch)
    monkeypatch.setattr(
        "bge_ray.model.run.fused.product_and_gelu",
        lambda x, weight, bias, _: torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True),
    )
    with torch.library._scoped_library("bge_ray_tests", "DEF") as library:
        library.define("add_norm(Tensor a, Tensor b, Tensor weight, Tensor bias, float eps) -> Tensor")
        library.impl("add_norm", add_norm, "CPU")
        yield


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("kernels", "a_layer"), [("plain", 12), ("fused", 7)])
def test_launches_of_a_layer(kernels: str, a_layer: int) -> None:
    """Attention counts as one here; `varlen_attn` also fills two numbers on CUDA, of either kind."""
    counted = []
    for layers in (1, 3):
        model = deep(layers)
        if kernels == "fused":
            fuse_layers(model)
            for norm in (part for part in model.modules() if isinstance(part, AddNorm)):
                norm.kernel = torch.ops.bge_ray_tests.add_norm
        arguments = inputs_of(model, LENGTHS, packed=True).arguments
        with torch.no_grad(), Launches() as launches:  # which takes composite operators apart
            model(**arguments)
        counted.append(launches.names)
    assert (len(counted[1]) - len(counted[0])) / 2 == a_layer, counted[1]


def deep(layers: int) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64
    )
    config._attn_implementation = ATTENTION
    register()
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def compiled_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norms that a GPU would compile."""
    monkeypatch.setattr("bge_ray.model.run.add_norm.is_compiled_on", lambda device: True)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_on_cpu")
def test_compiled_norms_are_compiled_once() -> None:
    model = deep(2)
    fuse_layers(model, "none")
    expected = {n: states(model, [n] * n, packed=True) for n in (1, 2, 5)}
    compile_norms(model)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for n, exact in expected.items():
        torch.testing.assert_close(states(model, [n] * n, packed=True), exact, atol=1e-5, rtol=1e-5)
    keep_one_token(model, {"first_token"})
    for lengths in ([1], [7], LENGTHS):
        states(model, lengths, packed=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.usefixtures("compiled_on_cpu")
def test_without_a_compiler_there_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(norms: list[AddNorm]) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr("bge_ray.model.run.add_norm.compiled", fails)
    model = deep(2)
    fuse_layers(model)
    expected = states(model, LENGTHS, packed=True)
    compile_norms(model)
    [record] = caplog.records
    assert record.getMessage().endswith("RuntimeError: Failed to find C compiler.")
    torch.testing.assert_close(states(model, LENGTHS, packed=True), expected, atol=0, rtol=0)
