"""On a CUDA device: packed, padded, plain and fused give what float32 gives, and nothing waits or recompiles.

The models are of real sizes with few layers and random weights, wide enough that attention looks at some
tokens and not at all alike. Nothing here needs more than torch, transformers, NumPy, PyArrow, psutil and
pytest, so that it runs where there is a GPU and little else:

    python -m pytest -o addopts= -p no:cacheprovider --noconftest tests/model/test_cuda.py
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from bge_ray.model.heads import Head, Logit, Pooled, TokenVectors, TokenWeights
from bge_ray.model.run.add_norm import AddNorm, add_norm, compile_norms
from bge_ray.model.run.batching import longest_rows, token_budget_batches
from bge_ray.model.run.executor import Executor, Loaded
from bge_ray.model.run.fused import fuse_layers
from bge_ray.model.run.last_layer import keep_one_token
from bge_ray.model.run.load import Loading, load_cross_encoder, load_encoder
from bge_ray.model.run.packed import ATTENTION, can_pack, register
from bge_ray.model.run.prefix import shared_tokens
from bge_ray.model.run.result import Result
from bge_ray.records.outputs import Output
from bge_ray.records.tokens import PackedTokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
LENGTHS = (512, 1, 127, 32, 63, 2, 511, 31, 128, 64, 33, 512, 65, 129, 1)
VOCABULARY = 1000
BUDGET = 1024
# 1 - cosine against float32.
CLOSE = {"float16": 1e-4, "bfloat16": 2e-3}


@dataclass(frozen=True)
class Shape:
    """A model type and its sizes."""

    kind: str
    dim: int
    heads: int
    layers: int = 2


SHAPES = {
    "small": Shape("bert", 384, 12),  # 32 numbers a head
    "base": Shape("bert", 768, 12),
    "xlm-roberta": Shape("xlm-roberta", 768, 12),
    "qwen2": Shape("qwen2", 512, 8),
}


@dataclass(frozen=True)
class Way:
    """How a model runs."""

    dtype: str = "float16"
    kernels: str = "fused"
    packed: bool = True
    warm: bool = True


EXACT = Way("float32", "plain", packed=False)
WAYS = [
    Way(dtype, kernels, packed)
    for dtype in CLOSE
    for kernels, packed in (("plain", True), ("fused", True), ("fused", False), ("plain", False))
]


def way_name(way: Way) -> str:
    return f"{way.dtype}-{way.kernels}-{'packed' if way.packed else 'padded'}"


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """No TF32 in the reference, and as many kernels may be compiled as in a process of its own."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(shape, whether it scores pairs) to a folder with a config and weights."""
    root = tmp_path_factory.mktemp("cuda")

    @functools.cache
    def make(name: str, *, scores: bool = False) -> Path:
        shape = SHAPES[name]
        roberta = shape.kind == "xlm-roberta"
        config = AutoConfig.for_model(
            shape.kind,
            vocab_size=VOCABULARY,
            hidden_size=shape.dim,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.dim,
            max_position_embeddings=514 if roberta else 512,
            type_vocab_size=1 if roberta else 2,
            pad_token_id=1 if roberta else 0,
            initializer_range=(2 / shape.dim) ** 0.5,  # scores of attention of about 2
            num_labels=1,
            **({"num_key_value_heads": 2} if shape.kind == "qwen2" else {}),
        )
        torch.manual_seed(0)
        model = (AutoModelForSequenceClassification if scores else AutoModel).from_config(config)
        path = root / f"{name}-{scores}"
        model.eval().save_pretrained(path)
        return path

    return make


def tokens_of(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> PackedTokens:
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    ids = np.random.default_rng(seed).integers(5, VOCABULARY, offsets[-1], dtype=np.int32)
    return PackedTokens(ids, offsets, np.zeros(len(lengths), np.bool_))


def make(
    folder: Path, way: Way, make_heads: Callable[[Any], Sequence[Head]], *, scores: bool = False
) -> Executor:
    """Load a model as `Model` does, which takes more packages than torch and transformers."""
    dtype = getattr(torch, way.dtype)

    def load(how: Loading) -> Loaded:
        model: Any = (load_cross_encoder if scores else load_encoder)(folder, how)
        return Loaded(model, tuple(head.to(how.dtype) for head in make_heads(model)))

    register()
    loaded = load(Loading(dtype, ATTENTION if way.packed else None))
    model: Any = loaded.model
    if scores and way.packed:
        top = model.classifier
        if model.config.model_type == "bert":
            top = torch.nn.Sequential(model.base_model.pooler, top)
        loaded = Loaded(model.base_model, (Logit(loaded.heads[0].output, top),))
    if way.packed:
        assert can_pack(loaded.model.config, CUDA, dtype)
    if way.kernels == "fused":
        fuse_layers(loaded.model)
    if way.packed:
        keep_one_token(loaded.model, {head.needs for head in loaded.heads})
    exact = Loading(torch.float32)
    executor = Executor(loaded, lambda: load(exact), device=CUDA, packed=way.packed)
    if way.warm:
        compile_norms(loaded.model)
        rows = longest_rows(512, BUDGET)
        run(executor, rows)
    return executor


def run(executor: Executor, tokens: PackedTokens, budget: int = BUDGET) -> Result:
    result = Result(tuple(head.output for head in executor._loaded.heads), len(tokens))
    executor.run(tokens, token_budget_batches(tokens.lengths, budget, packed=executor.packed), result)
    assert not result.faults
    return result


def pooled(pooling: str, *, prompts: bool = False) -> Callable[[Any], Sequence[Head]]:
    """Return what makes a pooling head for a model; with ``prompts``, one that leaves prompts out."""

    def heads(model: Any) -> Sequence[Head]:
        output = Output("v", "dense", model.config.hidden_size, "float32")
        return [Pooled(output, pooling, normalize=True, pools_prompt=not prompts)]

    return heads


def score(model: Any) -> Sequence[Head]:
    return [Logit(Output("v", "scalar", 1, "float32"), None)]


def three_outputs(model: Any) -> Sequence[Head]:
    dim = model.config.hidden_size
    torch.manual_seed(1)
    return [
        *pooled("cls")(model),
        TokenWeights(Output("s", "sparse", VOCABULARY, "float16"), torch.nn.Linear(dim, 1), {5, 6}),
        TokenVectors(Output("c", "multi", 64, "float16"), torch.nn.Linear(dim, 64), normalize=True),
    ]


def vectors(executor: Executor, tokens: PackedTokens, budget: int = BUDGET) -> np.ndarray:
    return run(executor, tokens, budget).array("v")


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return 1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def unchanged(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Tell of each row whether it is the same but for the last bits of half precision."""
    return np.abs(a - b).max(1) < 2e-3 * np.abs(b).max()


@pytest.fixture(scope="module")
def exact(folder: Callable[..., Path]) -> Callable[[str, str], np.ndarray]:
    """(shape, pooling) to the vectors of `tokens_of` in float32, padded, plain."""

    @functools.cache
    def made(name: str, pooling: str) -> np.ndarray:
        return vectors(make(folder(name), EXACT, pooled(pooling)), tokens_of())

    return made


@pytest.mark.parametrize("way", WAYS, ids=way_name)
@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("small", "cls"),
        ("small", "mean"),
        ("base", "cls"),
        ("base", "mean"),
        ("base", "last_token"),
        ("base", "max"),
        ("xlm-roberta", "cls"),
        ("xlm-roberta", "weighted_mean"),
    ],
)
def test_close_to_padded_float32(
    folder: Callable[..., Path], exact: Callable[[str, str], np.ndarray], name: str, pooling: str, way: Way
) -> None:
    executor = make(folder(name), way, pooled(pooling))
    found = distances(vectors(executor, tokens_of()), exact(name, pooling))
    print(f"{name} {pooling} {way_name(way)}: 1 - cosine at most {found.max():.1e}")
    assert found.max() < CLOSE[way.dtype]


def test_the_reference_is_that_of_a_cpu(
    folder: Callable[..., Path], exact: Callable[[str, str], np.ndarray]
) -> None:
    model = load_encoder(folder("small"), Loading(torch.float32))
    tokens, expected = tokens_of(), exact("small", "mean")
    for row in (1, 5, 3, 4):
        ids = tokens.input_ids[tokens.offsets[row] : tokens.offsets[row + 1]]
        with torch.inference_mode():
            state = model(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0].mean(0).numpy()
        assert distances(state[None], expected[row : row + 1]).max() < 1e-6


@pytest.mark.parametrize("kernels", ["plain", "fused"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_row_knows_nothing_of_its_neighbours(
    folder: Callable[..., Path], kernels: str, pooling: str
) -> None:
    executor = make(folder("base"), Way(kernels=kernels), pooled(pooling))
    tokens, changed = tokens_of(), 8
    ids = tokens.input_ids.copy()
    row = slice(tokens.offsets[changed], tokens.offsets[changed + 1])
    ids[row] = ids[row][::-1]
    ids[row.start] = 7  # CLS pooling sees it at once
    other = PackedTokens(ids, tokens.offsets, tokens.truncated)
    budget = sum(LENGTHS)  # one batch
    before, after = vectors(executor, tokens, budget), vectors(executor, other, budget)
    same = unchanged(after, before)
    assert not same[changed] and same.sum() == len(LENGTHS) - 1
    print("bit-equal rows:", int((before == after).all(1).sum()), "of", len(LENGTHS) - 1)


@pytest.mark.parametrize("kernels", ["plain", "fused"])
@pytest.mark.parametrize("lengths", [[1], [2], [33], [512], [1, 1], [1, 1, 1, 512]])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_few_rows(folder: Callable[..., Path], kernels: str, lengths: list[int], pooling: str) -> None:
    tokens = tokens_of(lengths, seed=3)
    expected = vectors(make(folder("small"), EXACT, pooled(pooling)), tokens)
    got = vectors(make(folder("small"), Way(kernels=kernels), pooled(pooling)), tokens)
    assert distances(got, expected).max() < CLOSE["float16"]


@pytest.mark.parametrize("way", WAYS[:4], ids=way_name)
@pytest.mark.parametrize("name", ["small", "xlm-roberta"])
def test_scores(folder: Callable[..., Path], name: str, way: Way) -> None:
    path, tokens = folder(name, scores=True), tokens_of()
    expected, got = (vectors(make(path, how, score, scores=True), tokens) for how in (EXACT, way))
    assert np.abs(got - expected).max() < 2e-2 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("way", WAYS[:3], ids=way_name)
def test_three_outputs(folder: Callable[..., Path], way: Way) -> None:
    path, tokens = folder("xlm-roberta"), tokens_of()
    expected, got = (run(make(path, how, three_outputs), tokens) for how in (EXACT, way))
    for name in ("s", "c"):
        a, b = (result.columns()[name].to_pylist() for result in (got, expected))
        assert [row is None for row in a] == [row is None for row in b] and len(a) == len(LENGTHS)
    assert distances(got.array("v"), expected.array("v")).max() < CLOSE[way.dtype]


# Nothing between the launch of a batch and its end may wait for the device.


@pytest.mark.parametrize("way", WAYS[:4], ids=way_name)
@pytest.mark.parametrize(
    "heads",
    ["cls", "mean", "last_token", "max", "weighted_mean", "mean_sqrt_len", "three_outputs", "score"],
)
@pytest.mark.parametrize("prompts", [False, True])
def test_no_launch_waits(folder: Callable[..., Path], heads: str, way: Way, prompts: bool) -> None:
    scores = heads == "score"
    if prompts and heads in ("three_outputs", "score"):
        pytest.skip("they leave no prompt out")
    made = {"three_outputs": three_outputs, "score": score}.get(heads, pooled(heads, prompts=prompts))
    executor = make(folder("small", scores=scores), way, made, scores=scores)
    tokens = tokens_of()
    if prompts:
        left_out = np.minimum(tokens.lengths - 1, 3).astype(np.int32)
        tokens = replace(tokens, prompt_tokens=left_out)
    for rows in (np.arange(len(LENGTHS)), np.array([0, 11]), np.array([2])):
        launched = executor._launch(executor._loaded, tokens, rows, packed=way.packed)  # loads kernels
        launched.blocks()
        torch.cuda.set_sync_debug_mode("error")
        try:
            launched = executor._launch(executor._loaded, tokens, rows, packed=way.packed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert np.isfinite(np.asarray(launched.blocks()[0].values, dtype=np.float32)).all()


def test_what_rows_begin_with_changes_no_vector_and_no_launch_waits(folder: Callable[..., Path]) -> None:
    common, own = tokens_of([40], seed=1).input_ids, tokens_of([n for n in LENGTHS if n < 400])
    rows = [[*common, *own.input_ids[a:b]] for a, b in zip(own.offsets[:-1], own.offsets[1:], strict=True)]
    tokens = PackedTokens.of(rows, np.zeros(len(rows), np.bool_))
    assert shared_tokens(tokens) == 40
    expected = vectors(make(folder("qwen2"), EXACT, pooled("last_token")), tokens)
    executor = make(folder("qwen2"), Way("bfloat16", "plain", warm=False), pooled("last_token"))
    executor.shares = True
    assert distances(vectors(executor, tokens), expected).max() < CLOSE["bfloat16"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = executor._launch(executor._loaded, tokens, np.arange(len(tokens)), packed=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(np.asarray(launched.blocks()[0].values, dtype=np.float32)).all()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_nothing_is_compiled_after_the_warm_up(
    folder: Callable[..., Path], pooling: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    executor = make(folder("base"), Way(dtype), pooled(pooling))
    norms = [part for part in executor._loaded.model.modules() if isinstance(part, AddNorm)]
    assert len(norms) == 4 and not any(norm.kernel is add_norm for norm in norms), caplog.text
    before = counters["stats"]["unique_graphs"]
    assert before >= 1
    for lengths in ([512], [1], [2], [1, 1], [7] * 3, LENGTHS, [512] * 64, [3] * 5000):
        run(executor, tokens_of(lengths), budget=sum(lengths))
    assert counters["stats"]["unique_graphs"] == before


def test_one_compiled_norm_is_one_kernel_and_right() -> None:
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    norm = AddNorm(torch.nn.LayerNorm(768, eps=1e-12)).to(CUDA, torch.float16)
    compile_norms(norm)
    assert norm.kernel is not add_norm
    with torch.inference_mode():
        for tokens in (2, 77, 32_768):
            states, residual = (torch.randn(tokens, 768, device=CUDA).half() for _ in range(2))
            norm(states, residual)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                got = norm(states, residual)
                torch.cuda.synchronize()
            launched = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            assert len(launched) == 1, [e.name for e in launched]
            exact = torch.nn.functional.layer_norm(states.float() + residual.float(), (768,), eps=1e-12)
            torch.testing.assert_close(got.float(), exact, atol=4e-3, rtol=2e-3)


def test_the_product_applies_the_gelu_by_tanh() -> None:
    """Of one row, too, for which another kernel may be chosen."""
    torch.manual_seed(0)
    weight, bias = torch.randn(1536, 384, device=CUDA) / 20, torch.randn(1536, device=CUDA)
    for dtype, close in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        for tokens in (1, 2, 15, 4096):
            states = torch.randn(tokens, 384, device=CUDA).to(dtype)
            w, b = weight.to(dtype), bias.to(dtype)
            got = torch.ops.aten._addmm_activation(b, states, w.t(), use_gelu=True)
            product = torch.nn.functional.linear(states.float(), w.float(), b.float())
            expected = torch.nn.functional.gelu(product, approximate="tanh")
            torch.testing.assert_close(got.float(), expected, atol=close, rtol=close)


@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_a_batch_that_does_not_fit_is_halved(folder: Callable[..., Path], kernels: str) -> None:
    executor = make(folder("small"), Way(kernels=kernels), pooled("cls"))
    n = 4000
    tokens = tokens_of([100] * n)
    expected = vectors(executor, tokens, 32_768)
    result = Result(tuple(head.output for head in executor._loaded.heads), n)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (512 << 20)) / total)
    try:
        executor.run(tokens, [np.arange(n, dtype=np.int64)], result)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not result.faults and result.splits and result.batches > 1
    assert unchanged(result.array("v"), expected).all()
